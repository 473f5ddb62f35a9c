"""The count of operations against torch's own counter, run on the same step, and against published orders of size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, Olmo2Config, Phi3Config, SiglipVisionConfig

from llava_npu.config.parts import PartsConfig, StageName, resolve_parts
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.flops import FlopModel, Flops, causal_pairs, flop_model
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.projectors.registry import available
from llava_npu.ops.fuse import install_kernels
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.parts import prepare_parts
from support import tiny

PROJECTORS = {
    "identity": {},
    "linear": {},
    "mlp2x_gelu": {},
    "mlp3x_gelu": {},
    "adaptive_pool": {"num_queries": 4},
    "ldp": {},
    "ldpv2": {"num_queries": 4},
    "pixel_shuffle": {},
    "resampler": {"num_queries": 4},
    "tokenpacker": {"region_layers": [1, 2, 3]},
    "c_abstractor": {"num_queries": 4, "num_input_tokens": 16, "hidden_size": 16},
    "d_abstractor": {"num_queries": 4, "num_input_tokens": 16, "hidden_size": 32, "num_layers": 2, "num_heads": 4},
    "qformer": {"num_queries": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 4},
    "mqt": {"num_queries": 4},
    "matryoshka_pool": {},
    "patch_merger": {},
    "dense_sti": {"layers": [1]},
    "dense_sci": {"layers": [1]},
    "dense_dci": {"groups": [1, 2]},
    "sva": {"num_queries": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "tower_sides": [4]},
}


TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 303,
    "pad_token_id": 0,
}


def build(
    projector: str = "mlp2x_gelu", stage: StageName = "finetune", **changes: object
) -> LlavaNpuForConditionalGeneration:
    width = 32 if projector == "identity" else 48
    values = {
        "vision_config": tiny.clip_config(),
        "text_config": tiny.text_config(hidden_size=width),
        "image_token_index": 302,
        "vision_feature_layer": -1,
        "projector_type": projector,
        "projector_options": PROJECTORS.get(projector, {}),
    }
    model = LlavaNpuForConditionalGeneration(LlavaNpuConfig(**{**values, **changes}))
    prepare(model, stage)
    return model


def prepare(model: LlavaNpuForConditionalGeneration, stage: StageName) -> None:
    prepare_parts(model, resolve_parts(stage, PartsConfig(), 1e-3, 0.0), None, checkpointing=False)


def counted_by_torch(model: LlavaNpuForConditionalGeneration, images: int, words: int, supervised: int) -> int:
    """The operations of one step, forward and backward, on samples of one image each."""
    per_image = model.config.num_image_tokens
    ids = torch.ones(images, per_image + words, dtype=torch.long)
    ids[:, 1 : per_image + 1] = model.config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -supervised:] = 5
    batch = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        "supervised_positions": (labels[:, 1:].flatten() != -100).nonzero().flatten(),
        "pixel_values": torch.randn(images, 3, 28, 28),
        "image_positions": (ids.flatten() == model.config.image_token_id).nonzero().flatten(),
    }
    install_kernels(model, torch.device("cpu"))
    lengths = (ids.shape[1],) * images
    # Attention as products of matrices, which the counter knows; and it overlooks `addmm_`, of the logits' gradient.
    overlooked = {torch.ops.aten.addmm_: lambda _self, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=overlooked) as counter:
        SupervisedLoss(model)(batch, lengths).backward()
    return counter.get_total_flops()


@pytest.mark.slow
def test_every_projector_is_counted() -> None:
    assert {name for name in available() if "{" not in name} <= PROJECTORS.keys()


@pytest.mark.parametrize("stage", ["align", "finetune"])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_a_step_counts_what_torch_counts(projector: str, stage: StageName) -> None:
    model = build(projector, stage)
    if projector == "identity" and stage == "align":
        prepare(model, "finetune")  # nothing at all would learn
    images, words, supervised = 3, 7, 4
    length = model.config.num_image_tokens + words
    ours = flop_model(model).count(
        images * length,
        images * length**2,  # torch's counter takes causal attention for full attention
        images * supervised,
        images,
    )
    # Projected once for all images, which is no image's: a resampler's queries, and MQT's keys, which are positions.
    tolerance = {"resampler": 0.005, "mqt": 0.012}.get(projector, 0)
    assert ours.total == pytest.approx(counted_by_torch(model, images, words, supervised), rel=tolerance, abs=0)


@pytest.mark.parametrize("text", [Olmo2Config, Phi3Config], ids=["olmo-2", "phi-3"])
def test_other_language_models(text: Any) -> None:
    """OLMo-2 has no norm in front of its layers, Phi-3 one matrix for query, key and value."""
    model = build(text_config=text(**TEXT))
    length = 16 + 7
    ours = flop_model(model).count(2 * length, 2 * length**2, 8, 2)
    assert ours.total == counted_by_torch(model, images=2, words=7, supervised=4)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["vision_tower", "vision_tower language_model", "embed_tokens", "norm", "_proj"])
def test_any_parts_may_learn(trained: str) -> None:
    """With the language model's matrices alone ("_proj"), the first layer's input needs no gradient."""
    model = build()
    for name, parameter in model.named_parameters():
        of_language_model = trained != "_proj" or "language_model" in name
        parameter.requires_grad_(of_language_model and any(part in name for part in trained.split()))
    length = 16 + 7
    ours = flop_model(model).count(2 * length, 2 * length**2, 8, 2)
    assert ours.total == counted_by_torch(model, images=2, words=7, supervised=4)


def test_recomputed_activations_do_not_count() -> None:
    """And the modules' own modes stay what they were."""
    parts = resolve_parts("finetune", PartsConfig(vision_tower={"train": "full"}), 1e-3, 0.0)
    plain, recomputing = build(), build()
    prepare_parts(plain, parts, None, checkpointing=False)
    prepare_parts(recomputing, parts, None, checkpointing=True)
    before = [module.training for module in recomputing.modules()]
    assert flop_model(recomputing) == flop_model(plain)
    assert [module.training for module in recomputing.modules()] == before


