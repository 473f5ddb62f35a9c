"""Q-Former of BLIP-2 (Li et al. 2023, arXiv:2301.12597): a BERT whose learned queries attend to the patches.

Its layers are transformers' (`Blip2QFormerEncoder`); here they get queries, the first norm and the projection around
them, as `Blip2ForConditionalGeneration` has them. Dropout, which BLIP-2 trains with, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llava_npu.models.projectors.attention import default_heads
from llava_npu.models.projectors.base import Projector, ProjectorOptions
from llava_npu.models.projectors.grid import Grid
from llava_npu.models.projectors.layers import init_linear_and_norm
from llava_npu.models.projectors.registry import register

_STD = 0.02  # BERT's initializer_range


@dataclass(frozen=True)
class QFormerOptions(ProjectorOptions):
    """Options of `qformer`; the defaults are BLIP-2's.

    Attributes:
        num_queries: tokens out.
        hidden_size: width of the queries and layers; a feed-forward layer is four times as wide.
        num_layers: of the BERT.
        num_heads: attention heads; by default as many as make heads of 64 channels, or the next larger size that
            divides `hidden_size`.
        cross_attention_frequency: every how many layers the queries attend to the patches.
    """

    num_queries: int = 32
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int | None = None
    cross_attention_frequency: int = 2

    def check(self) -> None:
        self.require_positive(*(name for name in self.names() if getattr(self, name) is not None))
        if self.num_heads is not None and self.hidden_size % self.num_heads:
            raise self.error("num_heads", f"must divide hidden_size {self.hidden_size}")

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        return self.num_queries


@register("qformer", QFormerOptions, aliases=("q_former", "blip2"))
class QFormerProjector(Projector):
    """Learned queries through a BERT with cross-attention to the features, then a linear layer."""

    options: QFormerOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: QFormerOptions) -> None:
        from transformers import Blip2QFormerConfig  # here: the other projectors need no transformers
        from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerEncoder

        super().__init__(vision_hidden_size, text_hidden_size, options)
        config = Blip2QFormerConfig(
            hidden_size=options.hidden_size,
            num_hidden_layers=options.num_layers,
            num_attention_heads=options.num_heads or default_heads(options.hidden_size, 64),
            intermediate_size=4 * options.hidden_size,
            encoder_hidden_size=vision_hidden_size,
            cross_attention_frequency=options.cross_attention_frequency,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
        self.query_tokens = nn.Parameter(torch.empty(1, options.num_queries, options.hidden_size))
        self.layernorm = nn.LayerNorm(options.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Blip2QFormerEncoder(config)
        self.language_projection = nn.Linear(options.hidden_size, text_hidden_size)
        self.init_weights()

    def init_weights(self) -> None:
        init_linear_and_norm(self, _STD)
        nn.init.normal_(self.query_tokens, std=_STD)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        self.check_channels(features)
        queries = self.layernorm(self.query_tokens).expand(len(features), -1, -1)
        encoded = self.encoder(queries, encoder_hidden_states=features, query_length=self.options.num_queries)
        return self.language_projection(encoded.last_hidden_state)  # (batch, num_queries, text)
