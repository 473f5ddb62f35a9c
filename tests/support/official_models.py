"""Checkpoints as official LLaVA writes them, made from transformers' LLaVA by a renaming of its own (llava-facts: the
table of key layouts), so that whatever reads them is compared with something it did not make."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from support import tiny

ROWS = 283  # of the tiny tokenizer: the vocabulary of the language model, before tokens are added
IMAGE_TOKEN_ID = ROWS
TEXT = {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}


def reference_model(tower: str = "clip", vocab_size: int = 320) -> LlavaForConditionalGeneration:
    """Transformers' own LLaVA with random weights and a rotary base that is not the default."""
    torch.manual_seed(0)
    strategy = "default" if tower == "clip" else "full"
    vision = tiny.clip_config() if tower == "clip" else tiny.siglip_config()
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=tiny.text_config(vocab_size, **TEXT),
            image_token_index=IMAGE_TOKEN_ID,
            vision_feature_select_strategy=strategy,
        )
    ).eval()


def official_name(name: str) -> str:
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    if name.startswith("model.vision_tower."):
        return "model.vision_tower.vision_tower.vision_model." + name.removeprefix("model.vision_tower.")
    for ours, theirs in (("linear_1", "0"), ("linear_2", "2")):
        name = name.replace(f"model.multi_modal_projector.{ours}", f"model.mm_projector.{theirs}")
    return name


def official_weights(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    weights = {official_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:ROWS].clone()
    return weights


def official_config(tower: Path, **changes: object) -> dict[str, object]:
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "vocab_size": ROWS,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "torch_dtype": "float32",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": str(tower),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        **changes,
    }


def write_official(folder: Path, tower: Path, weights: dict[str, torch.Tensor], form: str, **config: object) -> Path:
    """Writes `weights` as `form`: "bin", "safetensors", or "shards" (pickles with an index)."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(official_config(tower, **config)))
    tiny.tokenizer().save_pretrained(folder)
    stale = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}  # old checkpoints hold these too
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors")
    elif form == "bin":
        torch.save({**weights, **stale}, folder / "pytorch_model.bin")
    else:
        names = list(weights)
        parts = [names[::2], names[1::2]]
        files = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)]
        for part, file in zip(parts, files, strict=True):
            torch.save({name: weights[name] for name in part}, folder / file)
        weight_map = {name: file for part, file in zip(parts, files, strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_language_model(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The language model by itself, as a base of projectors and LoRA weights."""
    text = {name: tensor for name, tensor in weights.items() if ".mm_projector." not in name and "vision" not in name}
    folder.mkdir(parents=True)
    tiny.text_config(ROWS, **TEXT).save_pretrained(folder)
    save_file(text, folder / "model.safetensors")
    tiny.tokenizer().save_pretrained(folder)
    return folder


def tokenizer_length(folder: Path) -> int:
    return len(AutoTokenizer.from_pretrained(folder))
