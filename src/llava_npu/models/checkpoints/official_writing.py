"""Writing official LLaVA's layout (haotian-liu/LLaVA), which its own code and what grew around it read.

The vision tower goes into a folder `vision_tower` of its own, as official LLaVA loads towers, unless the name of an
equal one is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava_npu.errors import UserError
from llava_npu.files.json_objects import read_json
from llava_npu.hub.hubs import local_folder
from llava_npu.models.checkpoints.checkpoint import Checkpoint, Weights, checked
from llava_npu.models.checkpoints.official import LANGUAGE_MODELS, TEMPLATE_KEY
from llava_npu.models.checkpoints.projectors import LLAVA, LLAVA_NPU_2024, Layout, to_original
from llava_npu.models.checkpoints.weight_files import find_weights, write_weights
from llava_npu.models.checkpoints.weight_names import (
    EMBEDDING,
    LM_HEAD,
    PROJECTOR,
    VISION_TOWER,
    to_official,
    tower_weight,
)
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.projectors import canonical_type, registered_name

TOWER_FOLDER = "vision_tower"
_ARCHITECTURES = {
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
    "qwen2": "LlavaQwenForCausalLM",
}
_TYPES = {inner: name for name, inner in LANGUAGE_MODELS.items() if name != "llava"}
# What its code takes from config.json about the language model; transformers of its time spelt rotary settings so.
_TEXT_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "head_dim",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
)
_PREDECESSOR_NAMES = {"ldpv2": "ldp", "c_abstractor": "abs"}


def write_official(
    checkpoint: Checkpoint, folder: Path, shard_bytes: int, final: Path, vision_tower: str | None = None
) -> None:
    """Writes a folder that official LLaVA opens; with a projector of the predecessor's, one that the predecessor opens.

    Args:
        folder: where to write; `final` is what it will be called.
        vision_tower: the name of a tower whose weights equal this model's, to be named instead of written.

    Raises:
        UserError: official LLaVA has no such language model or projector.
    """
    config, rows = checkpoint.config, _vocabulary(checkpoint)
    if config.tower.members:
        raise UserError(f"{checkpoint.source}: has two vision towers; official LLaVA has one. Write it with --to hf.")
    inner = config.text_config.model_type
    if inner not in _TYPES:
        raise UserError(
            f"{checkpoint.source}: official LLaVA has no language model of type {inner!r}, only {', '.join(_TYPES)}."
        )
    layout = _projector_layout(checkpoint)
    projector: dict[str, torch.Tensor] = {}
    tower: dict[str, torch.Tensor] = {}

    def language_model() -> Weights:
        for name, tensor in checked(checkpoint):
            if name.startswith(PROJECTOR):
                projector[name.removeprefix(PROJECTOR)] = tensor
            elif name.startswith(VISION_TOWER):
                tower[name.removeprefix(VISION_TOWER)] = tensor
            else:
                yield to_official(name), tensor[:rows] if name in (EMBEDDING, LM_HEAD) else tensor
        renamed = to_original(config.projector_type, layout, projector) if projector else {}
        for name, tensor in renamed.items():
            yield to_official(PROJECTOR + name), tensor

    write_weights(folder, language_model(), shard_bytes)
    if vision_tower is not None:
        _check_equal_tower(checkpoint, tower, vision_tower)
    else:
        _write_tower(checkpoint, tower, folder / TOWER_FOLDER, shard_bytes)
    values = _config_values(checkpoint, rows, layout, vision_tower or str(final.resolve() / TOWER_FOLDER))
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    _write_tokenizer(checkpoint, folder, rows)
    for path in checkpoint.companions:
        (folder / path.name).write_bytes(path.read_bytes())


def _vocabulary(checkpoint: Checkpoint) -> int:
    """Rows of the embedding without those of the tokens that were added for images and padding."""
    tokenizer = checkpoint.processor.tokenizer
    added = {tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<pad>")}
    first = checkpoint.config.image_token_id
    if all(index in added for index in range(first, len(tokenizer))):
        return int(first)
    return int(checkpoint.config.text_config.vocab_size)


def _projector_layout(checkpoint: Checkpoint) -> Layout:
    family = registered_name(checkpoint.config.projector_type)
    for layout in (LLAVA, LLAVA_NPU_2024):
        if family in layout.names:
            return layout
    raise UserError(
        f"{checkpoint.source}: neither official LLaVA nor LLaVA-NPU of 2024 has a projector "
        f"{checkpoint.config.projector_type!r}. Write it with --to hf."
    )


def _write_tower(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor], folder: Path, shard_bytes: int) -> None:
    folder.mkdir()
    write_weights(folder, iter(weights.items()), shard_bytes)
    checkpoint.config.vision_config.save_pretrained(folder)
    checkpoint.processor.image_processor.save_pretrained(folder)


def _check_equal_tower(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor], named: str) -> None:
    """Raises `UserError` unless the tower that will be named has this model's weights: training it would be lost."""
    folder = local_folder(named, "--vision-tower")
    files = find_weights(folder) if folder.is_dir() else None
    if files is None:
        raise UserError(f"--vision-tower: {named} is not a folder with the weights of a vision tower.")
    kind, equal = checkpoint.config.tower.kind, set()
    for name, tensor in files:
        own = weights.get(tower_weight(name.removeprefix("vision_tower."), kind).removeprefix(VISION_TOWER))
        if own is not None and own.shape == tensor.shape and torch.equal(own, tensor.to(own.dtype)):
            equal.add(name)
    if len(equal) < len(weights):
        raise UserError(
            f"--vision-tower: {len(weights) - len(equal)} of {len(weights)} weights of the vision tower in "
            f"{checkpoint.source} are not those of {named}: it was trained, or is another tower. Leave the option out, "
            "and its weights are written next to the model."
        )


