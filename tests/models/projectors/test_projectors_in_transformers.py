"""Projectors inside the model: loading starts on the meta device and must give loaded weights, recomputed tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.projectors import Projector, build_projector
from llava_npu.models.projectors.positions import sincos_table

OPTIONS = {
    "resampler": {"num_queries": 16},
    "tokenpacker": {},
    "c_abstractor": {"hidden_size": 32, "num_queries": 4, "num_input_tokens": 16, "depth": 1},
    "ldp": {},
    "mlp2x_gelu": {},
}


def build_model(type: str, **options: Any) -> LlavaNpuForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=24, num_attention_heads=2, image_size=28, patch_size=7
    )
    text = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100)
    torch.manual_seed(0)
    return LlavaNpuForConditionalGeneration(
        LlavaNpuConfig(
            vision_config=vision,
            text_config=text,
            projector_type=type,
            projector_options={**OPTIONS[type], **options},
            image_token_index=99,
        )
    )


def projector_of(model: LlavaNpuForConditionalGeneration) -> Projector:
    return model.model.multi_modal_projector


@pytest.mark.parametrize("type", OPTIONS)
def test_initialised_as_the_source_says(type: str) -> None:
    """Not by transformers' generic rule, which is normal with deviation 0.02 and leaves unknown parameters alone."""
    torch.manual_seed(0)
    arguments = {"vision_hidden_size": 32, "text_hidden_size": 64, **OPTIONS[type]}
    expected = build_projector(type, **arguments)
    for name, parameter in projector_of(build_model(type)).named_parameters():
        other = expected.get_parameter(name)
        assert parameter.std().item() == pytest.approx(other.std().item(), rel=0.3, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("type", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model(type).to(dtype)
    projector = projector_of(model)
    for parameter in projector.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded = projector_of(LlavaNpuForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype))
    tensors = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    for name, tensor in [*projector.named_parameters(), *projector.named_buffers()]:
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("type", OPTIONS)
def test_missing_from_the_checkpoint(type: str, tmp_path: Path) -> None:
    """What the file lacks is initialised as the source says, after construction without memory."""
    model = build_model(type)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    others = {key: tensor for key, tensor in load_file(file).items() if "projector" not in key}
    save_file(others, file, metadata={"format": "pt"})
    loaded = LlavaNpuForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    for name, parameter in projector_of(loaded).named_parameters():
        fresh = projector_of(model).get_parameter(name)
        assert parameter.std().item() == pytest.approx(fresh.std().item(), rel=0.3, abs=1e-6), name


def test_resampler_table_is_recomputed(tmp_path: Path) -> None:
    build_model("resampler").save_pretrained(tmp_path)
    loaded = LlavaNpuForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(projector_of(loaded).pos_embed, sincos_table(4, 64))
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "pos_embed" in key]


def test_learned_positions_are_loaded(tmp_path: Path) -> None:
    """A trained table must not be overwritten by the fixed one."""
    model = build_model("resampler", learned_positions=True)
    nn.init.normal_(projector_of(model).pos_embed)
    model.save_pretrained(tmp_path)
    loaded = LlavaNpuForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(projector_of(loaded).pos_embed, projector_of(model).pos_embed)
