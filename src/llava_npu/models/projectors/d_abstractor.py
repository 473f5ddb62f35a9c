"""D-Abstractor of Honeybee: queries that sample the patches around points of their own (Cha et al. 2023).

arXiv:2312.06742; khanrc/honeybee, `dabs.py` at 68a8d84. Its layers are those of Deformable DETR's decoder (Zhu et al.
2020, arXiv:2010.04159), in transformers' implementation (`DeformableDetrDecoderLayer`). Dropout, which Honeybee trains
with, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llava_npu.models.projectors.base import PositionedOptions, Projector
from llava_npu.models.projectors.grid import Grid, average_pool, to_map, to_tokens
from llava_npu.models.projectors.layers import init_linear_and_norm
from llava_npu.models.projectors.registry import register

_STD = 0.02  # Honeybee's initialisation


@dataclass(frozen=True)
class DAbstractorOptions(PositionedOptions):
    """Options of `d_abstractor`; the defaults are Honeybee's geometry for CLIP-L at 336 pixels.

    Attributes:
        hidden_size: width of the layers.
        num_queries: tokens out, a square number.
        num_input_tokens: patches in, one learned position each.
        num_layers: decoder layers.
        num_heads: attention heads; divides `hidden_size`.
        num_points: places that each head of a query samples.
        feed_forward_size: width inside the layers' feed-forward part.
    """

    num_layers: int = 6
    num_heads: int = 8
    num_points: int = 4
    feed_forward_size: int = 1024

    def check(self) -> None:
        super().check()
        self.require_positive("num_layers", "num_heads", "num_points", "feed_forward_size")
        if self.hidden_size % self.num_heads:
            raise self.error("num_heads", f"must divide hidden_size {self.hidden_size}")


@register("d_abstractor", DAbstractorOptions, aliases=("d_abs", "dabs", "dabstractor", "deformable_abstractor"))
class DAbstractorProjector(Projector):
    """Learned queries through decoder layers of self-attention, deformable attention to the patches, and feed-forward.

    The pooled patches are the queries' positions; each query's reference point is learned too, and starts on a square
    of places spread over the image. Sampling is computed in float32 whatever the model's type, as in Honeybee.
    """

    options: DAbstractorOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: DAbstractorOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        width = options.hidden_size
        self.side = options.square_side("num_queries")
        self.input_proj = nn.Identity() if width == vision_hidden_size else nn.Linear(vision_hidden_size, width)
        self.pos_emb = nn.Parameter(torch.empty(1, options.num_input_tokens, width))
        self.query = nn.Parameter(torch.empty(options.num_queries, width))
        self.reference_points = nn.Parameter(torch.empty(1, options.num_queries, 2))
        self.layers = nn.ModuleList(_decoder_layers(options))
        self.output_proj = nn.Identity() if width == text_hidden_size else nn.Linear(width, text_hidden_size)
        self.init_weights()

    def init_weights(self) -> None:
        init_linear_and_norm(self, _STD)
        nn.init.normal_(self.query, std=_STD)
        nn.init.trunc_normal_(self.pos_emb, std=_STD)
        if not getattr(self.reference_points, "_is_hf_initialized", False):  # transformers' mark of a loaded parameter
            with torch.no_grad():
                self.reference_points.copy_(_reference_points(self.side, self.options.num_input_tokens))

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        grid = self.resolve_grid(features, grid)
        patches = self.input_proj(features) + self.pos_emb  # (batch, patches, width)
        positions = to_tokens(average_pool(to_map(patches, grid), (self.side, self.side)))  # (batch, queries, width)
        hidden = self.query.expand(len(features), -1, -1).to(patches.dtype)
        # (batch, queries, one level, (x, y)), in parts of the image's sides; float32, as all places that come of them
        places = self.reference_points[:, :, None].to(torch.promote_types(self.reference_points.dtype, torch.float32))
        shape = torch.stack([places.new_full((), side) for side in grid])[None]  # nothing to copy from the host
        for layer in self.layers:
            hidden = layer(
                hidden,
                positions,
                places.expand(len(features), -1, -1, -1),
                spatial_shapes=shape,
                spatial_shapes_list=[grid],
                encoder_hidden_states=patches,
            )
        return self.output_proj(hidden)  # (batch, num_queries, text)


def _decoder_layers(options: DAbstractorOptions) -> list[nn.Module]:
    from transformers import DeformableDetrConfig  # here: the other projectors need no transformers
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoderLayer

    config = DeformableDetrConfig(
        d_model=options.hidden_size,
        decoder_attention_heads=options.num_heads,
        decoder_n_points=options.num_points,
        decoder_ffn_dim=options.feed_forward_size,
        num_feature_levels=1,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        attn_implementation="sdpa",
    )
    layers = [DeformableDetrDecoderLayer(config) for _ in range(options.num_layers)]
    for layer in layers:
        layer.encoder_attn.attn = _Float32Sampling(layer.encoder_attn.attn)
    return layers


class _Float32Sampling(nn.Module):
    """Deformable DETR's sampling in at least float32: bfloat16's steps are too coarse for places in an image."""

    def __init__(self, sampling: nn.Module) -> None:
        super().__init__()
        self.sampling = sampling

    def forward(self, values: torch.Tensor, *others: Any) -> torch.Tensor:
        *shapes_and_places, weights, step = others
        dtype = torch.promote_types(values.dtype, torch.float32)
        return self.sampling(values.to(dtype), *shapes_and_places, weights.to(dtype), step).to(values.dtype)


def _reference_points(side: int, num_input_tokens: int) -> torch.Tensor:
    """Where the queries begin to look: (1, side², (x, y)), from the first patch's centre to the last one's."""
    patches = num_input_tokens**0.5
    steps = torch.linspace(0.5, patches - 0.5, side) / patches
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([columns, rows], dim=-1).reshape(1, side * side, 2)
