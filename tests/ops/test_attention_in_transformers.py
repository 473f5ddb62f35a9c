"""Reference: the same transformers model in float64 on the CPU with its own eager attention, one sample at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    StableLmConfig,
    StableLmForCausalLM,
    StaticCache,
)

from llava_npu.errors import UserError
from llava_npu.ops.attention.transformers_interface import known_lengths, use_packed_attention

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
LANGUAGE_MODELS = {
    "llama-gqa": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)),
    "stablelm": lambda: StableLmForCausalLM(StableLmConfig(**SIZES, num_key_value_heads=2)),  # drops arguments
    "gemma-2": lambda: Gemma2ForCausalLM(  # caps its scores, and every other layer has a window
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=16)),
}
SAMPLES = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19, 20]]


@pytest.fixture(params=LANGUAGE_MODELS)
def pair(request: pytest.FixtureRequest, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(ours on the device, the float64 eager reference on the CPU), with the same weights."""
    return make_pair(LANGUAGE_MODELS[request.param](), device)


def make_pair(model: PreTrainedModel, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    reference = type(model)(model.config)
    reference.load_state_dict(model.state_dict())
    reference.set_attn_implementation("eager")
    use_packed_attention(model)
    return model.to(device), reference.double()


def one_by_one(reference: PreTrainedModel, samples: list[list[int]]) -> list[torch.Tensor]:
    return [reference(input_ids=torch.tensor([sample]), use_cache=False).logits[0] for sample in samples]


def padded(samples: list[list[int]], side: str, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    def pad(row: list[int]) -> list[int]:
        padding = [0] * (width - len(row))
        return row + padding if side == "right" else padding + row

    ids = torch.tensor([pad(sample) for sample in samples])
    mask = torch.tensor([pad([1] * len(sample)) for sample in samples])
    return ids.to(device), mask.to(device)


def packed(samples: list[list[int]], device: torch.device) -> dict[str, Any]:
    ids = torch.tensor([[token for sample in samples for token in sample]])
    positions = torch.tensor([[position for sample in samples for position in range(len(sample))]])
    return {
        "input_ids": ids.to(device),
        "position_ids": positions.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "sequence_lengths": tuple(len(sample) for sample in samples),
    }


def compute_packed(model: PreTrainedModel, batch: dict[str, Any], **options: Any) -> torch.Tensor:
    """The logits of `packed` samples."""
    inputs = {name: value for name, value in batch.items() if name != "sequence_lengths"}
    with known_lengths(batch["sequence_lengths"]):
        logits: torch.Tensor = model(**inputs, **options, use_cache=False).logits
    return logits


def assert_same_gradients(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    expected = dict(reference.named_parameters())
    # Some gradients are zero in exact arithmetic (a key bias shifts all scores alike): hence one scale for all.
    scale = max(parameter.grad.abs().max().item() for parameter in expected.values() if parameter.grad is not None)
    for name, parameter in model.named_parameters():
        ours, exact = parameter.grad, expected[name].grad
        if exact is None:
            assert ours is None or not ours.any(), name
            continue
        assert ours is not None, name
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_packed_batch(pair: tuple[PreTrainedModel, PreTrainedModel], device: torch.device) -> None:
    model, reference = pair
    logits = compute_packed(model, packed(SAMPLES, device))[0]
    expected = torch.cat(one_by_one(reference, SAMPLES))
    torch.testing.assert_close(logits.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (logits * direction.to(logits)).sum().backward()
    (expected * direction).sum().backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [7, 9])
def test_padded_batch(
    pair: tuple[PreTrainedModel, PreTrainedModel], side: str, width: int, device: torch.device
) -> None:
    model, reference = pair
    ids, mask = padded(SAMPLES, side, width, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert logits.isfinite().all()
    real = logits[mask.bool()]
    expected = torch.cat(one_by_one(reference, SAMPLES))
    torch.testing.assert_close(real.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (real * direction.to(real)).sum().backward()
    (expected * direction).sum().backward()
    assert_same_gradients(model, reference)


def test_row_of_nothing_but_padding_is_finite(
    pair: tuple[PreTrainedModel, PreTrainedModel], device: torch.device
) -> None:
    model, reference = pair
    ids, mask = padded([[5, 6, 7], []], "right", 4, device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    expected = one_by_one(reference, [[5, 6, 7]])[0]
    torch.testing.assert_close(logits[0, :3].cpu().double(), expected, rtol=1e-4, atol=1e-4)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_packed_batch_found_by_transformers(
    pair: tuple[PreTrainedModel, PreTrainedModel], device: torch.device
) -> None:
    """Without our lengths and without a mask, transformers finds the sequences in the positions: still right."""
    model, reference = pair
    batch = packed(SAMPLES, device)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    expected = torch.cat(one_by_one(reference, SAMPLES))
    torch.testing.assert_close(logits.cpu().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "none"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_cache(
    pair: tuple[PreTrainedModel, PreTrainedModel], side: str, cache: str, device: torch.device
) -> None:
    model, reference = pair
    samples = SAMPLES if side == "left" else [SAMPLES[1]] * 2
    ids, mask = padded(samples, "left", max(map(len, samples)), device)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    if cache == "static":
        options["past_key_values"] = StaticCache(config=model.config, max_cache_len=20)
    generated = model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :].cpu()
    for row, sample in zip(generated, samples, strict=True):
        tokens = list(sample)
        for _ in range(6):
            tokens.append(int(one_by_one(reference, [tokens])[0][-1].argmax()))
        assert row.tolist() == tokens[len(sample) :]


def test_prompt_in_pieces(pair: tuple[PreTrainedModel, PreTrainedModel], device: torch.device) -> None:
    """A left-padded prompt that arrives in two pieces: the second has fewer queries than keys."""
    model, reference = pair
    samples = [SAMPLES[1], SAMPLES[3]]
    ids, mask = padded(samples, "left", 7, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], position_ids=positions[:, :4], use_cache=True)
        second = model(
            input_ids=ids[:, 4:],
            attention_mask=mask,
            position_ids=positions[:, 4:],
            past_key_values=first.past_key_values,
        )
    for row, expected in zip(second.logits.cpu().double(), one_by_one(reference, samples), strict=True):
        torch.testing.assert_close(row, expected[-3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "tower", [CLIPVisionModel(CLIPVisionConfig(**VISION)), SiglipVisionModel(SiglipVisionConfig(**VISION))]
)
def test_vision_towers(tower: PreTrainedModel, device: torch.device) -> None:
    model, reference = make_pair(tower, device)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    ours = model(pixels.to(device)).last_hidden_state
    exact = reference(pixels.double()).last_hidden_state
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-4, atol=1e-4)
    ours.square().sum().backward()
    exact.square().sum().backward()
    assert_same_gradients(model, reference)


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**SIZES, num_key_value_heads=2),
        image_token_id=63,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text-only"])
def test_llava(llava: LlavaForConditionalGeneration, with_image: bool, device: torch.device) -> None:
    model, reference = make_pair(llava, device)
    image = [63] * 16 if with_image else []
    samples = [[5, *image, 6, 7], [8, 9, *image, 10]]
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)) if with_image else None
    batch = packed(samples, device)
    encoded = {}
    if pixels is not None:
        features = model.get_image_features(pixel_values=pixels.to(device), return_dict=True)
        encoded = {"mm_encoder_outputs": {"image": features}}
    ours = compute_packed(model, batch, **encoded)[0]
    exact = []
    for index, sample in enumerate(samples):
        image_of_sample = None if pixels is None else pixels[index : index + 1].double()
        ids = torch.tensor([sample])
        exact.append(reference(input_ids=ids, pixel_values=image_of_sample, use_cache=False).logits[0])
    torch.testing.assert_close(ours.cpu().double(), torch.cat(exact), rtol=1e-4, atol=1e-4)
    ours.square().sum().backward()
    torch.cat(exact).square().sum().backward()
    assert_same_gradients(model, reference)


def test_gradient_checkpointing(pair: tuple[PreTrainedModel, PreTrainedModel], device: torch.device) -> None:
    model, _ = pair
    ids, mask = padded(SAMPLES, "left", 7, device)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


class _HostReads(TorchDispatchMode):
    """Counts the operations after which the host would have to wait for a device."""

    _names: ClassVar = {
        torch.ops.aten._local_scalar_dense.default: "aten::_local_scalar_dense",
        torch.ops.aten.nonzero.default: "aten::nonzero",
        torch.ops.aten.masked_select.default: "aten::masked_select",
    }

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in self._names:
            self.counts[self._names[func]] += 1
        if func is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu" and not args[0].is_cpu:
            self.counts["copy_device_to_host"] += 1
        return func(*args, **kwargs)


def host_waits(device: torch.device, work: Callable[[], object]) -> dict[str, int]:
    """How often the host waits for the device in `work`, by kind; on a CPU, how often it would."""
    if device.type == "npu":
        from torch_npu.simulation import count_host_syncs

        with count_host_syncs() as syncs:
            work()
        return {kind: count for kind, count in syncs.by_kind.items() if kind != "copy_host_to_device"}
    with _HostReads() as reads:
        work()
    return dict(reads.counts)


def test_packed_training_never_waits_for_the_device(
    pair: tuple[PreTrainedModel, PreTrainedModel], device: torch.device
) -> None:
    model, _ = pair
    batch = packed(SAMPLES, device)
    model.train()
    assert host_waits(device, lambda: compute_packed(model, batch).sum().backward()) == {}
    found_by_transformers = {name: batch[name] for name in ("input_ids", "position_ids")}
    assert host_waits(device, lambda: model(**found_by_transformers, use_cache=False)) != {}  # this test would notice


def test_padded_training_asks_the_device_once_for_all_layers(device: torch.device) -> None:
    model, _ = make_pair(LANGUAGE_MODELS["llama-gqa"](), device)
    ids, mask = padded(SAMPLES, "right", 7, device)
    assert model.config.num_hidden_layers == 2
    waits = host_waits(device, lambda: model(input_ids=ids, attention_mask=mask, use_cache=False))
    if device.type == "cpu":  # what a device would be asked for is read and searched in place
        assert waits["aten::nonzero"] == 1
    else:
        assert waits.get("copy_device_to_host") == 1
        assert "aten::nonzero" not in waits or device.type == "cuda"  # there, the mode sees the host's own search


def test_dropout_is_active_in_training_only(device: torch.device) -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=2, attention_dropout=0.5)
    model, _ = make_pair(LlamaForCausalLM(config), device)
    batch = packed(SAMPLES, device)
    model.eval()
    torch.testing.assert_close(compute_packed(model, batch), compute_packed(model, batch), rtol=0, atol=0)
    model.train()
    assert not torch.equal(compute_packed(model, batch).cpu(), compute_packed(model, batch).cpu())


def test_lengths_that_do_not_fit_are_named(device: torch.device) -> None:
    model, _ = make_pair(LANGUAGE_MODELS["llama-gqa"](), device)
    batch = packed(SAMPLES, device) | {"sequence_lengths": (3, 4)}
    with pytest.raises(ValueError, match=r"sequence_lengths \(3, 4\) add up to 7, but there are 16 tokens"):
        compute_packed(model, batch)


def test_weights_cannot_be_had(device: torch.device) -> None:
    model, _ = make_pair(LANGUAGE_MODELS["llama-gqa"](), device)
    with pytest.raises(UserError, match="output_attentions is not supported"):
        compute_packed(model, packed(SAMPLES, device), output_attentions=True)


def test_a_pack_under_another_mask_is_refused(device: torch.device) -> None:
    """Attention that ignores transformers' mask would let the samples of a pack see each other."""
    model, _ = make_pair(LANGUAGE_MODELS["llama-gqa"](), device)
    batch = packed(SAMPLES, device)
    batch["attention_mask"] = torch.ones(1, 1, 16, 16, dtype=torch.bool, device=device)
    with pytest.raises(UserError, match="LlamaAttention does not attend under transformers' mask"):
        compute_packed(model, batch)


def test_name_is_not_written_into_checkpoints(device: torch.device) -> None:
    model, _ = make_pair(LANGUAGE_MODELS["llama-gqa"](), device)
    assert model.config._attn_implementation == "llava_npu"
    assert "llava_npu" not in model.config.to_json_string()