def _config_values(checkpoint: Checkpoint, rows: int, layout: Layout, tower: str) -> dict[str, Any]:
    config = checkpoint.config
    text = config.text_config.to_dict()
    values = {key: text[key] for key in _TEXT_KEYS if text.get(key) is not None}
    rotary = dict(text.get("rope_parameters") or {})
    values["rope_theta"] = rotary.pop("rope_theta", text.get("rope_theta", 10000.0))
    if rotary.pop("rope_type", "default") != "default":
        values["rope_scaling"] = {"type": text["rope_parameters"]["rope_type"], **rotary}
    kind = canonical_type(config.projector_type)
    return {
        "architectures": [_ARCHITECTURES[text["model_type"]]],
        "model_type": _TYPES[text["model_type"]],
        **values,
        "vocab_size": rows,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "torch_dtype": str(config.dtype).removeprefix("torch.") if config.dtype else "float32",
        "mm_vision_tower": tower,
        "mm_hidden_size": config.projector_input_size,
        "mm_projector_type": _PREDECESSOR_NAMES.get(kind, kind) if layout is LLAVA_NPU_2024 else kind,
        **{key: config.projector_options[key] for key in ("scale_factor",) if key in config.projector_options},
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if config.keep_prefix_tokens else "patch",
        TEMPLATE_KEY: checkpoint.processor.template,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": checkpoint.processor.image_aspect_ratio,
        **_anyres(config),
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
    }


def _anyres(config: LlavaNpuConfig) -> dict[str, Any]:
    if config.image_grid_pinpoints is None:
        return {}
    pinpoints = [list(reversed(pair)) for pair in config.image_grid_pinpoints]  # (width, height)
    assert config.tiling is not None
    return {
        "image_grid_pinpoints": pinpoints,
        "mm_patch_merge_type": "spatial_unpad" if config.tiling.is_map else "flat",
    }


def _write_tokenizer(checkpoint: Checkpoint, folder: Path, rows: int) -> None:
    """The tokenizer without the tokens that official LLaVA does not know: it marks images by a number below zero."""
    checkpoint.processor.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        values = read_json(path)
        values["added_tokens"] = [token for token in values.get("added_tokens", []) if token["id"] < rows]
        path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        settings.pop(key, None)
    if (checkpoint.processor.tokenizer.pad_token_id or 0) >= rows:
        settings.pop("pad_token", None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
