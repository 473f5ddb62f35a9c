"""npu_fusion_attention against scaled_dot_product_attention in float64: values and gradients."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
import torch_npu

from tests.simulated_npu.attention_cases import DENSE, band, causal, compressed_mask, reference, to_layout

SCALE = 0.3
MODES = ["full", "user mask", "all mask", "top left", "bottom right", "band"]


def options(mode: str, queries: int, keys: int) -> tuple[dict[str, object], torch.Tensor | None]:
    """What the operator is told for a mode, and what that means: True = keep."""
    if mode == "full":
        return {}, None
    if mode in ("user mask", "all mask"):
        keep = torch.rand(queries, keys, generator=torch.Generator().manual_seed(1)) < 0.6
        keep[:, 0] = True
        return {"atten_mask": (~keep).to("npu"), "sparse_mode": 0 if mode == "user mask" else 1}, keep
    if mode == "band":
        keep = band(queries, keys, before=3, after=1)
        return {"atten_mask": compressed_mask(), "sparse_mode": 4, "pre_tockens": 3, "next_tockens": 1}, keep
    keep = causal(queries, keys, corner=mode)
    return {"atten_mask": compressed_mask(), "sparse_mode": 2 if mode == "top left" else 3}, keep


def inputs(heads: int, key_heads: int, queries: int, keys: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, queries, 8), (batch, key_heads, keys, 8), (batch, key_heads, keys, 8)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
def test_dense(layout: str, mode: str, heads: int, key_heads: int) -> None:
    queries, keys = 5, 7
    q, k, v = inputs(heads, key_heads, queries, keys)
    told, keep = options(mode, queries, keys)
    expected = reference(q, k, v, keep, SCALE)
    device_inputs = [to_layout(t, layout).to("npu") for t in (q, k, v)]
    output = torch_npu.npu_fusion_attention(*device_inputs, heads, layout, scale=SCALE, **told)[0]
    torch.testing.assert_close(output.cpu(), to_layout(expected, layout).float(), atol=2e-6, rtol=2e-6)

    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(expected, (q, k, v), direction.double())
    found = torch.autograd.grad(output, (q, k, v), to_layout(direction, layout).to("npu"))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_variable_length(mode: str, key_heads: int) -> None:
    """Each sequence of a TND call equals the same sequence alone."""
    lengths_q, lengths_k = [3, 1, 5], [4, 1, 7]
    # One user mask serves every sequence: its top left corner.
    told, keep_all = options(mode, max(lengths_q), max(lengths_k))
    q, k, v = inputs(4, key_heads, sum(lengths_q), sum(lengths_k), batch=1)
    ends_q, ends_k = list(accumulate(lengths_q)), list(accumulate(lengths_k))
    pieces = []
    for (q0, q1), (k0, k1) in zip(pairwise([0, *ends_q]), pairwise([0, *ends_k]), strict=True):
        if mode in ("full", "user mask", "all mask"):
            keep = None if keep_all is None else keep_all[: q1 - q0, : k1 - k0]
        else:
            keep = options(mode, q1 - q0, k1 - k0)[1]
        pieces.append(reference(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], keep, SCALE))
    expected = torch.cat(pieces, dim=2)[0].transpose(0, 1)  # (tokens, heads, size)

    packed = [t[0].transpose(0, 1).to("npu") for t in (q, k, v)]
    output = torch_npu.npu_fusion_attention(
        *packed, 4, "TND", scale=SCALE, actual_seq_qlen=ends_q, actual_seq_kvlen=ends_k, **told
    )[0]
    torch.testing.assert_close(output.cpu(), expected.float(), atol=2e-6, rtol=2e-6)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(expected, (q, k, v), direction.double())
    found = torch.autograd.grad(output, (q, k, v), direction.to("npu"))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype: torch.dtype) -> None:
    q, k, v = (t.detach().to(dtype) for t in inputs(4, 2, 5, 5))
    output = torch_npu.npu_fusion_attention(*(to_layout(t, "BSND").to("npu") for t in (q, k, v)), 4, "BSND")[0]
    assert output.dtype == dtype
    expected = to_layout(reference(q, k, v, None, 1.0), "BSND")
    torch.testing.assert_close(output.cpu().double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("shape", [(5, 5), (1, 1, 5, 5), (2, 1, 5, 5), (2, 4, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_mask_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = (t.detach() for t in inputs(4, 4, 5, 5))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[..., 0] = True
    output = torch_npu.npu_fusion_attention(
        *(t.to("npu") for t in (q, k, v)), 4, "BNSD", atten_mask=(~keep).to(dtype).to("npu"), sparse_mode=1
    )[0]
    torch.testing.assert_close(output.cpu(), reference(q, k, v, keep, 1.0).float(), atol=2e-6, rtol=2e-6)


def test_band_and_mask_of_mode_0_must_agree() -> None:
    """The predecessor's call: a full causal mask with pre_tockens=65536, next_tockens=0."""
    q, k, v = (t.detach() for t in inputs(2, 2, 5, 5))
    keep = causal(5, 5, "top left")
    on_npu = [t.to("npu") for t in (q, k, v)]
    mask = (~keep).to("npu")
    output = torch_npu.npu_fusion_attention(*on_npu, 2, "BNSD", atten_mask=mask, pre_tockens=65536, next_tockens=0)[0]
    torch.testing.assert_close(output.cpu(), reference(q, k, v, keep, 1.0).float(), atol=2e-6, rtol=2e-6)


