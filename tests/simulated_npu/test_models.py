"""A tiny LLaVA of transformers, as it is, on the simulated device: same losses, weights and answers as on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_npu
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

IMAGE_TOKEN = 99
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE = {"image_size": 16, "patch_size": 8}


def tiny_llava(tower: str) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**VISION, **SIZE) if tower == "clip" else SiglipVisionConfig(**VISION, **SIZE)
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, max_position_embeddings=64, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, vision_feature_layer=-1,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def batch(device: str, padded: str | None = None) -> dict[str, torch.Tensor]:
    """Two samples of one image (4 tokens) and text each; the second one shorter by 2 if `padded` on a side."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 90, (2, 8), generator=generator)
    ids = torch.cat((torch.full((2, 4), IMAGE_TOKEN), text), dim=1)
    mask = torch.ones_like(ids)
    if padded == "left":
        ids[1] = torch.cat((torch.zeros(2, dtype=torch.long), ids[1, :-2]))
        mask[1, :2] = 0
    elif padded == "right":
        ids[1, -2:] = 0
        mask[1, -2:] = 0
    labels = ids.masked_fill((ids == IMAGE_TOKEN) | (mask == 0), -100)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def train(model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> list[float]:
    # Not Adam's usual epsilon: a gradient that is rounding noise, other on every CPU, would be scaled to a full step.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    losses = []
    for _ in range(3):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_three_steps_equal_cpu(tower: str, attention: str) -> None:
    reference = tiny_llava(tower)
    model = copy.deepcopy(reference).to("npu")
    model.set_attn_implementation(attention)
    reference.set_attn_implementation("sdpa")
    expected = train(reference, batch("cpu", "right"))
    with torch_npu.simulation.op_counts() as counts:
        found = train(model, batch("npu", "right"))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0]
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if name.endswith("k_proj.bias"):  # moves all scores of a row alike: its gradient is rounding noise,
            continue  # which Adam scales up to a full step
        torch.testing.assert_close(ours.cpu(), theirs, atol=5e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert (counts.get("npu::npu_fusion_attention", 0) > 0) == (attention == "flash_attention_2")


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_greedy_generation_equals_cpu(tower: str) -> None:
    model = tiny_llava(tower)
    answers = {}
    for device in ("cpu", "npu"):
        inputs = batch(device, "left")
        del inputs["labels"]
        answers[device] = model.to(device).generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
    assert answers["npu"] == answers["cpu"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_training(dtype: torch.dtype) -> None:
    """Near the float32 loss, in the dtype asked for, with float32 gradients."""
    inputs = batch("npu")
    model = tiny_llava("clip").to("npu")
    exact = model(**inputs).loss.item()
    with torch.autocast("npu", dtype=dtype):
        output = model(**inputs)
    assert output.logits.dtype == dtype
    assert output.loss.item() == pytest.approx(exact, rel=2e-2)
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, checkpointed = tiny_llava("clip").to("npu").train(), tiny_llava("clip").to("npu").train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        model(**batch("npu")).loss.backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)
