"""Catches CUDA calls in code that is meant to run on any device.

On a machine without CUDA many functions of torch.cuda do nothing, silently, and torch.autocast("cuda") only warns: code
that empties the wrong cache or seeds the wrong generator passes every test on another device. Once armed, such a call
from a file of the product raises. Calls by torch itself, transformers or accelerate are their business.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Questions that are asked to find out which devices exist.
HARMLESS = frozenset(
    {"is_available", "is_built", "is_initialized", "device_count", "is_bf16_supported", "is_tf32_supported"}
)

touched: list[str] = []  # every call caught, so that a test fails even where the error was swallowed

_product: str | None = None
_wrapped = False


class CudaTouchedError(AssertionError):
    """Product code called CUDA in a run on the simulated NPU."""


def arm(product: Path) -> None:
    """Raises CudaTouchedError, from now on, for CUDA calls made by files under the folder `product`."""
    global _product, _wrapped
    _product = str(product.resolve()) + "/"
    if not _wrapped:
        _wrap_everything()
        _wrapped = True


def disarm() -> None:
    global _product
    _product = None


def _wrap_everything() -> None:
    for name, function in vars(torch.cuda).items():
        public = not name.startswith("_") and name not in HARMLESS
        if public and inspect.isfunction(function) and function.__module__.startswith("torch.cuda"):
            setattr(torch.cuda, name, _guarded(function, f"torch.cuda.{name}"))

    _guard_method(torch.Tensor, "cuda", "Tensor.cuda")
    _guard_method(torch.nn.Module, "cuda", "Module.cuda")
    _guard_method(torch.amp.autocast, "__init__", 'torch.autocast("cuda")', device_argument="device_type")
    _guard_method(torch.cuda.amp.autocast, "__init__", "torch.cuda.amp.autocast")
    _guard_method(torch.amp.GradScaler, "__init__", 'torch.amp.GradScaler("cuda")', device_argument="device")
    _guard_method(torch.cuda.amp.GradScaler, "__init__", "torch.cuda.amp.GradScaler")


def _guard_method(owner: type, method: str, what: str, device_argument: str | None = None) -> None:
    setattr(owner, method, _guarded(getattr(owner, method), what, device_argument))


def _guarded(function: Callable[..., Any], what: str, device_argument: str | None = None) -> Callable[..., Any]:
    """`function`, refusing callers in the product; with `device_argument`, only when that argument names CUDA."""
    signature = inspect.signature(function) if device_argument else None

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if _product is not None:
            caller = sys._getframe(1)
            if caller.f_code.co_filename.startswith(_product):
                names_cuda = True
                if signature is not None and device_argument is not None:
                    bound = signature.bind(*args, **kwargs)
                    bound.apply_defaults()
                    names_cuda = str(bound.arguments[device_argument]).startswith("cuda")
                if names_cuda:
                    touch = f"{caller.f_code.co_filename}:{caller.f_lineno}: {what} in a run on the simulated NPU"
                    touched.append(touch)
                    raise CudaTouchedError(touch)
        return function(*args, **kwargs)

    return guarded
