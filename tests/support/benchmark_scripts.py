"""The programs of benchmarks/, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(_FOLDER))  # as when one is started: what several share is a module next to them


def load_benchmark(name: str) -> ModuleType:
    """`benchmarks/NAME.py`, executed again at each call."""
    spec = importlib.util.spec_from_file_location(f"benchmark_of_{name}", _FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module
