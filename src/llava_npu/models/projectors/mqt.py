"""Matryoshka Query Transformer: a resampler whose first m queries are a projector of m tokens (Hu et al. 2024).

arXiv:2405.19315; gordonhu608/MQT-LLaVA, `multimodal_projector/builder.py` at 92c35d0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llava_npu.errors import UserError
from llava_npu.models.projectors.attention import CrossAttention, default_heads
from llava_npu.models.projectors.base import NestedOptions, NestedProjector
from llava_npu.models.projectors.grid import Grid
from llava_npu.models.projectors.positions import resize_table, sincos_table
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class MqtOptions(NestedOptions):
    """Options of `mqt`.

    Attributes:
        num_queries: queries, a square number: the most tokens out.
        tokens: how many of them are used, from the first; None: all.
        num_heads: attention heads; by default as many as make heads of 64 channels, or the next larger size that
            divides the vision tower's width.
    """

    num_queries: int = 256
    num_heads: int | None = None

    def check(self) -> None:
        super().check()
        self.square_side("num_queries")
        if self.num_heads is not None:
            self.require_positive("num_heads")

    def token_choices(self, grid: Grid) -> Sequence[int]:
        return range(1, self.num_queries + 1)


@register("mqt", MqtOptions, aliases=("matry_query", "matryoshka_query", "mqt_llava"))
class MqtProjector(NestedProjector):
    """Learned queries attend once to the patches; the first `tokens` of them are the output.

    y = Attention(LN(query + P), LN(P′), LN(x)) · proj, with P the sine-cosine positions of the queries' own grid and P′
    the same table resized to the patches' grid. Keys are positions alone, so where a query looks depends on places, not
    on the image: so it is in the authors' code. No query sees another: the first m outputs are those of m queries.
    """

    options: MqtOptions
    pos_embed: torch.Tensor

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: MqtOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        width = vision_hidden_size
        if width % 4:
            raise UserError(
                f"Projector 'mqt' splits its width in four for the position table; vision_hidden_size {width} is not a"
                " multiple of 4. Take a tower whose width is."
            )
        num_heads = options.num_heads or default_heads(width, 64)
        if width % num_heads:
            raise options.error("num_heads", f"must divide vision_hidden_size {width}")
        self.side = options.square_side("num_queries")
        self.query = nn.Parameter(torch.empty(options.num_queries, width))
        self.register_buffer("pos_embed", torch.empty(options.num_queries, width), persistent=False)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_k = nn.LayerNorm(width, eps=1e-6)
        self.ln_v = nn.LayerNorm(width, eps=1e-6)
        self.attn = CrossAttention(width, num_heads)
        self.proj = nn.Parameter(torch.empty(width, text_hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what this module itself holds."""
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.normal_(self.proj, std=self.text_hidden_size**-0.5)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_table(self.side, self.vision_hidden_size))

    def nested(self, features: torch.Tensor, grid: Grid, widths: Sequence[int]) -> list[torch.Tensor]:
        most = widths[-1]
        queries = self.ln_q(self.query[:most] + self.pos_embed[:most].to(self.query.dtype))  # (most, vision)
        keys = self.ln_k(resize_table(self.pos_embed, self.side, grid).to(self.query.dtype))  # (patches, vision)
        attended = self.attn(queries.unsqueeze(0), keys.unsqueeze(0), self.ln_v(features))
        tokens = attended @ self.proj  # (batch, most, text)
        return [tokens[:, :width] for width in widths]
