"""npu_rms_norm, npu_rotary_mul, npu_swiglu against the modules of transformers' LLaMA that they replace."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb


def test_rms_norm_equals_llama() -> None:
    reference = LlamaRMSNorm(16, eps=1e-5)
    nn.init.normal_(reference.weight)
    x = torch.randn(2, 3, 16, requires_grad=True)
    expected = reference(x)
    weight = reference.weight.detach().to("npu").requires_grad_()
    x_npu = x.detach().to("npu").requires_grad_()
    output, rstd = torch_npu.npu_rms_norm(x_npu, weight, epsilon=1e-5)
    torch.testing.assert_close(output.cpu(), expected)
    assert rstd.shape == (2, 3, 1)
    torch.testing.assert_close(rstd.cpu(), (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    expected.square().sum().backward()
    output.square().sum().backward()
    torch.testing.assert_close(x_npu.grad.cpu(), x.grad)
    torch.testing.assert_close(weight.grad.cpu(), reference.weight.grad)


def test_rms_norm_over_two_axes() -> None:
    x = torch.randn(3, 4, 8)
    output, rstd = torch_npu.npu_rms_norm(x.to("npu"), torch.ones(4, 8, device="npu"))
    torch.testing.assert_close(output.cpu(), nn.functional.rms_norm(x, (4, 8), eps=1e-6))
    assert rstd.shape == (3, 1, 1)


@pytest.mark.parametrize("table", [(1, 1, 5, 8), (2, 1, 5, 8)])
def test_rotary_mul_equals_llama(table: tuple[int, ...]) -> None:
    angle = torch.randn(table[0], table[2], 4).repeat(1, 1, 2)  # both halves turn by the same angles
    cos, sin = angle.cos(), angle.sin()
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    expected, _ = apply_rotary_pos_emb(q, k, cos, sin)
    output = torch_npu.npu_rotary_mul(q.to("npu"), cos[:, None].to("npu"), sin[:, None].to("npu"))  # BNSD
    torch.testing.assert_close(output.cpu(), expected)
    transposed = torch_npu.npu_rotary_mul(  # BSND
        q.transpose(1, 2).to("npu"), cos[:, :, None].to("npu"), sin[:, :, None].to("npu")
    )
    torch.testing.assert_close(transposed.cpu(), expected.transpose(1, 2))


def test_rotary_mul_interleaved_is_complex_multiplication() -> None:
    x = torch.randn(2, 3, 5, 8)
    angle = torch.randn(1, 1, 5, 4)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(
        torch.ones_like(angle), angle
    )).flatten(-2)  # fmt: skip
    cos, sin = (f.repeat_interleave(2, -1).to("npu") for f in (angle.cos(), angle.sin()))
    output = torch_npu.npu_rotary_mul(x.to("npu"), cos, sin, "interleave")
    torch.testing.assert_close(output.cpu(), expected)


def test_rotary_mul_with_a_rotation_matrix() -> None:
    x, cos, sin = torch.randn(2, 3, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    rotate = torch.zeros(8, 8)
    rotate[:4, 4:], rotate[4:, :4] = torch.eye(4), -torch.eye(4)
    x, cos, sin, rotate = (t.to("npu") for t in (x, cos, sin, rotate))
    torch.testing.assert_close(
        torch_npu.npu_rotary_mul(x, cos, sin, "half", rotate), torch_npu.npu_rotary_mul(x, cos, sin)
    )


@pytest.mark.parametrize("dim", [-1, 1])
def test_swiglu(dim: int) -> None:
    x = torch.randn(3, 4, 6, requires_grad=True)
    gate, up = x.chunk(2, dim)
    expected = nn.functional.silu(gate) * up
    x_npu = x.detach().to("npu").requires_grad_()
    output = torch_npu.npu_swiglu(x_npu, dim)
    torch.testing.assert_close(output.cpu(), expected)
    expected.sum().backward()
    output.sum().backward()
    torch.testing.assert_close(x_npu.grad.cpu(), x.grad)


def test_rms_norm_takes_half_precision_with_a_float32_weight() -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    output, _ = torch_npu.npu_rms_norm(x.to("npu"), weight.to("npu"), 1e-5)
    expected = nn.functional.rms_norm(x.float(), (8,), weight, 1e-5).bfloat16()
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.cpu(), expected)


def test_fused_adamw_ignores_found_inf() -> None:
    """As op-plugin's kernel does: whoever relies on torch's protocol to skip a step gets NaN into the weights."""
    weight = torch.nn.Parameter(torch.ones(4, device="npu"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.found_inf = torch.ones((), device="npu")  # type: ignore[attr-defined]
    optimizer.step()
    assert weight.isnan().all()
