"""Building a model from a pretrained vision tower, a pretrained language model and a fresh projector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llava_npu.data.tokenizer import open_tokenizer
from llava_npu.errors import UserError
from llava_npu.hub.folders import check_loaded, check_model_folder, open_part
from llava_npu.hub.hubs import local_folder
from llava_npu.models.checkpoints.mapped import load_mapped
from llava_npu.models.checkpoints.weight_files import check_finite
from llava_npu.models.configuration import LlavaNpuConfig, join_configs
from llava_npu.models.loaded import LoadedModel, check_capacity, make_processor
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.processing import IMAGE_TOKEN, LlavaNpuProcessor
from llava_npu.models.proof import check_language_model
from llava_npu.models.vision.anyres import Size, default_resolutions, resolutions_from_llava
from llava_npu.models.vision.image_processors import load_image_processor, set_processor_size
from llava_npu.models.vision.resizing import fit_tower, sizes_of_towers
from llava_npu.models.vision.towers import describe_tower
from llava_npu.models.vision.two_towers import TwoTowers, TwoTowersImageProcessor, join_towers
from llava_npu.models.vocabulary import enlarge_vocabulary, enlarge_vocabulary_once

# Left over by right from a whole CLIP or a classifier, and missing by right where a tower was published without them.
_NOT_THE_TOWER = ("text_", "logit_", "visual_projection", "classifier", "pooler.", "head.")


def compose(
    vision_tower: str | Sequence[str],
    language_model: str,
    projector_type: str = "mlp2x_gelu",
    projector_options: dict[str, Any] | None = None,
    *,
    vision_feature_layer: int | list[int] = -2,
    keep_prefix_tokens: bool = False,
    image_aspect_ratio: str = "pad",
    image_grid_pinpoints: list[list[int]] | None = None,
    image_size: int | Sequence[int] | None = None,
    tower_fusion: str = "channel",
    scales: list[int] | None = None,
    template: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    mapped: bool = False,
) -> LoadedModel:
    """Joins a tower and a language model by a projector with fresh weights.

    Args:
        vision_tower: folder or hub id (`hubs.py`) of a vision tower (`towers.py`; a whole CLIP will do), or of two that
            both see every image (`two_towers.py`).
        language_model: folder or hub id of a causal language model of the Llama family (table in docs/parts.md).
        projector_type, projector_options: see `llava_npu.models.projectors`.
        vision_feature_layer: which hidden state of the tower the projector sees; −2 is LLaVA's choice for CLIP.
        keep_prefix_tokens: give the projector the tower's special tokens too (`cls_patch`).
        image_aspect_ratio: as `LlavaNpuProcessor` has it.
        image_grid_pinpoints: with anyres, (width, height) of the resolutions to choose from; None: LLaVA-1.6's.
        image_size: pixels per side, if other than the tower's published size; of two towers also one for each.
        tower_fusion, scales: as `LlavaNpuConfig` has them.
        template: conversation template; None takes the tokenizer's own if it has one, else Vicuna's.
        seed: of the projector's weights and the new embedding rows.
        dtype: of all weights.
        mapped: pretrained weights stay in their files, in the types that they have there (`mapped.py`); new ones get
            `dtype`, which must be float32.

    Raises:
        UserError: a part cannot be loaded, or the parts do not fit.
    """
    parts = _open_parts(vision_tower, language_model, image_size, None if mapped else dtype)
    if isinstance(parts.tower, TwoTowers) and keep_prefix_tokens:
        raise UserError("vision_select_feature 'cls_patch': of two towers only patches have places in common.")
    scales = scales or [1]
    resolutions = _resolutions(image_aspect_ratio, image_grid_pinpoints, parts.input_size(scales))
    torch.manual_seed(seed)
    config = join_configs(
        parts.tower.config,
        parts.decoder.config,
        projector_type,
        projector_options,
        image_token_index=parts.add_tokens(mapped=mapped),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="full" if keep_prefix_tokens else None,
        tower_fusion=tower_fusion,
        scales=scales,
        image_grid_pinpoints=resolutions,
    )
    model = parts.join(config, dtype)
    return LoadedModel(model, parts.make_processor(config, template, image_aspect_ratio))


@dataclass(frozen=True)
class _Parts:
    """A model's pretrained parts.

    Attributes:
        tower, image_processor: of one tower, or of two as one.
        decoder: the language model with its head.
        source: their folders, for messages.
    """

    tower: Any
    image_processor: Any
    decoder: Any
    tokenizer: Any
    source: str

    def input_size(self, scales: list[int]) -> Size:
        height, width = describe_tower(self.tower.config).image_size
        return height * max(scales), width * max(scales)

    def add_tokens(self, *, mapped: bool) -> int:
        """Adds what tokens a LLaVA needs, and rows where the decoder has none left; returns the image token's id."""
        image_token_id = add_special_tokens(self.tokenizer)
        rows = self.decoder.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > rows:  # never shrink a padded vocabulary
            enlarge = enlarge_vocabulary_once if mapped else enlarge_vocabulary
            enlarge(self.decoder, len(self.tokenizer))
        return image_token_id

    def join(self, config: LlavaNpuConfig, dtype: torch.dtype) -> LlavaNpuForConditionalGeneration:
        """The model of these parts; what is new in it has fresh weights of type `dtype`."""
        with torch.device("meta"):
            model = LlavaNpuForConditionalGeneration(config)
        model.model.vision_tower = self.tower
        model.model.language_model = self.decoder.model
        model.set_output_embeddings(self.decoder.lm_head)
        model.model.multi_modal_projector = config.new_projector().to(dtype)
        if config.tiling is not None and config.tiling.is_map:
            model.model.image_newline = _fresh_newline(self.decoder.config.hidden_size, dtype)
        model.generation_config = self.decoder.generation_config
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def make_processor(
        self, config: LlavaNpuConfig, template: str | None, image_aspect_ratio: str
    ) -> LlavaNpuProcessor:
        image_processor = self.image_processor
        if config.image_grid_pinpoints is not None or config.scales != [1]:
            image_processor = set_processor_size(image_processor, config.input_size)
        settings = {"template": template, "image_aspect_ratio": image_aspect_ratio}
        return make_processor(self.source, config, image_processor, self.tokenizer, **settings)


