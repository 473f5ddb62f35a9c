"""`nn.MultiheadAttention` on fused attention.

Source: Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762), with the parameters, arguments and results
of torch's `nn.MultiheadAttention`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from llava_npu.ops.attention import Scoring, batched_attention, masked_attention


class FusedMultiheadAttention(nn.MultiheadAttention):
    """A drop-in for `nn.MultiheadAttention` that attends by the device's fused operator.

    Constructor, initial weights, state-dict keys, masks, shapes and results are those of `nn.MultiheadAttention`, but:

    - A query whose keys are all masked gives zeros before the output projection (torch gives NaN).
    - Nested tensors are refused.

    The fused operator never forms the attention weights. Pass `need_weights=False` to use it; with the default,
    `need_weights=True`, the weights are computed step by step, as torch does. Floating-point masks (added to the
    scores) go through torch's own `scaled_dot_product_attention`, as not every fused operator can add them.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends from `query` to `key` and `value`.

        Args:
            query: (batch, L, embed_dim) with `batch_first`, else (L, batch, embed_dim), or (L, embed_dim).
            key: the same with length S and width `kdim`.
            value: the same with length S and width `vdim`.
            key_padding_mask: (batch, S) or (S); True masks a key out, floating-point values are added to the scores.
            need_weights: whether to return the attention weights.
            attn_mask: (L, S) or (batch × num_heads, L, S); as `key_padding_mask`.
            average_attn_weights: whether the weights are averaged over heads.
            is_causal: a promise that `attn_mask` is the causal mask; it must be given all the same.

        Returns:
            The output, shaped as `query`, and the weights (batch, L, S), (batch, num_heads, L, S) or the same without
            batch, or None.

        Raises:
            ValueError: nested tensors, `is_causal` without `attn_mask`, shapes that do not fit, or a mask of integers.
        """
        self._check_shapes(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("FusedMultiheadAttention: is_causal says what attn_mask is; pass attn_mask as well")
        is_batched = query.dim() == 3
        inputs = [query, key, value]
        if not is_batched:
            inputs = _map_distinct(inputs, lambda tensor: tensor.unsqueeze(0))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            inputs = _map_distinct(inputs, lambda tensor: tensor.transpose(0, 1))

        q, k, v = self._heads(*inputs)  # (batch, num_heads, L or S, head_dim)
        (batch, _, length, _), key_length = q.shape, inputs[1].shape[1]
        mask = _merge(
            _attention_mask(attn_mask, batch, self.num_heads, length, key_length),
            _padding_mask(key_padding_mask, batch, key_length),
            q.dtype,
        )
        mask = None if mask is None else F.pad(mask, (0, k.shape[2] - key_length))  # appended keys are never masked
        weights: torch.Tensor | None = None
        if need_weights:
            dropped = F.dropout(_attention_weights(q, k, mask), self.dropout, self.training)
            out, weights = dropped @ v, dropped.mean(1) if average_attn_weights else dropped
        else:
            is_plain_causal = is_causal and key_padding_mask is None and length == k.shape[2] == key_length
            out = self._fused(q, k, v, None if is_plain_causal else mask, is_plain_causal)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (batch, L, embed_dim)
        if not is_batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _fused(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        """Attention by the device's operator; `causal` comes without a mask."""
        dropout = self.dropout if self.training else 0.0
        if mask is None:
            return batched_attention(q, k, v, causal, scoring=Scoring(dropout=dropout))
        if mask.dtype == torch.bool:
            return masked_attention(q, k, v, ~mask, scoring=Scoring(dropout=dropout))
        return _attention_with_bias(q, k, v, mask, dropout)

    def _check_shapes(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("FusedMultiheadAttention: nested tensors are not supported; pad them and pass a mask")
        given = {"query": query, "key": key, "value": value}
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        dimensions = 3 if query.dim() == 3 else 2
        for name, tensor in given.items():
            if tensor.dim() != dimensions or tensor.shape[-1] != widths[name]:
                raise ValueError(
                    f"FusedMultiheadAttention: {name} has shape {tuple(tensor.shape)}; it should have {dimensions} "
                    f"dimensions, as query, and width {widths[name]}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"FusedMultiheadAttention: key has shape {tuple(key.shape)}, value {tuple(value.shape)}; both should "
                "be of one length"
            )

    def _heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projects, appends what `add_bias_kv` and `add_zero_attn` append, and splits into heads."""
        q, k, v = self._projections(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1).to(k.dtype)], dim=1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1).to(v.dtype)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (tensor.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for tensor in (q, k, v))
        return q, k, v

    def _projections(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if query is key is value and self.in_proj_weight is not None:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        q_weight, k_weight, v_weight = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if self.in_proj_weight is None
            else self.in_proj_weight.chunk(3)
        )
        q_bias, k_bias, v_bias = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return F.linear(query, q_weight, q_bias), F.linear(key, k_weight, k_bias), F.linear(value, v_weight, v_bias)


def _map_distinct(tensors: list[torch.Tensor], function: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Maps each tensor once, so that what was one tensor stays one (self-attention projects once)."""
    mapped = {id(tensor): function(tensor) for tensor in tensors}
    return [mapped[id(tensor)] for tensor in tensors]


def _attention_mask(
    mask: torch.Tensor | None, batch: int, heads: int, length: int, key_length: int
) -> torch.Tensor | None:
    """(L, S) or (batch × heads, L, S) -> (batch or 1, heads or 1, L, S)."""
    if mask is None:
        return None
    _check_type("attn_mask", mask)
    if mask.shape == (length, key_length):
        return mask[None, None]
    if mask.shape == (batch * heads, length, key_length):
        return mask.unflatten(0, (batch, heads))
    raise ValueError(
        f"FusedMultiheadAttention: attn_mask has shape {tuple(mask.shape)}; allowed are {(length, key_length)} and "
        f"{(batch * heads, length, key_length)}"
    )


def _padding_mask(mask: torch.Tensor | None, batch: int, key_length: int) -> torch.Tensor | None:
    """(batch, S) -> (batch, 1, 1, S)."""
    if mask is not None and mask.shape != (batch, key_length):
        raise ValueError(
            f"FusedMultiheadAttention: key_padding_mask has shape {tuple(mask.shape)}, not {(batch, key_length)}"
        )
    if mask is None:
        return None
    _check_type("key_padding_mask", mask)
    return mask[:, None, None]


def _check_type(name: str, mask: torch.Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():  # 0 and 1 would be added to the scores
        raise ValueError(
            f"FusedMultiheadAttention: {name} is of {mask.dtype}; allowed are torch.bool (True masks out) and "
            "floating point (added to the scores)"
        )


def _merge(first: torch.Tensor | None, second: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Boolean (True = masked out) if both are, else what is added to the scores."""
    if first is None or second is None:
        mask = second if first is None else first
        return mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    if first.dtype == second.dtype == torch.bool:
        return first | second
    return _additive(first, dtype) + _additive(second, dtype)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))


def _attention_weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, heads, L, S), zeros in rows where everything is masked out."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    if mask is None:
        return scores.softmax(-1)
    additive = _additive(mask, scores.dtype)
    fully_masked = additive.isneginf().all(-1, keepdim=True)
    return (scores + additive.masked_fill(fully_masked, 0)).softmax(-1).masked_fill(fully_masked, 0)


def _attention_with_bias(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, dropout: float
) -> torch.Tensor:
    fully_masked = bias.isneginf().all(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, bias.masked_fill(fully_masked, 0), dropout)
    return out.masked_fill(fully_masked, 0)
