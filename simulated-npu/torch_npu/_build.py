"""Compiles the C++ backend on first use and loads it; later runs, and other processes, find the finished file.

The result is kept outside the repository, in `$SIMULATED_NPU_BUILD_DIR`, else `$XDG_CACHE_HOME/llava-npu/simulated-npu`
(by default `~/.cache/...`), in a folder named after everything it depends on: sources, flags, torch, Python, compiler.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock

SOURCE_DIR = Path(__file__).resolve().parent.parent / "csrc"
LIBRARY = "_C"
FLAGS = ["-O1", "-g0", "-fvisibility=hidden", "-w"]  # kernels are torch's own: there is nothing here to optimise


class BuildError(ImportError):
    """The backend cannot be compiled on this machine."""


def load() -> ModuleType:
    """Returns the extension module, compiling it first if this machine has not done so yet."""
    folder = cache_dir() / fingerprint()
    library = folder / f"{LIBRARY}.so"
    if not library.exists():
        cache_dir().mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # parallel test workers and ranks wait for the one that compiles
            if not library.exists():
                _compile_into(folder)
    spec = importlib.util.spec_from_file_location(f"torch_npu.{LIBRARY}", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cache_dir() -> Path:
    if configured := os.environ.get("SIMULATED_NPU_BUILD_DIR"):
        return Path(configured)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "llava-npu" / "simulated-npu"


def fingerprint() -> str:
    """Names one build: any change of what goes into it gives another name."""
    digest = hashlib.sha256()
    for part in (torch.__version__, sys.implementation.cache_tag or "", sysconfig.get_platform(), compiler(), *FLAGS):
        digest.update(part.encode() + b"\0")
    for path in sorted(SOURCE_DIR.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def compiler() -> str:
    return os.environ.get("CXX") or "c++"  # the rule of torch.utils.cpp_extension


def _compile_into(folder: Path) -> None:
    """Compiles next to `folder` and renames, so that a build cut short is never taken for a finished one."""
    _require_tools()
    print(f"simulated NPU: compiling its backend once, into {folder} (about a minute)", file=sys.stderr, flush=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.building-", dir=folder.parent))
    try:
        # In a process of its own: the loader would load what it built, from a folder that is about to be renamed.
        result = subprocess.run(
            [sys.executable, "-P", __file__, str(unfinished)],
            env=os.environ | {"PATH": _path_with_ninja(), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise BuildError(f"The simulated NPU did not compile:\n{(result.stdout + result.stderr)[-4000:]}")
        for intermediate in unfinished.glob("*.o"):
            intermediate.unlink()
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _compile(build_dir: Path) -> None:
    from torch.utils import cpp_extension  # imports setuptools: only when there is something to compile

    cpp_extension.load(
        name=LIBRARY,
        sources=[str(path) for path in sorted(SOURCE_DIR.glob("*.cpp"))],
        extra_cflags=FLAGS,
        build_directory=str(build_dir),
    )


def _require_tools() -> None:
    """Raises one error that names everything missing and how to get it."""
    missing = []
    if shutil.which(compiler()) is None:
        missing.append(f"the C++ compiler {compiler()!r} (Debian/Ubuntu: apt install g++; or set CXX to another one)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("the Python headers (Debian/Ubuntu: apt install python3-dev)")
    for module in ("ninja", "setuptools"):
        if importlib.util.find_spec(module) is None and shutil.which(module) is None:
            missing.append(f"{module} (pip install {module})")
    if missing:
        raise BuildError("The simulated NPU must be compiled once, and this machine lacks " + "; ".join(missing) + ".")


def _path_with_ninja() -> str:
    """PATH, so that torch finds `ninja`: that of pip's package is next to an interpreter that need not be on PATH."""
    path = os.environ.get("PATH", "")
    if shutil.which("ninja") is not None:
        return path
    import ninja

    return os.pathsep.join([str(ninja.BIN_DIR), path])


if __name__ == "__main__":
    _compile(Path(sys.argv[1]))
