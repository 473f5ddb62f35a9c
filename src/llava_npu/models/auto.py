"""Telling `AutoModelForImageTextToText`, `AutoProcessor` and `pipeline` of our model type, at no cost until they load.

`import llava_npu` must be quick, and loading transformers' model code takes seconds; but after it, transformers'
`Auto*` classes must open our checkpoints, whichever of the two was imported first. So the registration waits: an import
hook watches transformers' modules and ours, and registers our classes at the first moment when the `Auto*` registries
are loaded and none of these modules is half-way through its own import.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRY = "transformers.models.auto.configuration_auto"
_WATCHED = ("transformers.", "llava_npu.models.")  # ours may be half-way through its import too
_registered = False


def register_when_transformers_loads() -> None:
    """Registers now if transformers' registries are loaded, else as soon as they are."""
    if _ready():
        _register()
    else:
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    global _registered
    if _registered:
        return
    _registered = True
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Watcher)]

    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from llava_npu.models.configuration import LlavaNpuConfig
    from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
    from llava_npu.models.processing import LlavaNpuProcessor

    AutoConfig.register(LlavaNpuConfig.model_type, LlavaNpuConfig)
    AutoModelForImageTextToText.register(LlavaNpuConfig, LlavaNpuForConditionalGeneration)
    AutoProcessor.register(LlavaNpuConfig, LlavaNpuProcessor)


def _ready() -> bool:
    if _REGISTRY not in sys.modules:
        return False
    return not any(
        name.startswith(_WATCHED) and getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
    )


class _Watcher(MetaPathFinder):
    """Lets the watched modules load as they always do, and looks whether all is ready after each."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_WATCHED):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfterwards(spec.loader)
        return spec


class _RegisterAfterwards(Loader):
    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = self._loader  # so that nobody else sees this stand-in
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        spec._initializing = False  # type: ignore[attr-defined]  # it is complete; the import system says so a line later
        if _ready():
            _register()