def test_the_backward_pass_is_split_by_what_learns() -> None:
    align, finetune = flop_model(build(stage="align")), flop_model(build(stage="finetune"))
    assert align.token == Flops(align.token.forward, align.token.forward, 0)
    assert align.supervised.weight_gradient == 0
    assert finetune.token == Flops(*[align.token.forward] * 3)
    assert align.pair == finetune.pair == Flops(4 * 2 * 48, 8 * 2 * 48, 0)
    assert align.tower.data_gradient == align.tower.weight_gradient == 0
    # linear_1 reads frozen features: its input needs no gradient.
    tokens, first, second = 16, 32 * 48, 48 * 48
    assert align.projector == Flops(2 * tokens * (first + second), 2 * tokens * second, 2 * tokens * (first + second))


@pytest.mark.slow
def test_layers_that_nobody_reads_count_nothing() -> None:
    whole, without_last = (flop_model(build(vision_feature_layer=layer)).tower.forward for layer in (-1, -2))
    layers = [flop_model(build(vision_feature_layer=layer)).tower.forward for layer in (0, 1, 2, 3)]
    assert layers == sorted(layers)
    assert (layers[3], layers[2]) == (whole, without_last)
    assert layers[3] - layers[2] == layers[2] - layers[1] == layers[1] - layers[0]


def test_cached_features_and_text_alone_leave_the_tower_out() -> None:
    flops = flop_model(build())
    whole = flops.count(100, causal_pairs([60, 40]), 10, 2)
    assert whole.total - flops.count(100, causal_pairs([60, 40]), 10, 2, cached_features=True).total == (
        2 * flops.tower.total
    )
    assert flops.count(100, causal_pairs([60, 40]), 10, 0).total + 2 * flops.image.total == whole.total
    assert causal_pairs([60, 40]) == 60 * 61 // 2 + 40 * 41 // 2


def test_adapters_count_as_the_small_layers_that_they_are() -> None:
    peft = pytest.importorskip("peft")
    model = build(stage="align")
    plain = flop_model(model).token
    rank, layers = 4, 2
    config = peft.LoraConfig(r=rank, target_modules=r"model\.language_model\..*\.(q|down)_proj")
    peft.inject_adapter_in_model(config, model)
    model.model.multi_modal_projector.requires_grad_(True)
    added = layers * 2 * rank * ((48 + 48) + (96 + 48))  # A and B, at a query and a down projection per layer
    assert flop_model(model).token == Flops(plain.forward + added, plain.data_gradient + added, added)


def _published(vision: str) -> LlavaNpuConfig:
    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    siglip = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    return LlavaNpuConfig(
        vision_config={"clip": clip, "siglip": siglip}[vision],
        text_config=LlamaConfig(vocab_size=32064),  # the defaults of LlamaConfig are Llama-7B's, which are Vicuna's
        image_token_index=32000,
    )


def _on_meta(vision: str, stage: StageName) -> FlopModel:
    with torch.device("meta"):
        model = LlavaNpuForConditionalGeneration(_published(vision))
    prepare(model, stage)
    return flop_model(model)


@pytest.mark.slow
def test_seven_billion_parameters() -> None:
    """LLaVA-1.5-7B: 6.607 B weights in products, 16.6 TFLOP a caption of 602 tokens, 31.0 a conversation of 760."""
    align, finetune = _on_meta("clip", "align"), _on_meta("clip", "finetune")
    assert (align.token.forward + align.supervised.forward) / 2 == pytest.approx(6.607e9, rel=1e-4)
    assert align.tower.total / 1e12 == pytest.approx(0.365, abs=0.0015)
    assert _on_meta("siglip", "align").tower.total / 1e12 == pytest.approx(0.641, abs=0.001)
    # With logits at every position, as those figures have it.
    assert align.count(602, causal_pairs([602]), 602, 1).total / 1e12 == pytest.approx(16.6, abs=0.05)
    assert finetune.count(760, causal_pairs([760]), 760, 1).total / 1e12 == pytest.approx(31.0, abs=0.05)
    # 6 × parameters × tokens overstates a step of stage 1 by half.
    assert 6 * 6.738e9 * 602 / align.count(602, causal_pairs([602]), 25, 1).total == pytest.approx(1.5, abs=0.03)
