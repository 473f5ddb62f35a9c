"""Projector weights between this package's parameter names and those of official LLaVA and of LLaVA-NPU of 2024.

Layouts:
    LLAVA: haotian-liu/LLaVA (`linear`, `mlp{N}x_gelu`, `identity`).
    LLAVA_NPU_2024: zkyredstart/LLaVA-NPU, this project's predecessor, which has projectors of MobileVLM, TokenPacker,
        OmniLMM and Honeybee under their authors' names, except in attention.

State dicts of either side are relative to the projector; the prefixes of whole checkpoints are removed on reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llava_npu.errors import UserError
from llava_npu.models.projectors import build_projector, registered_name
from llava_npu.models.projectors.positions import sincos_table

StateDict = dict[str, torch.Tensor]
Pairs = tuple[tuple[str, str], ...]  # (ours, theirs): module paths or parameter names

MLP = "mlp{N}x_gelu"
MAX_DEPTH = 64  # more layers or blocks than any projector has; names are listed up to here
TABLE_TOLERANCE = 4e-3  # sine-cosine tables stored in bfloat16 are off by up to 2e-3


@dataclass(frozen=True)
class Layout:
    """How one project names its projectors' parameters.

    Attributes:
        project: for messages.
        names: for each projector, pairs (ours, theirs) of module paths or parameter names.
        splits_attention: into one layer each for queries, keys and values, and an output projection that its code
            never applies.
    """

    project: str
    names: Mapping[str, Pairs]
    splits_attention: bool = False


def _sequential(ours: str, theirs: str, depth: int = 2, first: int = 0) -> Pairs:
    """Linear layers of an `nn.Sequential` with an activation between each two."""
    return tuple((f"{ours}linear_{number + 1}", f"{theirs}{first + 2 * number}") for number in range(depth))


def _same(*names: str) -> Pairs:
    return tuple((name, name) for name in names)


def _c_abstractor() -> Pairs:
    pairs = [("pos_emb", "pos_emb"), *_sequential("readout.", "readout.")]
    for stage, index in (("stage_1", 0), ("stage_2", 2)):
        for block in range(MAX_DEPTH):
            ours, theirs = f"{stage}.{block}.", f"net.{index}.b{block + 1}."
            for number in (1, 2, 3):
                pairs.append((f"{ours}conv_{number}", f"{theirs}conv{number}.conv"))
                pairs.append((f"{ours}norm_{number}", f"{theirs}conv{number}.bn"))
            pairs.append((f"{ours}squeeze_excite", f"{theirs}se"))
            pairs.append((f"{ours}shortcut.0", f"{theirs}downsample.conv"))
            pairs.append((f"{ours}shortcut.1", f"{theirs}downsample.bn"))
    return tuple(pairs)


def _ldp() -> Pairs:
    pairs = list(_sequential("mlp.", "model.mlp.", first=1))
    for number in (1, 2):
        ours, theirs = f"block_{number}.", f"model.mb_block.{number}.block."
        pairs += [
            (f"{ours}depthwise", f"{theirs}0.0"),
            (f"{ours}depthwise_norm", f"{theirs}0.1"),
            (f"{ours}squeeze_excite", f"{theirs}1"),
            (f"{ours}pointwise", f"{theirs}2.0"),
            (f"{ours}pointwise_norm", f"{theirs}2.1"),
        ]
    return tuple(pairs)


_LINEAR = (("linear_1.weight", "weight"), ("linear_1.bias", "bias"))
_LDPV2 = (*_sequential("mlp.", "mlp.mlp."), ("peg", "peg.peg.0"))
_RESAMPLER = _same("query", "pos_embed", "kv_proj", "ln_q", "ln_kv", "attn", "ln_post", "proj")
_TOKENPACKER = (
    ("q_proj", "q_proj_1"),
    *_sequential("k_proj.", "k_proj_1."),
    *_sequential("v_proj.", "v_proj_1."),
    ("ln_q", "ln_q_1"),
    ("ln_k", "ln_k_1"),
    ("ln_v", "ln_v_1"),
    ("attn", "clip_attn"),
    *_sequential("mlp.", "mlp."),
)
_LLAVA = {"linear": _LINEAR, MLP: _sequential("", "", MAX_DEPTH), "identity": ()}
_PREFIXES = ("base_model.model.model.mm_projector.", "model.mm_projector.", "mm_projector.")

LLAVA = Layout("official LLaVA", _LLAVA)
LLAVA_NPU_2024 = Layout(
    "LLaVA-NPU of 2024",
    {
        **_LLAVA,
        "ldp": _ldp(),
        "ldpv2": _LDPV2,
        "resampler": _RESAMPLER,
        "tokenpacker": _TOKENPACKER,
        "c_abstractor": _c_abstractor(),
    },
    splits_attention=True,
)


def from_original(
    type: str, layout: Layout, state_dict: Mapping[str, torch.Tensor], *, output_projection: bool = False
) -> StateDict:
    """Converts an original project's projector weights to this package's names: all of them, or an error.

    A stored position table is dropped, since it follows from the options; one that has been trained is kept, for
    `learned_positions=True` (see `infer_options`).

    Args:
        type: projector type.
        layout: where the weights come from.
        state_dict: the original weights; a checkpoint's prefix before every key is removed.
        output_projection: for `LLAVA_NPU_2024`, whose attention declares an output projection and never applies it.
            False drops those weights, to compute what it computed (`output_projection=False` in the projector); True
            keeps them, to compute what the original papers do.

    Raises:
        UserError: unknown type, missing or unexpected keys, shapes that fit no projector.
    """
    family = registered_name(type)
    original = _without_prefix(state_dict)
    names = _names(family, layout)
    source = f"{layout.project}'s weights for {type!r}"
    if layout.splits_attention:
        original = _pack_attention(original, output_projection, source)

    converted = _renamed(original, {theirs: ours for ours, theirs in names}, source)
    if family == "resampler":
        converted = _without_fixed_table(converted)
    _check(type, family, converted, dict(names), source)
    return converted


def to_original(
    type: str, layout: Layout, state_dict: Mapping[str, torch.Tensor], *, output_projection: bool = False
) -> StateDict:
    """Converts this package's projector weights to an original project's names; inverse of `from_original`.

    The resampler's position table is added. Where the original has an output projection and ours does not, it becomes
    the identity, which computes the same. Keys are relative to the projector, without a checkpoint's prefix.

    Args:
        type, layout: as in `from_original`.
        state_dict: this package's weights, relative to the projector.
        output_projection: for `LLAVA_NPU_2024`: True writes a trained output projection, although that project's own
            code never applies it; False refuses to.

    Raises:
        UserError: unknown type, missing or unexpected keys, shapes that fit no projector, a trained output
            projection that the original would ignore.
    """
    family = registered_name(type)
    names = dict(_names(family, layout))
    ours = dict(state_dict)
    source = f"{type!r} weights for {layout.project}"
    _check(type, family, ours, {}, source)
    if layout.splits_attention and "attn.out_proj.weight" in ours and not output_projection:
        raise UserError(
            f"{source}: {layout.project} never applies attn.out_proj, so the model would compute something else there."
            f" Train with output_projection: false, or pass output_projection=True to write the weights regardless."
        )
    if family == "resampler" and "pos_embed" not in ours:
        ours["pos_embed"] = _fixed_table(ours["query"])
    if "attn.in_proj_weight" in ours and "attn.out_proj.weight" not in ours:
        bias = ours["attn.in_proj_bias"]
        width = bias.shape[0] // 3
        ours["attn.out_proj.weight"] = torch.eye(width, dtype=bias.dtype, device=bias.device)
        ours["attn.out_proj.bias"] = bias.new_zeros(width)

    converted = _renamed(ours, names, source)
    return _unpack_attention(converted) if layout.splits_attention else converted


def infer_options(type: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What weights in this package's names say about the projector's options.

    They do not show how many tokens a pooling projector gives, blocks' scale or the number of heads.
    """
    arguments = _arguments(registered_name(type), dict(state_dict), {}, "state dict")
    sizes = ("vision_hidden_size", "text_hidden_size")
    return {name: value for name, value in arguments.items() if name not in sizes}


