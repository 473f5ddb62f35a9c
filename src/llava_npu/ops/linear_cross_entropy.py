"""Linear layer and cross-entropy in one, over supervised positions only, without ever holding the full logits.

A language model's logits are its largest tensor: 8 samples of 2048 tokens over 32 000 words take 2 GiB in float32, and
as much again for their gradient, although most positions (prompt and image) are not supervised. Here only supervised
positions are multiplied, a chunk of rows at a time, and each chunk's gradient is formed in place of its logits while
they are there, so that nothing is computed twice. Peak memory is one chunk plus the gradients.

Sources: the gradient-in-forward method is that of Liger Kernel's fused linear cross-entropy (Hsu et al. 2024,
arXiv:2410.10989); skipping unsupervised rows and reducing the logits row by row follow Wijmans et al. 2024, "Cut Your
Losses in Large-Vocabulary Language Models" (arXiv:2411.09009).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100


@dataclass(frozen=True)
class LogitTransform:
    """What a language model does to its head's output z: `scale · z`, or `softcap · tanh(scale · z / softcap)`.

    Sources: Gemma 2 (arXiv:2408.00118) caps softly; Cohere and Granite scale, in transformers' `logit_scale` and
    `logits_scaling`.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Any shape; the result has the same type."""
        if self.softcap is not None:
            return torch.tanh(logits * (self.scale / self.softcap)) * self.softcap
        return logits if self.scale == 1.0 else logits * self.scale

    def with_slope(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """The transformed logits, and their derivative by the given ones; may overwrite these."""
        if self.softcap is None:
            return logits.mul_(self.scale), self.scale
        squashed = logits.mul_(self.scale / self.softcap).tanh_()
        slope = squashed.square().neg_().add_(1).mul_(self.scale)
        return squashed.mul_(self.softcap), slope


IDENTITY = LogitTransform()


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Literal["sum", "mean"] = "sum",
    chunk_size: int = 1024,
    positions: torch.Tensor | None = None,
    transform: LogitTransform = IDENTITY,
) -> torch.Tensor:
    """Equals `F.cross_entropy(transform(F.linear(hidden, weight, bias).float()), labels)`, gradients included.

    Nothing is shifted here: `hidden[..., i, :]` is scored against `labels[..., i]`, as in `F.cross_entropy`.

    The reduction runs in float32 (float64 for float64 inputs), whatever the inputs' type. Under autocast the matrix
    products run in the autocast type. No gradient is computed for a tensor that does not require one.

    Args:
        hidden: (..., hidden_size).
        weight: (vocab_size, hidden_size).
        labels: integers, the leading shape of `hidden`; `ignore_index` marks unsupervised positions.
        bias: (vocab_size,), or none.
        reduction: "sum", or "mean" over supervised positions. The mean of no position is 0 (`F.cross_entropy` gives
            NaN there).
        chunk_size: rows of logits held at once; the scratch memory is about chunk_size × vocab_size × 6 bytes with
            bfloat16 inputs.
        positions: 1-D indices of the supervised positions in the flattened labels. Without them they are searched for,
            which on an accelerator makes the host wait for the device once; whoever built the batch on the host knows
            them already. Positions whose label is `ignore_index` count nothing, so that indices may be padded with
            such a position to a fixed length.
        transform: what the language model does to the product before the softmax; computed in float32.

    Returns:
        A scalar, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, or a chunk size below 1.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"linear_cross_entropy: reduction {reduction!r}; allowed are 'sum' and 'mean'")
    if chunk_size < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size {chunk_size}; at least 1 is needed")
    _check_shapes(hidden, weight, labels)
    labels = labels.reshape(-1)
    if positions is None:
        positions = (labels != ignore_index).nonzero().squeeze(1)
    positions = positions.to(labels.device, non_blocking=True)
    labels = labels.index_select(0, positions)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)  # (supervised, hidden_size)

    if not torch.is_grad_enabled():  # inside `forward` this can no longer be seen
        rows, weight, bias = rows.detach(), weight.detach(), None if bias is None else bias.detach()
    loss = _ChunkedLoss.apply(rows, weight, bias, labels, ignore_index, chunk_size, _matmul_dtype(rows), transform)
    if reduction == "mean":
        loss = loss / (labels != ignore_index).sum().clamp(min=1)
    return loss


def _check_shapes(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    if labels.shape != hidden.shape[:-1] or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)} and weight "
            f"{tuple(weight.shape)} do not fit; expected (..., H), (...) and (V, H)"
        )


def _matmul_dtype(rows: torch.Tensor) -> torch.dtype:
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the losses of `rows`; their gradients are computed with the loss and only scaled in `backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        ignore_index: int,
        chunk_size: int,
        matmul_dtype: torch.dtype,
        transform: LogitTransform,
    ) -> torch.Tensor:
        rows_need_grad, weight_needs_grad, bias_needs_grad = ctx.needs_input_grad[:3]
        reduce_dtype = torch.promote_types(rows.dtype, torch.float32)
        loss = rows.new_zeros((), dtype=reduce_dtype)
        grad_rows = torch.empty_like(rows) if rows_need_grad else None
        grad_weight = torch.zeros_like(weight, dtype=reduce_dtype) if weight_needs_grad else None
        grad_bias = torch.zeros_like(bias, dtype=reduce_dtype) if bias is not None and bias_needs_grad else None

        with torch.autocast(rows.device.type, enabled=False):
            matrix = weight.to(matmul_dtype)
            offset = None if bias is None else bias.to(matmul_dtype)
            for start in range(0, rows.shape[0], chunk_size):
                chunk = rows[start : start + chunk_size].to(matmul_dtype)  # (chunk, hidden_size)
                target = labels[start : start + chunk_size]
                logits = torch.nn.functional.linear(chunk, matrix, offset).to(reduce_dtype)  # (chunk, vocab_size)
                logits, slope = transform.with_slope(logits)
                losses, grad_logits = _losses_and_gradient(logits, target, ignore_index)
                loss += losses.sum()
                grad_logits.mul_(slope)
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
                grad_logits = grad_logits.to(matmul_dtype)
                if grad_rows is not None:
                    grad_rows[start : start + chunk_size] = grad_logits @ matrix
                if grad_weight is not None and grad_weight.dtype == matmul_dtype:
                    grad_weight.addmm_(grad_logits.T, chunk)
                elif grad_weight is not None:
                    grad_weight += grad_logits.T @ chunk

        ctx.save_for_backward(
            grad_rows,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # The scale is rounded to the gradients' type only after the product, hence the product with a 0-d tensor.
        scaled = [None if grad is None else grad * grad_loss for grad in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)


def _losses_and_gradient(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of each row and ∂(their sum)/∂logits, which overwrites `logits`."""
    ignored = target == ignore_index
    index = target.masked_fill(ignored, 0).unsqueeze(1)  # (chunk, 1)
    logits.sub_(logits.amax(1, keepdim=True))
    target_logits = logits.gather(1, index)
    total = logits.exp_().sum(1, keepdim=True)
    losses = (total.log() - target_logits).squeeze(1).masked_fill(ignored, 0)  # (chunk,)
    probabilities = logits.div_(total)
    minus_one = torch.full_like(target_logits, -1)
    gradient = probabilities.scatter_add_(1, index, minus_one).masked_fill_(ignored.unsqueeze(1), 0)
    return losses, gradient
