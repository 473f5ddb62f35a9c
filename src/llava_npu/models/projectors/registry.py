"""Projectors by name: registration, the names other projects use, construction."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava_npu.errors import UserError, nearest
from llava_npu.models.projectors.base import Projector, ProjectorOptions, TowerShape
from llava_npu.models.projectors.grid import Grid, as_grid


@dataclass(frozen=True)
class Registration:
    """One projector of the registry.

    Attributes:
        name: the type to write in a config.
        module: the `Projector` class.
        options: its options class.
        aliases: names that other projects use for it.
        pattern: for families such as `mlp{N}x_gelu`, a regular expression whose named groups are whole-number options.
    """

    name: str
    module: type[Projector]
    options: type[ProjectorOptions]
    aliases: tuple[str, ...] = ()
    pattern: str | None = None


_REGISTRY: dict[str, Registration] = {}


def register(
    name: str, options: type[ProjectorOptions], aliases: tuple[str, ...] = (), pattern: str | None = None
) -> Callable[[type[Projector]], type[Projector]]:
    """Class decorator that makes a projector available as `name`."""

    def add(module: type[Projector]) -> type[Projector]:
        options.projector = name
        _REGISTRY[name] = Registration(name, module, options, aliases, pattern)
        return module

    return add


def registrations() -> list[Registration]:
    """Every registered projector, by name."""
    return [_REGISTRY[name] for name in sorted(_REGISTRY)]


def available() -> list[str]:
    """The names to write in a config, sorted."""
    return sorted(_REGISTRY)


def canonical_type(type: str) -> str:
    """The name under which this package knows a projector type: `ldpnetv2` → `ldpv2`, `mlp` → `mlp2x_gelu`.

    Raises:
        UserError: unknown type.
    """
    registration, implied = _find(type)
    return _plain(type) if implied else _default_name(registration)


def registered_name(type: str) -> str:
    """The name of a type's registration: `mlp3x_gelu` → `mlp{N}x_gelu`, `cabs` → `c_abstractor`.

    Raises:
        UserError: unknown type.
    """
    return _find(type)[0].name


def make_options(type: str, **options: Any) -> ProjectorOptions:
    """The checked options of a projector type.

    Raises:
        UserError: unknown type, unknown option, or a value it cannot take.
    """
    return _parse(type, options)[1]


def build_projector(type: str, *, vision_hidden_size: int, text_hidden_size: int, **options: Any) -> Projector:
    """Builds a projector with freshly initialised weights.

    Args:
        type: a registered name or one that other projects use: `mlp2x_gelu`, `ldpv2`, `resampler`, …
        vision_hidden_size: channels of one layer of the vision tower.
        text_hidden_size: channels of the language model.
        **options: the projector's options; see its options class.

    Raises:
        UserError: unknown type, unknown option, or a value it cannot take.
    """
    registration, checked = _parse(type, options)
    for name, size in (("vision_hidden_size", vision_hidden_size), ("text_hidden_size", text_hidden_size)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"Projector {type!r}: {name} must be a positive whole number; got {size!r}.")
    return registration.module(vision_hidden_size, text_hidden_size, checked)


def num_tokens(type: str, grid: Grid, *, special_tokens: int = 0, **options: Any) -> int:
    """Tokens per image that a projector gives for a patch grid (height, width); needs no weights."""
    return make_options(type, **options).num_tokens(grid, special_tokens)


def token_grid(type: str, grid: Grid, **options: Any) -> Grid | None:
    """(rows, columns) of a projector's tokens for a patch grid; None if they have no places in the image."""
    return make_options(type, **options).token_grid(as_grid(grid))


def feature_layers(type: str, selected_layer: int, **options: Any) -> list[int]:
    """The encoder's hidden states that a projector takes, in the order to concatenate them; needs no weights."""
    return make_options(type, **options).feature_layers(selected_layer)


def grid_defaults(type: str, grid: Grid, towers: Sequence[TowerShape] = ()) -> dict[str, Any]:
    """Option values that follow from the tower's patch grid: `{**grid_defaults(type, grid), **user_options}`.

    Args:
        type: a projector.
        grid: (height, width); of two towers, what they have in common.
        towers: each tower, where there are two.
    """
    return _find(type)[0].options.grid_defaults(as_grid(grid), towers)


def _parse(type: str, options: dict[str, Any]) -> tuple[Registration, ProjectorOptions]:
    registration, implied = _find(type)
    for name, value in implied.items():
        if options.get(name, value) != value:
            raise UserError(f"Projector type {type!r} already says {name}={value}; got {name}={options[name]!r}.")
    return registration, registration.options.from_dict({**options, **implied})


def _find(type: str) -> tuple[Registration, dict[str, int]]:
    """The registration of a type, and the options its name implies (`mlp3x_gelu`: depth 3)."""
    plain = _plain(type) if isinstance(type, str) else ""
    for registration in _REGISTRY.values():
        if registration.pattern and (match := re.fullmatch(registration.pattern, plain)):
            return registration, {name: int(number) for name, number in match.groupdict().items()}
        if plain in (registration.name, *registration.aliases):
            return registration, {}
    names = [name for entry in registrations() for name in (_default_name(entry), *entry.aliases)]
    raise UserError(f"Unknown projector type {type!r}.{nearest(plain, names)} Available: {', '.join(available())}.")


def _plain(type: str) -> str:
    return type.strip().lower().replace("-", "_")


def _default_name(registration: Registration) -> str:
    """`mlp{N}x_gelu` is written with its default number."""
    return re.sub(r"\{\w+\}", "2", registration.name)
