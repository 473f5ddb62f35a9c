"""What every projector is: options that can be checked without weights, and a module that maps features to tokens."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from llava_npu.errors import UserError, nearest
from llava_npu.models.projectors.grid import Grid, as_grid, infer_grid, require_divisible

TowerShape = tuple[int, Grid]  # a tower's channels and (height, width) in patches


@dataclass(frozen=True)
class ProjectorOptions:
    """The options of one projector, and its geometry, which needs the options alone.

    Subclasses add fields, override `check` for limits on them, and answer `num_tokens`.
    """

    projector: ClassVar[str] = "projector"  # the registered name, for messages; set by `register`
    separate_towers: ClassVar[bool] = False  # takes two towers apart again, so that their grids may differ

    @classmethod
    def names(cls) -> list[str]:
        """The option names."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> typing.Self:
        """Checks names, types and limits.

        Raises:
            UserError: an option that this projector does not have, or a value it cannot take.
        """
        for name in options:
            if name not in cls.names():
                known = ", ".join(cls.names()) or "none"
                raise UserError(
                    f"Projector {cls.projector!r} has no option {name!r}.{nearest(name, cls.names())}"
                    f" Its options: {known}."
                )
        return cls(**options)

    @classmethod
    def grid_defaults(cls, grid: Grid, towers: Sequence[TowerShape] = ()) -> dict[str, Any]:
        """Option values that follow from the vision tower's patch grid, for options the user left out.

        Args:
            grid: (height, width); of two towers, what they have in common.
            towers: each tower.
        """
        return {}

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for name in self.names():
            value = getattr(self, name)
            if isinstance(value, list):  # YAML and JSON know no tuples
                value = tuple(value)
                object.__setattr__(self, name, value)
            if not _is_instance(value, hints[name]):
                raise self.error(name, f"must be {_describe(hints[name])}")
        self.check()

    def check(self) -> None:
        """Raises UserError for values out of range."""

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        """How many tokens the language model gets per image.

        Args:
            grid: patches, (height, width).
            special_tokens: class or register tokens that come with the patches; only projectors that do not need a grid
                accept them.
        """
        raise NotImplementedError

    def token_grid(self, grid: Grid) -> Grid | None:
        """(rows, columns) of the tokens for this patch grid; None if they have no places in the image."""
        return None

    def feature_layers(self, selected_layer: int) -> list[int]:
        """The encoder's hidden states to concatenate on channels, in this order."""
        return [selected_layer]

    def error(self, name: str, rule: str) -> UserError:
        """The error for option `name`, whose value breaks `rule`."""
        return UserError(f"Projector {self.projector!r}: {name}={getattr(self, name)!r}, but it {rule}.")

    def require_positive(self, *names: str) -> None:
        """Raises UserError unless each of these options is at least 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise self.error(name, "must be at least 1")

    def square_side(self, name: str) -> int:
        """The square root of option `name`, a number of tokens laid out as a square."""
        value: int = getattr(self, name)
        side = math.isqrt(value) if value > 0 else 0
        if value < 1 or side * side != value:
            options = [number * number for number in (side, side + 1) if number]
            raise self.error(name, f"must be a square number (nearest: {', '.join(map(str, options))})")
        return side

    def patches_only(self, grid: Grid, special_tokens: int) -> Grid:
        """Checks a grid for a projector that works on the map of patches."""
        if special_tokens:
            raise UserError(
                f"Projector {self.projector!r} works on the patch grid and cannot place {special_tokens} class or"
                " register token(s). Take patch tokens alone: `vision_select_feature: patch`."
            )
        return as_grid(grid)


@dataclass(frozen=True)
class TokenwiseOptions(ProjectorOptions):
    """Options of a projector that changes each token on its own."""

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        height, width = as_grid(grid)
        return height * width + special_tokens

    def token_grid(self, grid: Grid) -> Grid | None:
        return as_grid(grid)


@dataclass(frozen=True)
class BlockOptions(ProjectorOptions):
    """Options of a projector that makes one token of each block of patches.

    Attributes:
        scale_factor: side of the block; divides both sides of the grid.
    """

    scale_factor: int = 2

    def check(self) -> None:
        self.require_positive("scale_factor")

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        height, width = self.patches_only(grid, special_tokens)
        require_divisible((height, width), self.scale_factor, self.projector)
        return (height // self.scale_factor) * (width // self.scale_factor)

    def token_grid(self, grid: Grid) -> Grid | None:
        return grid[0] // self.scale_factor, grid[1] // self.scale_factor


@dataclass(frozen=True)
class SquareOptions(ProjectorOptions):
    """Options of a projector that gives a fixed number of tokens, laid out as a square.

    Attributes:
        num_queries: tokens out, a square number.
    """

    num_queries: int = 144

    def check(self) -> None:
        self.square_side("num_queries")

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        self.patches_only(grid, special_tokens)
        return self.num_queries

    def token_grid(self, grid: Grid) -> Grid | None:
        side = self.square_side("num_queries")
        return side, side


@dataclass(frozen=True)
class PositionedOptions(SquareOptions):
    """Options of a projector with a learned position for each patch, which gives a fixed square of tokens.

    Attributes:
        num_input_tokens: patches in; the default is CLIP-L's at 336 pixels.
        hidden_size: width inside.
    """

    num_input_tokens: int = 576
    hidden_size: int = 1024

    @classmethod
    def grid_defaults(cls, grid: Grid, towers: Sequence[TowerShape] = ()) -> dict[str, Any]:
        return {"num_input_tokens": grid[0] * grid[1]}

    def check(self) -> None:
        super().check()
        self.require_positive("hidden_size", "num_input_tokens")

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        height, width = self.patches_only(grid, special_tokens)
        if height * width != self.num_input_tokens:
            raise UserError(
                f"Projector {self.projector!r} has positions for num_input_tokens={self.num_input_tokens} patches; a"
                f" grid of {height}×{width} has {height * width}. Set num_input_tokens: {height * width}."
            )
        return self.num_queries


@dataclass(frozen=True)
class NestedOptions(ProjectorOptions):
    """Options of a projector that can give several numbers of tokens with the same weights.

    Attributes:
        tokens: how many come out where nothing else is said (`data.image_tokens` in training, `--image-tokens`
            afterwards); None: the most.
    """

    tokens: int | None = None

    def check(self) -> None:
        if self.tokens is not None:
            self.require_positive("tokens")

    def token_choices(self, grid: Grid) -> Sequence[int]:
        """All numbers of tokens that it can give for this patch grid, rising."""
        raise NotImplementedError

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        choices = self.token_choices(self.patches_only(grid, special_tokens))
        if self.tokens is None:
            return choices[-1]
        if self.tokens not in choices:
            can = f"1 to {choices[-1]}" if isinstance(choices, range) else ", ".join(map(str, choices))
            raise self.error("tokens", f"can give {can} for a grid of {grid[0]}×{grid[1]} patches")
        return self.tokens


@dataclass(frozen=True)
class PatchOptions(ProjectorOptions):
    """Options of a projector that makes one token of each patch, and takes no other tokens."""

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        height, width = self.patches_only(grid, special_tokens)
        return height * width

    def token_grid(self, grid: Grid) -> Grid | None:
        return grid


class Projector(nn.Module):
    """Maps the vision tower's features to the language model's tokens.

    Subclasses build their layers in `__init__` and implement `forward`. Every layer initialises itself on construction
    (`reset_parameters`), which is what ZeRO-3 and meta-device construction need.

    Attributes:
        options: the checked options.
        vision_hidden_size: channels of one layer of the vision tower.
        text_hidden_size: channels of the language model.
        input_channels: channels `forward` expects, `vision_hidden_size` times the number of feature layers.
        output_channels: channels `forward` returns.
    """

    options: ProjectorOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: ProjectorOptions) -> None:
        super().__init__()
        self.vision_hidden_size = vision_hidden_size
        self.text_hidden_size = text_hidden_size
        self.options = options
        self.input_channels = vision_hidden_size * len(options.feature_layers(-1))
        self.output_channels = text_hidden_size

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Projects.

        Args:
            features: (batch, tokens, input_channels); patch tokens in row-major order.
            grid: (height, width) of the patches; may be left out when they form a square.

        Returns:
            (batch, num_tokens(grid), output_channels).

        Raises:
            UserError: features or grid that this projector cannot take.
        """
        raise NotImplementedError

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        """How many tokens the language model gets per image with this patch grid, (height, width)."""
        return self.options.num_tokens(grid, special_tokens)

    def feature_layers(self, selected_layer: int) -> list[int]:
        """Which of the encoder's hidden states to concatenate on channels, in this order."""
        return self.options.feature_layers(selected_layer)

    def init_weights(self) -> None:
        """Initialises parameters and fixed tables, as the source of this projector does.

        For `PreTrainedModel._init_weights`: call it when the module is a `Projector`. Parameters are set through
        `torch.nn.init`, so those that transformers has marked as loaded are left alone; tables are always recomputed.
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    def check_channels(self, features: torch.Tensor) -> None:
        """Raises UserError unless features are (batch, tokens, input_channels)."""
        if features.ndim != 3 or features.shape[-1] != self.input_channels:
            layers = self.input_channels // self.vision_hidden_size
            source = f"{layers} layers of {self.vision_hidden_size}" if layers > 1 else "vision_hidden_size"
            raise UserError(
                f"Projector {self.options.projector!r} takes features of shape (batch, tokens, {self.input_channels}),"
                f" {self.input_channels} being {source}; got {tuple(features.shape)}."
            )

    def resolve_grid(self, features: torch.Tensor, grid: Grid | None) -> Grid:
        """The patch grid of these features, checked against their number and against what the projector can do."""
        self.check_channels(features)
        tokens = features.shape[1]
        resolved = infer_grid(tokens, self.options.projector) if grid is None else as_grid(grid)
        if resolved[0] * resolved[1] != tokens:
            raise UserError(
                f"Projector {self.options.projector!r}: a grid of {resolved[0]}×{resolved[1]} has"
                f" {resolved[0] * resolved[1]} patches, but the features hold {tokens} tokens."
            )
        self.num_tokens(resolved)
        return resolved


class NestedProjector(Projector):
    """A projector that gives several numbers of tokens with the same weights."""

    options: NestedOptions

    def forward(
        self, features: torch.Tensor, grid: Grid | None = None, counts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Projects, to the number of tokens that the options say or to each image's own.

        Args:
            features, grid: as for every projector.
            counts: how many tokens each image gets, of `NestedOptions.token_choices`.

        Returns:
            (batch, num_tokens(grid), text), or with `counts` the tokens of all images in a row: (sum(counts), text).
        """
        grid = self.resolve_grid(features, grid)
        if counts is None:
            return self.nested(features, grid, [self.num_tokens(grid)])[0]
        widths = sorted(set(counts))
        by_width = dict(zip(widths, self.nested(features, grid, widths), strict=True))
        return torch.cat([by_width[count][image] for image, count in enumerate(counts)])

    def nested(self, features: torch.Tensor, grid: Grid, widths: Sequence[int]) -> list[torch.Tensor]:
        """The tokens of all images at each of these numbers, which rise: (batch, width, text) each."""
        raise NotImplementedError