def type_from_original(layout: Layout, name: str) -> str:
    """The projector type that an original project's config means by `name`.

    It matters for `LLAVA_NPU_2024`, whose `ldp` is MobileVLM's second version, and which looks for parts of names.
    """
    if layout is LLAVA_NPU_2024:
        if "abs" in name:
            return "c_abstractor"
        if "resampler" in name:
            return "resampler"
        if name == "ldp":
            return "ldpv2"
    registered_name(name)
    return name


def _names(family: str, layout: Layout) -> Pairs:
    if family not in layout.names:
        raise UserError(f"{layout.project} has no projector {family!r}, only {', '.join(layout.names)}.")
    return layout.names[family]


def _rename(key: str, names: Mapping[str, str]) -> str | None:
    """`key` with its longest known leading path replaced; None if no part of it is known."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        path = ".".join(parts[:length])
        if path in names:
            return ".".join([names[path], *parts[length:]])
    return None


def _renamed(state_dict: StateDict, names: Mapping[str, str], source: str) -> StateDict:
    """The weights under their other names; UserError for a name that the projector does not have."""
    renamed = {key: _rename(key, names) for key in state_dict}
    unexpected = [key for key, new in renamed.items() if new is None]
    if unexpected:
        raise UserError(f"{source}: unexpected {', '.join(unexpected)}. Nothing was converted.")
    return {new: state_dict[key] for key, new in renamed.items() if new is not None}


def _without_prefix(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    for prefix in _PREFIXES:
        if state_dict and all(key.startswith(prefix) for key in state_dict):
            return {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}
    return dict(state_dict)


def _pack_attention(original: StateDict, output_projection: bool, source: str) -> StateDict:
    """LLaVA-NPU's separate query, key and value layers as one, in the names of `nn.MultiheadAttention`."""
    packed = {key: tensor for key, tensor in original.items() if ".linear_layers." not in key}
    for owner in sorted({key.split(".linear_layers.")[0] for key in original if ".linear_layers." in key}):
        for kind in ("weight", "bias"):
            keys = [f"{owner}.linear_layers.{index}.{kind}" for index in range(3)]
            missing = [key for key in keys if key not in original]
            if missing:
                raise UserError(f"{source}: missing {', '.join(missing)}. Nothing was converted.")
            packed[f"{owner}.in_proj_{kind}"] = torch.cat([original[key] for key in keys])
    if output_projection:
        return {key.replace(".output_linear.", ".out_proj."): tensor for key, tensor in packed.items()}
    return {key: tensor for key, tensor in packed.items() if ".output_linear." not in key}


