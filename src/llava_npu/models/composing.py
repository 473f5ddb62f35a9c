"""Building a model from a pretrained vision tower, a pretrained language model and a fresh projector."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from llava_npu.errors import UserError
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.folders import check_loaded, check_model_folder, open_part
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.processing import IMAGE_TOKEN, LlavaNpuProcessor
from llava_npu.models.projectors import build_projector, grid_defaults
from llava_npu.models.towers import describe_tower

_NOT_THE_TOWER = ("text_", "logit_", "visual_projection", "classifier")  # left over by right from a whole CLIP
EMBEDDING_MULTIPLE = 64  # vocabulary rows are padded to this multiple, as in transformers' LLaVA (32064)


def compose(
    vision_tower: str,
    language_model: str,
    projector_type: str = "mlp2x_gelu",
    projector_options: dict[str, Any] | None = None,
    *,
    vision_feature_layer: int | list[int] = -2,
    keep_prefix_tokens: bool = False,
    image_aspect_ratio: str = "pad",
    template: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[LlavaNpuForConditionalGeneration, LlavaNpuProcessor]:
    """Joins a tower and a language model by a projector with fresh weights.

    Args:
        vision_tower: folder or hub id of a CLIP, SigLIP, DINOv2 or ResNet model (the whole CLIP will do).
        language_model: folder or hub id of a Llama-family causal language model.
        projector_type, projector_options: see `llava_npu.models.projectors`.
        vision_feature_layer: which hidden state of the tower the projector sees; −2 is LLaVA's choice for CLIP.
        keep_prefix_tokens: give the projector the tower's special tokens too (`cls_patch`).
        image_aspect_ratio: "pad" (to a square, mean colour) or "square" (the image processor's own resize and crop).
        template: conversation template; None takes the tokenizer's own if it has one, else Vicuna's.
        seed: of the projector's weights and the new embedding rows.
        dtype: of all weights.

    Raises:
        UserError: a part cannot be loaded, or the parts do not fit.
    """
    check_model_folder(vision_tower, "model.vision_tower")
    check_model_folder(language_model, "model.language_model")
    image_processor = open_part(
        lambda: AutoImageProcessor.from_pretrained(vision_tower), "model.vision_tower (image processor)", vision_tower
    )
    tokenizer = open_part(
        lambda: AutoTokenizer.from_pretrained(language_model), "model.language_model (tokenizer)", language_model
    )
    tower = open_part(lambda: load_tower(vision_tower, dtype), "model.vision_tower", vision_tower)
    decoder = open_part(lambda: _load_language_model(language_model, dtype), "model.language_model", language_model)
    if not hasattr(tower.config, "image_size"):  # a convolutional tower takes any size: the image processor decides
        tower.config.image_size = list(image_size(image_processor))

    torch.manual_seed(seed)
    image_token_id = add_special_tokens(tokenizer)
    if len(tokenizer) > decoder.get_input_embeddings().weight.shape[0]:  # never shrink a padded vocabulary
        decoder.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=EMBEDDING_MULTIPLE)

    # What an option the user left out follows from the tower (C-Abstractor's positions) is written down for good.
    options = {**grid_defaults(projector_type, describe_tower(tower.config).grid), **(projector_options or {})}
    config = LlavaNpuConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=image_token_id,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="full" if keep_prefix_tokens else None,
        projector_type=projector_type,
        projector_options=options,
        tie_word_embeddings=decoder.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaNpuForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = decoder.model
    model.lm_head = decoder.lm_head
    model.model.multi_modal_projector = build_projector(
        projector_type,
        vision_hidden_size=config.projector_input_size,
        text_hidden_size=decoder.config.hidden_size,
        **config.projector_options,
    ).to(dtype)
    model.generation_config = decoder.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    processor = LlavaNpuProcessor.for_config(
        config, image_processor, tokenizer, template=template, image_aspect_ratio=image_aspect_ratio
    )
    return model, processor


def load_tower(source: str, dtype: torch.dtype) -> Any:
    config = AutoConfig.from_pretrained(source)
    config = getattr(config, "vision_config", config)  # a whole CLIP or SigLIP: its vision half
    tower, info = AutoModel.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True)
    info["unexpected_keys"] = [
        key
        for key in info["unexpected_keys"]
        if not key.startswith(("text_", "logit_", "visual_projection", "classifier"))
    ]
    check_loaded(info, "model.vision_tower", source)
    describe_tower(tower.config)  # refuses an unknown kind before anything large is loaded
    return tower


def _load_language_model(source: str, dtype: torch.dtype) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    check_loaded(info, "model.language_model", source)
    if not (hasattr(model, "model") and hasattr(model, "lm_head")):
        raise UserError(
            f"model.language_model: {type(model).__name__} is not of the Llama family (no `model` and `lm_head`). "
            "Llama, Vicuna, Mistral, Qwen and SmolLM are."
        )
    return model


def add_special_tokens(tokenizer: Any) -> int:
    """Adds the image token, and a padding token where there is none; returns the image token's id."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def image_size(image_processor: Any) -> tuple[int, int]:
    """(height, width) of the pictures that an image processor makes."""
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    if "height" in size:
        return int(size["height"]), int(size["width"])
    return int(size["shortest_edge"]), int(size["shortest_edge"])
