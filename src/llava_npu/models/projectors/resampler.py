"""Perceiver resampler of the Qwen-VL family (Bai et al. 2023, arXiv:2308.12966; OpenBMB/OmniLMM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llava_npu.errors import UserError
from llava_npu.models.projectors.attention import CrossAttention, default_heads
from llava_npu.models.projectors.base import Projector, ProjectorOptions
from llava_npu.models.projectors.grid import Grid
from llava_npu.models.projectors.layers import TruncNormalLinear
from llava_npu.models.projectors.positions import resize_table, sincos_table
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class ResamplerOptions(ProjectorOptions):
    """Options of `resampler`.

    Attributes:
        num_queries: tokens out, a square number.
        num_heads: attention heads; by default as many as make heads of 128 channels, or the next larger size that
            divides the width.
        output_projection: whether attention ends in its output projection. It does in Qwen-VL and OmniLMM; LLaVA-NPU of
            2024 declared one and never applied it.
        learned_positions: whether the position table is a trained parameter instead of the fixed sine-cosine table.
            Checkpoints of LLaVA-NPU of 2024 need it, since its first stage trained the table.
    """

    num_queries: int = 144
    num_heads: int | None = None
    output_projection: bool = True
    learned_positions: bool = False

    def check(self) -> None:
        self.square_side("num_queries")
        if self.num_heads is not None:
            self.require_positive("num_heads")

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        self.patches_only(grid, special_tokens)
        return self.num_queries


@register("resampler", ResamplerOptions, aliases=("qwen_resampler", "qwen_vl_resampler", "perceiver_resampler"))
class ResamplerProjector(Projector):
    """Learned queries attend once to the patches, both with two-dimensional positions; then norm and projection.

    kv = LN(W·x); y = LN(Attention(LN(query) + P, kv + P′, kv)) · proj, with P the positions of the queries' own grid
    and P′ the same table resized to the patches' grid.
    """

    options: ResamplerOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: ResamplerOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        if text_hidden_size % 4:
            raise UserError(
                f"Projector 'resampler' splits its width in four for the position table; text_hidden_size"
                f" {text_hidden_size} is not a multiple of 4."
            )
        num_heads = options.num_heads or default_heads(text_hidden_size, 128)
        if text_hidden_size % num_heads:
            raise options.error("num_heads", f"must divide text_hidden_size {text_hidden_size}")
        self.side = options.square_side("num_queries")
        self.query = nn.Parameter(torch.empty(options.num_queries, text_hidden_size))
        if options.learned_positions:
            self.pos_embed = nn.Parameter(torch.empty(options.num_queries, text_hidden_size))
        else:
            # Not in the state dict: it follows from the options, and sharded loaders expect parameters alone there.
            self.register_buffer("pos_embed", torch.empty(options.num_queries, text_hidden_size), persistent=False)
        self.kv_proj = (
            nn.Identity()
            if vision_hidden_size == text_hidden_size
            else TruncNormalLinear(vision_hidden_size, text_hidden_size, bias=False)
        )
        self.ln_q = nn.LayerNorm(text_hidden_size, eps=1e-6)
        self.ln_kv = nn.LayerNorm(text_hidden_size, eps=1e-6)
        self.attn = CrossAttention(text_hidden_size, num_heads, options.output_projection)
        self.ln_post = nn.LayerNorm(text_hidden_size, eps=1e-6)
        self.proj = nn.Parameter(torch.empty(text_hidden_size, text_hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what this module itself holds."""
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.normal_(self.proj, std=self.text_hidden_size**-0.5)
        if not getattr(self.pos_embed, "_is_hf_initialized", False):  # transformers' mark of a loaded parameter
            with torch.no_grad():
                self.pos_embed.copy_(sincos_table(self.side, self.text_hidden_size))

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        grid = self.resolve_grid(features, grid)
        values = self.ln_kv(self.kv_proj(features))  # (batch, patches, text)
        queries = self.ln_q(self.query)  # (num_queries, text)
        query_positions = self.pos_embed.to(queries.dtype)
        key_positions = resize_table(self.pos_embed, self.side, grid).to(values.dtype)  # (patches, text)
        attended = self.attn((queries + query_positions).unsqueeze(0), values + key_positions, values)
        return self.ln_post(attended) @ self.proj  # (batch, num_queries, text)
