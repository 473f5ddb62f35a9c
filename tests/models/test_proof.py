"""What is tried out on a tiny copy of a language model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    CohereConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedConfig,
)

from llava_npu.config import RunConfig
from llava_npu.errors import UserError
from llava_npu.models import compose, language_models, load, proof
from llava_npu.models.language_models import HeadShape, config_from_json, tiny_json
from llava_npu.models.proof import Findings, check_language_model, check_packing, examine
from llava_npu.ops.attention import transformers_interface
from llava_npu.training.resolve import ResolvedRun
from support import tiny


def test_sizes_of_one_architecture_share_one_copy() -> None:
    small = LlamaConfig(hidden_size=1024, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2)
    assert tiny_json(small) == tiny_json(LlamaConfig(num_attention_heads=32, num_key_value_heads=8))
    assert tiny_json(small) != tiny_json(LlamaConfig(num_attention_heads=32, num_key_value_heads=8, mlp_bias=True))


def test_a_copy_has_a_layer_of_each_kind() -> None:
    kinds = ["conv", "conv", "full_attention", "conv"]
    config = LlamaConfig(num_hidden_layers=4)
    config.layer_types = kinds
    assert json.loads(tiny_json(config))["layer_types"] == ["conv", "full_attention"]


def test_long_factors_shrink_with_the_head() -> None:
    """LongRoPE has one for each pair of channels."""
    factors = [1.0 + channel / 8 for channel in range(36)]
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "partial_rotary_factor": 0.75}
    config = Phi3Config(rope_parameters={**rope, "rope_theta": 1e4}, original_max_position_embeddings=4096)
    config = config_from_json(tiny_json(config))
    assert len(config.rope_parameters["long_factor"]) == 16 * 0.75 / 2
    assert examine(config) == Findings()


@pytest.mark.parametrize(
    "config", [GraniteConfig(logits_scaling=8.0), CohereConfig(), PhiConfig()], ids=["granite", "cohere", "phi"]
)
def test_a_head_that_is_left_out_is_noticed(config: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine(config).model is None
    monkeypatch.setattr(language_models, "describe_head", lambda _: HeadShape())
    with monkeypatch.context() as patch:
        patch.setattr(proof, "_examine", proof._examine.__wrapped__)
        with pytest.raises(UserError, match=rf"^model\.language_model: language models of type '{config.model_type}'"):
            check_language_model(config, "model.language_model")


def test_values_that_no_model_computes_with_are_named() -> None:
    assert "in its own class it gives NaN" in str(examine(LlamaConfig(rms_norm_eps=-1.0)).model)


def test_packs_that_mix_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no layer saw the lengths."""
    monkeypatch.setattr(proof, "_examine", proof._examine.__wrapped__)
    monkeypatch.setattr(transformers_interface, "KnownLengths", lambda *_: None)
    with pytest.raises(
        UserError, match=r"pack_tokens: .* 'llama': the samples of a pack influence each other"
    ) as error:
        check_packing(LlamaConfig())
    assert "Take pack_tokens out" in str(error.value)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A tower, and a language model that keeps a state besides keys and values."""
    tiny.write_clip(tmp_path / "clip")
    tiny.tokenizer().save_pretrained(tmp_path / "jamba")
    JambaConfig(use_mamba_kernels=False).save_pretrained(tmp_path / "jamba")
    return tmp_path


def test_chunks_are_no_window() -> None:
    """Llama 4 attends within chunks, which no packed attention here does."""
    found = examine(Llama4TextConfig(num_hidden_layers=2, num_local_experts=2))
    assert found.model is None
    assert found.packing is not None
    assert "neither causal nor a sliding window" in found.packing


def test_a_run_on_packs_is_refused_before_anything_is_loaded(parts: Path) -> None:
    model = {"vision_tower": str(parts / "clip"), "language_model": str(parts / "jamba")}
    run = RunConfig.model_validate(
        {"output": str(parts / "run"), "stage": "align", "model": model, "data": {"path": "none"}, "pack_tokens": 512}
    )
    with pytest.raises(UserError, match=r"pack_tokens: .* 'jamba': the samples of a pack influence each other"):
        ResolvedRun(run).check_model()
    ResolvedRun(run.model_copy(update={"pack_tokens": None})).check_model()


def test_another_family_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    tiny.write_clip(tmp_path / "clip")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=303)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        UserError, match=r"model\.language_model: .* 'gpt2' are not supported: it is not of the Llama fam"
    ):
        compose(str(tmp_path / "clip"), str(tmp_path / "gpt2"))


@pytest.mark.slow
def test_a_grown_vocabulary_keeps_the_head(tmp_path: Path) -> None:
    """Phi-2's bias grows with it; what is saved loads again, and is not said to be transformers' plain LLaVA."""
    tiny.write_clip(tmp_path / "clip")
    words = tiny.tokenizer()
    words.save_pretrained(tmp_path / "phi")
    config = PhiConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(words)
    )
    reference = PhiForCausalLM(config)
    torch.nn.init.normal_(reference.lm_head.bias)
    reference.save_pretrained(tmp_path / "phi")
    loaded = compose(str(tmp_path / "clip"), str(tmp_path / "phi"))
    loaded.model.resize_token_embeddings(400)
    assert loaded.model.lm_head.bias.shape == (400,)
    torch.testing.assert_close(loaded.model.lm_head.bias[: len(words)], reference.lm_head.bias)
    loaded.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "llava_npu"
    torch.testing.assert_close(load(tmp_path / "saved").model.lm_head.bias, loaded.model.lm_head.bias)