def _unpack_attention(packed: StateDict) -> StateDict:
    """Inverse of `_pack_attention`."""
    original: StateDict = {}
    for key, tensor in packed.items():
        owner, separator, kind = key.partition(".in_proj_")
        if separator:
            for index, part in enumerate(tensor.chunk(3)):
                original[f"{owner}.linear_layers.{index}.{kind}"] = part.clone()
        else:
            original[key.replace(".out_proj.", ".output_linear.")] = tensor
    return original


def _fixed_table(query: torch.Tensor) -> torch.Tensor:
    queries, channels = query.shape
    return sincos_table(math.isqrt(queries), channels).to(query)


def _without_fixed_table(converted: StateDict) -> StateDict:
    table, query = converted.get("pos_embed"), converted.get("query")
    if table is None or query is None or table.shape != query.shape or math.isqrt(len(query)) ** 2 != len(query):
        return converted
    if (table.double() - _fixed_table(query.double()).to(table.device)).abs().max() > TABLE_TOLERANCE:
        return converted
    return {key: tensor for key, tensor in converted.items() if key != "pos_embed"}


def _check(type: str, family: str, converted: StateDict, names: Mapping[str, str], source: str) -> None:
    """Raises UserError unless the weights are exactly those of one projector; names keys through `names`."""
    if family == "identity":  # no weights: names were checked already
        return
    arguments = _arguments(family, converted, names, source)
    with torch.device("meta"):
        expected = build_projector(type, **arguments).state_dict()
    problems = [f"missing {_rename(key, names) or key}" for key in expected if key not in converted]
    problems += [f"unexpected {_rename(key, names) or key}" for key in converted if key not in expected]
    problems += [
        f"{_rename(key, names) or key} is {tuple(converted[key].shape)}, but the others call for {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in converted and converted[key].shape != tensor.shape
    ]
    if problems:
        raise UserError(f"{source}: {'; '.join(problems)}. Nothing was converted.")


def _arguments(family: str, weights: StateDict, names: Mapping[str, str], source: str) -> dict[str, Any]:
    """Arguments of `build_projector` that fit the weights, in our names."""

    def shape(key: str, dimensions: int = 2) -> torch.Size:
        if key not in weights:
            raise UserError(f"{source}: missing {_rename(key, names) or key}. Nothing was converted.")
        if weights[key].ndim != dimensions:
            raise UserError(
                f"{source}: {_rename(key, names) or key} is {tuple(weights[key].shape)}; this projector's has"
                f" {dimensions} dimensions. Nothing was converted."
            )
        return weights[key].shape

    def count(template: str) -> int:
        return sum(template.format(number) in weights for number in range(MAX_DEPTH + 1))

    if family in ("linear", MLP):
        text, vision = shape("linear_1.weight")
        options: dict[str, Any] = {"bias": "linear_1.bias" in weights}
        if family == MLP:
            options["depth"] = count("linear_{}.weight")
    elif family in ("ldp", "ldpv2"):
        text, vision = shape("mlp.linear_1.weight")
        options = {}
    elif family == "resampler":
        queries, text = shape("query")
        vision = shape("kv_proj.weight")[1] if "kv_proj.weight" in weights else text
        options = {
            "num_queries": queries,
            "output_projection": "attn.out_proj.weight" in weights,
            "learned_positions": "pos_embed" in weights,
        }
    elif family == "tokenpacker":
        vision, text = shape("q_proj.weight")[1], shape("mlp.linear_1.weight")[0]
        options = {"output_projection": "attn.out_proj.weight" in weights}
    else:
        _, patches, vision = shape("pos_emb", 3)
        text, readout = shape("readout.linear_1.weight")
        options = {
            "hidden_size": readout,
            "num_input_tokens": patches,
            "depth": count("stage_1.{}.conv_1.weight"),
        }
    return {"vision_hidden_size": vision, "text_hidden_size": text, **options}