def load_weights(projector: Projector, state_dict: Mapping[str, torch.Tensor], source: str = "state dict") -> None:
    """Loads a state dict in this package's keys, all of it or nothing.

    Raises:
        UserError: missing or unexpected keys, or shapes that differ; each named, with both shapes.
    """
    expected = projector.state_dict()
    problems = [f"{key} is missing" for key in expected if key not in state_dict]
    problems += [f"{key} does not belong to it" for key in state_dict if key not in expected]
    problems += [
        f"{key} is {tuple(state_dict[key].shape)} there, {tuple(tensor.shape)} here"
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    if problems:
        raise UserError(
            f"{source} does not fit projector {projector.options.projector!r} ({projector.options},"
            f" vision_hidden_size={projector.vision_hidden_size}, text_hidden_size={projector.text_hidden_size}):\n  "
            + "\n  ".join(problems)
        )
    projector.load_state_dict(state_dict)


def _is_instance(value: object, hint: Any) -> bool:
    """isinstance for the hints options use: int, bool, None, unions of these, tuple[int, ...]."""
    if isinstance(hint, types.UnionType):
        return any(_is_instance(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_instance(item, typing.get_args(hint)[0]) for item in value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    """A type hint in a user's words."""
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list of whole numbers"
    return {int: "a whole number", bool: "true or false", types.NoneType: "null"}[hint]
