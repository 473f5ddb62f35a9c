"""The three operators for generation against scaled_dot_product_attention. They take half precision only, so the
tolerance is that of a float16 output (2⁻¹¹ relative); the arithmetic inside is float32 on both sides.
"""

from __future__ import annotations

import pytest
import torch
import torch_npu

from tests.simulated_npu.attention_cases import band, causal, compressed_mask, reference, to_layout

SCALE = 0.25
UNLIMITED = 2147483647
TOLERANCE = {"atol": 1e-3, "rtol": 1e-3}
LAYOUTS = ["BSH", "BSND", "BNSD", "BNSD_BSND"]


def inputs(heads: int, key_heads: int, queries: int, keys: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, queries, 16), (batch, key_heads, keys, 16), (batch, key_heads, keys, 16)]
    return [torch.randn(shape, generator=generator).half() for shape in shapes]


def on_npu(tensors: list[torch.Tensor], layout: str) -> list[torch.Tensor]:
    return [to_layout(t, "BNSD" if layout == "BNSD_BSND" else layout).to("npu") for t in tensors]


def prefill(operator: str, *tensors: torch.Tensor, scale: float, **options: object) -> torch.Tensor:
    if operator == "prompt":
        return torch_npu.npu_prompt_flash_attention(*tensors, scale_value=scale, **options)
    return torch_npu.npu_fused_infer_attention_score(*tensors, scale=scale, **options)[0]


@pytest.mark.parametrize("operator", ["prompt", "fused_infer"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["full", "user mask", "all mask", "top left", "bottom right", "band"])
def test_prefill(operator: str, layout: str, mode: str) -> None:
    queries, keys = 5, 7
    tensors = inputs(4, 2, queries, keys)
    options: dict[str, object] = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": layout}
    keep = None
    if mode in ("user mask", "all mask"):
        keep = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.6
        keep[..., 0] = True
        options |= {"atten_mask": (~keep).to("npu"), "sparse_mode": 0 if mode == "user mask" else 1}
    elif mode == "band":
        keep = band(queries, keys, 3, 1)
        options |= {"atten_mask": compressed_mask(), "sparse_mode": 4, "pre_tokens": 3, "next_tokens": 1}
    elif mode != "full":
        keep = causal(queries, keys, mode)
        options |= {"atten_mask": compressed_mask(), "sparse_mode": 2 if mode == "top left" else 3}
    if mode in ("full", "user mask"):
        options["next_tokens"] = UNLIMITED
    output = prefill(operator, *on_npu(tensors, layout), scale=SCALE, **options)
    expected = to_layout(reference(*tensors, keep, SCALE), "BSND" if layout == "BNSD_BSND" else layout)
    torch.testing.assert_close(output.cpu(), expected.half(), **TOLERANCE)


@pytest.mark.parametrize("operator", ["prompt", "fused_infer"])
def test_prefill_of_right_padded_sequences(operator: str) -> None:
    tensors = inputs(4, 4, 5, 5)
    lengths = [3, 5]
    output = prefill(
        operator, *on_npu(tensors, "BSND"), scale=SCALE, num_heads=4, input_layout="BSND",
        atten_mask=compressed_mask(), sparse_mode=3, actual_seq_lengths=lengths, actual_seq_lengths_kv=lengths,
    ).cpu()  # fmt: skip
    for i, n in enumerate(lengths):
        alone = [t[i : i + 1, :, :n] for t in tensors]
        expected = to_layout(reference(*alone, causal(n, n, "top left"), SCALE), "BSND")[0]
        torch.testing.assert_close(output[i, :n], expected.half(), **TOLERANCE)
        assert output[i, n:].abs().sum() == 0


def decode(operator: str, *tensors: torch.Tensor, lengths: list[int] | None = None, **options: object) -> torch.Tensor:
    if operator == "incremental":
        return torch_npu.npu_incre_flash_attention(
            *tensors, scale_value=SCALE, num_heads=4, num_key_value_heads=2, actual_seq_lengths=lengths, **options
        )
    return torch_npu.npu_fused_infer_attention_score(
        *tensors, scale=SCALE, num_heads=4, num_key_value_heads=2, actual_seq_lengths_kv=lengths, **options
    )[0]


@pytest.mark.parametrize("operator", ["incremental", "fused_infer"])
@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
@pytest.mark.parametrize("padding", ["none", "right", "left", "mask"])
def test_decode(operator: str, layout: str, padding: str) -> None:
    keys, lengths = 6, [4, 6]
    tensors = inputs(4, 2, 1, keys)
    options: dict[str, object] = {"input_layout": layout}
    keep = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    for i, n in enumerate(lengths):
        if padding == "right":
            keep[i, ..., n:] = False
        elif padding in ("left", "mask"):
            keep[i, ..., : keys - n] = False
    if padding == "mask":
        options["atten_mask"] = (~keep[:, 0, 0]).to("npu")
    elif padding != "none":
        options["lengths"] = lengths
        if padding == "left":
            options["kv_padding_size"] = torch.zeros(1, dtype=torch.int64, device="npu")
    output = decode(operator, *on_npu(tensors, layout), **options)
    expected = to_layout(reference(*tensors, keep, SCALE), layout)
    torch.testing.assert_close(output.cpu(), expected.half(), **TOLERANCE)


@pytest.mark.parametrize("queries", [1, 4])
def test_log_sum_exp(queries: int) -> None:
    q, k, v = inputs(4, 4, queries, 4)
    options = {"num_heads": 4, "input_layout": "BNSD", "scale": SCALE}
    _, lse = torch_npu.npu_fused_infer_attention_score(*on_npu([q, k, v], "BNSD"), softmax_lse_flag=True, **options)
    scores = q.float() @ k.float().transpose(-1, -2) * SCALE
    torch.testing.assert_close(lse.cpu(), scores.logsumexp(-1, keepdim=True))
    _, nothing = torch_npu.npu_fused_infer_attention_score(*on_npu([q, k, v], "BNSD"), **options)
    assert nothing.tolist() == [0.0]


def test_one_query_attends_past_key_512_although_masked() -> None:
    """The fault that users report of the real operator; with lengths in place of the mask it is right."""
    q, k, v = inputs(4, 4, 1, 600, batch=1)
    keep = (torch.arange(600) < 500)[None, None, None]
    options: dict[str, object] = {"num_heads": 4, "input_layout": "BNSD", "scale": SCALE}
    tensors = on_npu([q, k, v], "BNSD")
    expected = reference(q, k, v, keep, SCALE).half()
    masked = torch_npu.npu_fused_infer_attention_score(*tensors, atten_mask=(~keep).to("npu"), **options)[0].cpu()
    assert not torch.allclose(masked, expected, **TOLERANCE)
    read = keep | (torch.arange(600) >= 512)
    torch.testing.assert_close(masked, reference(q, k, v, read, SCALE).half(), **TOLERANCE)
    lengths = torch_npu.npu_fused_infer_attention_score(*tensors, actual_seq_lengths_kv=[500], **options)[0].cpu()
    torch.testing.assert_close(lengths, expected, **TOLERANCE)