def test_rows_without_any_key_are_zero_with_inner_precise_2() -> None:
    q, k, v = inputs(2, 2, 3, 3)
    mask = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    mask[1, :, 2] = True
    output = torch_npu.npu_fusion_attention(
        *(t.to("npu") for t in (q, k, v)), 2, "BNSD", atten_mask=mask.to("npu"), sparse_mode=1, inner_precise=2
    )[0]
    assert output[1, :, 2].abs().max().item() == 0
    output.sum().backward()
    assert q.grad[1, :, 2].abs().max().item() == 0
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


def test_bottom_right_causal_with_more_queries_than_keys_gives_zero_rows() -> None:
    q, k, v = (t.detach() for t in inputs(2, 2, 5, 3))
    output = torch_npu.npu_fusion_attention(
        *(t.to("npu") for t in (q, k, v)), 2, "BNSD", atten_mask=compressed_mask(), sparse_mode=3
    )[0].cpu()
    assert output[:, :, :2].abs().max() == 0
    expected = reference(q[:, :, 2:], k, v, causal(3, 3, "top left"), 1.0)
    torch.testing.assert_close(output[:, :, 2:], expected.float(), atol=2e-6, rtol=2e-6)


def test_sequences_left_out_are_not_written() -> None:
    q = torch.randn(6, 2, 8, device="npu")
    output = torch_npu.npu_fusion_attention(q, q, q, 2, "TND", actual_seq_qlen=[2, 4, 0], actual_seq_kvlen=[2, 4, 0])[0]
    assert torch.isfinite(output[:4]).all()
    assert output[4:].isnan().all()


def test_empty_sequence_in_the_middle() -> None:
    q = torch.randn(4, 2, 8, device="npu")
    ends = {"actual_seq_qlen": [2, 2, 4], "actual_seq_kvlen": [2, 2, 4]}
    output = torch_npu.npu_fusion_attention(q, q, q, 2, "TND", **ends)[0]
    without = torch_npu.npu_fusion_attention(q, q, q, 2, "TND", actual_seq_qlen=[2, 4], actual_seq_kvlen=[2, 4])[0]
    assert torch.equal(output, without)


def test_softmax_statistics() -> None:
    q, k, v = (t.detach() for t in inputs(2, 2, 3, 4))
    _, maxima, sums, *_ = torch_npu.npu_fusion_attention(*(t.to("npu") for t in (q, k, v)), 2, "BNSD", scale=SCALE)
    scores = q @ k.transpose(-1, -2) * SCALE
    assert maxima.shape == sums.shape == (2, 2, 3, 8)
    torch.testing.assert_close((maxima + sums.log())[..., 0].cpu(), scores.logsumexp(-1))


def test_dropout_keeps_the_mean_and_follows_the_seed() -> None:
    q = torch.zeros(1, 1, 1, 8, device="npu")
    k, v = torch.zeros(1, 1, 4096, 8, device="npu"), torch.ones(1, 1, 4096, 8, device="npu")

    def attend(keep_prob: float) -> torch.Tensor:
        torch.npu.manual_seed(0)
        return torch_npu.npu_fusion_attention(q, k, v, 1, "BNSD", keep_prob=keep_prob)[0]

    assert attend(1.0).mean().item() == pytest.approx(1.0, abs=1e-5)
    dropped = attend(0.75)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)
    assert dropped.mean().item() != attend(1.0).mean().item()
    assert torch.equal(dropped, attend(0.75))


def test_autocast_does_not_reach_inside() -> None:
    q = torch.randn(1, 2, 3, 8, device="npu")
    plain = torch_npu.npu_fusion_attention(q, q, q, 2, "BNSD")[0]
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert torch.equal(torch_npu.npu_fusion_attention(q, q, q, 2, "BNSD")[0], plain)
