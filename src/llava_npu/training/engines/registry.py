"""Engines by name: registration, their options, what a run may ask of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from llava_npu.config import RunConfig, validate
from llava_npu.config.section import Section
from llava_npu.errors import UserError, nearest
from llava_npu.training.engines.base import Engine

_Class = TypeVar("_Class", bound=type[Engine])
_REGISTRY: dict[str, type[Engine]] = {}


def register(name: str) -> Callable[[_Class], _Class]:
    """Class decorator that makes an engine available as `engine: NAME`."""

    def add(engine: _Class) -> _Class:
        engine.name = name
        _REGISTRY[name] = engine
        return engine

    return add


def engines() -> list[type[Engine]]:
    """Every registered engine, in the order of registration."""
    return list(_REGISTRY.values())


def find_engine(name: str) -> type[Engine]:
    """The engine of this name.

    Raises:
        UserError: there is none.
    """
    if name not in _REGISTRY:
        raise UserError(f"engine: {name!r} does not exist.{nearest(name, _REGISTRY)} Engines: {', '.join(_REGISTRY)}.")
    return _REGISTRY[name]


def engine_options(name: str, options: Mapping[str, Any]) -> Section:
    """The checked options of an engine.

    Raises:
        UserError: an unknown engine or option, or a value that the option cannot have.
    """
    return validate(find_engine(name).options_class, options, f"engine_options of {name}")


def check_engine(config: RunConfig) -> None:
    """Raises `UserError` where a run asks its engine for what it cannot do."""
    engine = find_engine(config.engine)
    engine_options(config.engine, config.engine_options)
    others = ", ".join(each.name for each in engines() if each.keeps_whole_layers)
    if config.lora.base_bits is not None and not engine.keeps_whole_layers:
        raise UserError(
            f"lora.base_bits: weights in {config.lora.base_bits} bits cannot be sharded, and engine: {config.engine} "
            f"shards. Use engine: {others}, or lora.base_bits: null."
        )
    if config.compile and not engine.keeps_whole_layers:
        raise UserError(
            f"compile: compiled layers have not been tried with engine: {config.engine}. Use engine: {others}, or "
            "compile: null."
        )


def open_engine(config: RunConfig, accelerator: Accelerator, compute_dtype: torch.dtype | None) -> Engine:
    """The engine that a run asks for, in `processes.join`'s processes.

    Args:
        compute_dtype: 16-bit type to compute in; None: float32.

    Raises:
        UserError: the engine's library is missing.
    """
    options = engine_options(config.engine, config.engine_options)
    return find_engine(config.engine)(accelerator, compute_dtype, options, config.optimizer.max_grad_norm)
