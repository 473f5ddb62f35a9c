"""One file that carries this model's code along with a checkpoint, for machines where this package is not installed.

`AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)` finds it through `auto_map` in
config.json. It holds the sources of the configuration, the model, the processor, and of whatever they import, as they
are: whoever is asked to trust the file can read it. Where the package is installed, that is used.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from llava_npu.files.json_objects import read_json
from llava_npu.version import __version__

FILE = "modeling_llava_npu.py"
PACKAGE = "llava_npu"
# What transformers' Auto classes ask for, and where it is defined.
CLASSES = {
    "AutoConfig": ("llava_npu.models.configuration", "LlavaNpuConfig"),
    "AutoModelForImageTextToText": ("llava_npu.models.modeling", "LlavaNpuForConditionalGeneration"),
    "AutoProcessor": ("llava_npu.models.processing", "LlavaNpuProcessor"),
}
_IN = {"config.json": ("AutoConfig", "AutoModelForImageTextToText"), "processor_config.json": ("AutoProcessor",)}

_HEAD = '''"""The code of this model: {package} {version}, generated from its sources. Licence: Apache-2.0.

For `trust_remote_code=True`. Where the package {package} is installed, that is used instead of what follows.
"""

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

_SOURCES = {{}}  # module: its source
_PACKAGES = {packages!r}  # those that may have modules of their own, which need not be here
'''

_TAIL = '''

class _Sources(MetaPathFinder, Loader):
    """Imports modules from `_SOURCES`; a package whose own file is not among them is an empty one."""

    def find_spec(self, name, path=None, target=None):
        is_package = name in _PACKAGES or any(module.startswith(name + ".") for module in _SOURCES)
        if name not in _SOURCES and not is_package:
            return None
        return ModuleSpec(name, self, origin=__file__, is_package=is_package)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        source = _SOURCES.get(module.__name__, "")
        exec(compile(source, f"{__file__}:{module.__name__}", "exec"), module.__dict__)


if importlib.util.find_spec("{package}") is None:
    sys.meta_path.append(_Sources())

'''


def write_remote_code(folder: Path) -> None:
    """Writes the file into a model folder, and where to find it into the folder's configurations."""
    (folder / FILE).write_text(remote_code(), encoding="utf-8")
    for name, autos in _IN.items():
        values = read_json(folder / name)
        values["auto_map"] = {auto: f"{Path(FILE).stem}.{CLASSES[auto][1]}" for auto in autos}
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def remote_code() -> str:
    """The file's text."""
    files = sorted(_reachable(module for module, _ in CLASSES.values()).items())
    packages = [name for name, path in files if path.name == "__init__.py"]
    parts = [_HEAD.format(package=PACKAGE, version=__version__, packages=packages)]
    for name, path in files:
        parts.append(f"_SOURCES[{name!r}] = {_literal(path.read_text(encoding='utf-8'))}\n")
    parts.append(_TAIL.replace("{package}", PACKAGE))
    for module, name in CLASSES.values():
        # Subclasses of this module: transformers notes down the module of what it saves.
        parts.append(f"\nclass {name}(importlib.import_module({module!r}).{name}):\n    pass\n\n")
    parts.append(f"\n{CLASSES['AutoModelForImageTextToText'][1]}.config_class = {CLASSES['AutoConfig'][1]}\n")
    return "".join(parts)


def _literal(source: str) -> str:
    escaped = source.replace("\\", "\\\\").replace("'''", "\\'\\'\\'")
    return f"'''{escaped}'''"


def _reachable(modules: Iterator[str]) -> dict[str, Path]:
    """The files of modules of this package, and of all that they import from it."""
    waiting, found = list(modules), {}
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        found[name] = Path(spec.origin)
        waiting += _imports(found[name])
    return found


def _imports(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports, at its top or inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            real = [name for name in submodules if _is_module(name)]
            yield from real
            if len(real) < len(submodules):  # names that the module itself defines
                yield node.module


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False