def _open_parts(
    vision_tower: str | Sequence[str],
    language_model: str,
    image_size: int | Sequence[int] | None,
    dtype: torch.dtype | None,
) -> _Parts:
    """`dtype` None: mapped, as stored."""
    named = [vision_tower] if isinstance(vision_tower, str) else vision_tower
    towers = [_model_folder(each, "model.vision_tower") for each in named]
    language_model = _model_folder(language_model, "model.language_model")
    tokenizer = open_tokenizer(Path(language_model), "model.language_model")
    tower, image_processor = _open_towers(towers, image_size, dtype)
    decoder = open_part(lambda: _load_language_model(language_model, dtype), "model.language_model", language_model)
    return _Parts(tower, image_processor, decoder, tokenizer, f"{' and '.join(towers)} with {language_model}")


def change_aspect_ratio(
    loaded: LoadedModel,
    image_aspect_ratio: str,
    image_grid_pinpoints: list[list[int]] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Makes a model that was trained one way see images in another, as LLaVA-1.6 goes from squares to anyres.

    Args:
        loaded: its model is changed in place: with "anyres" it gets an `image_newline` where it lacks one and tokens
            are laid out as a map; else it loses it.
        image_aspect_ratio, image_grid_pinpoints, seed: as in `compose`.

    Returns:
        the model with the processor that now belongs to it.
    """
    model, processor = loaded
    config = model.config
    resolutions = chosen_resolutions(config, image_aspect_ratio, image_grid_pinpoints)
    config.change_resolutions(resolutions)
    if config.tiling is None or not config.tiling.is_map:
        model.model.image_newline = None
    elif model.model.image_newline is None:
        torch.manual_seed(seed)
        # The type in the configuration: of a mapped model weights have several.
        model.model.image_newline = _fresh_newline(config.text_config.hidden_size, config.dtype or model.dtype)
    image_processor = processor.image_processor
    if resolutions is not None:
        image_processor = set_processor_size(image_processor, config.input_size)
    changed = LlavaNpuProcessor.for_config(
        config,
        image_processor,
        processor.tokenizer,
        template=processor.template,
        image_aspect_ratio=image_aspect_ratio,
    )
    return LoadedModel(model, changed)


def chosen_resolutions(
    config: LlavaNpuConfig, image_aspect_ratio: str, image_grid_pinpoints: list[list[int]] | None
) -> list[list[int]] | None:
    """What a model that is to see images in this way chooses from, (height, width); None: it cuts no tiles."""
    resolutions = _resolutions(image_aspect_ratio, image_grid_pinpoints, config.input_size)
    if image_aspect_ratio == "anyres" and image_grid_pinpoints is None:
        return config.image_grid_pinpoints or resolutions
    return resolutions


def _model_folder(source: str, field: str) -> str:
    folder = local_folder(source, field)
    check_model_folder(folder, field)
    return str(folder)


def _resolutions(
    image_aspect_ratio: str, pinpoints: list[list[int]] | None, tile_size: tuple[int, int]
) -> list[list[int]] | None:
    """What anyres chooses from, (height, width); None for the other ways."""
    if image_aspect_ratio == "anyres":
        return default_resolutions(tile_size) if pinpoints is None else resolutions_from_llava(pinpoints)
    if pinpoints is not None:
        raise UserError(f"image_grid_pinpoints belong to image_aspect_ratio 'anyres', not {image_aspect_ratio!r}.")
    return None


def _fresh_newline(width: int, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(width, dtype=dtype) * width**-0.5)  # as LLaVA-1.6


def _open_towers(
    sources: Sequence[str], image_size: int | Sequence[int] | None, dtype: torch.dtype | None
) -> tuple[Any, Any]:
    """The tower in a folder with its image processor, fitted to a size of images; or those in two folders as one.

    `dtype` None: mapped, as stored.
    """
    opened = []
    for source, size in zip(sources, sizes_of_towers(image_size, len(sources)), strict=True):
        image_processor = load_image_processor(source, "model.vision_tower")
        tower = open_part(partial(load_tower, source, dtype), "model.vision_tower", source)
        opened.append(fit_tower(tower, image_processor, size, mapped=dtype is None))
    if len(opened) == 1:
        return opened[0]
    towers, image_processors = zip(*opened, strict=True)
    return join_towers(*towers), TwoTowersImageProcessor(*image_processors)


def load_tower(source: str, dtype: torch.dtype | None) -> Any:
    """The vision tower of a model folder; `dtype` None: mapped, as stored."""
    config = AutoConfig.from_pretrained(source)
    config = getattr(config, "vision_config", config)  # a whole CLIP or SigLIP: its vision half
    describe_tower(config)  # refuses an unfit kind before anything large is loaded
    check_capacity(config, AutoModel.from_config, Path(source), "model.vision_tower")
    tower, info = _pretrained(AutoModel, source, config, dtype)
    check_loaded(info, "model.vision_tower", source, ignore=_NOT_THE_TOWER)
    for name, parameter in tower.named_parameters():
        if name in info["missing_keys"]:  # a pooler: nothing reads it, and it should not differ from load to load
            torch.nn.init.zeros_(parameter)
    check_finite(tower.named_parameters(), f"model.vision_tower: {source}", shared=True)
    return tower


def _pretrained(kind: Any, source: str, config: Any, dtype: torch.dtype | None) -> tuple[Any, dict[str, Any]]:
    """A model of one of transformers' auto classes, with its loading information; `dtype` None: mapped, as stored."""
    if dtype is not None:
        loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True
        )
        return loaded
    with torch.device("meta"):
        model_class = type(kind.from_config(config))
    return load_mapped(model_class, Path(source), config)


def _load_language_model(source: str, dtype: torch.dtype | None) -> Any:
    config = AutoConfig.from_pretrained(source)
    check_language_model(config, "model.language_model")  # before anything large is loaded
    check_capacity(config, AutoModelForCausalLM.from_config, Path(source), "model.language_model")
    model, info = _pretrained(AutoModelForCausalLM, source, config, dtype)
    check_loaded(info, "model.language_model", source)
    check_finite(model.named_parameters(), f"model.language_model: {source}", shared=True)
    return model


def add_special_tokens(tokenizer: Any) -> int:
    """Adds the image token, and a padding token where there is none; returns the image token's id."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
