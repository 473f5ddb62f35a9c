"""The model of a run, from configurations alone: no weights are read, none are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from llava_npu.config import ModelConfig, RunConfig
from llava_npu.config.recipes import find_writer
from llava_npu.errors import UserError
from llava_npu.files.home import expand_home
from llava_npu.hub.folders import check_configuration, open_part
from llava_npu.hub.hubs import fetch, is_local, local_folder, on_hub, parse_source
from llava_npu.hub.models import HubModel
from llava_npu.models.adapters import BASE, is_adapter_folder
from llava_npu.models.agreement import check_agreement
from llava_npu.models.composing import chosen_resolutions
from llava_npu.models.configuration import LlavaNpuConfig, join_configs
from llava_npu.models.loaded import open_config
from llava_npu.models.published import published_model, published_models
from llava_npu.models.sources import MODEL_FOLDER, read_source
from llava_npu.models.vision.image_processors import load_image_processor
from llava_npu.models.vision.resizing import input_size, set_size, sizes_of_towers
from llava_npu.models.vision.two_towers import TwoTowersConfig
from llava_npu.models.vocabulary import enlarged_rows

_PROCESSOR_FILE = "preprocessor_config.json"
_USUAL_SIZE = (224, 224)  # of convolutional towers, whose configuration names none


def find_tokenizer(config: RunConfig) -> Any | None:
    """The run's tokenizer, if it is on this machine."""
    named = config.model.checkpoint or config.model.language_model
    assert named is not None
    parsed = parse_source(on_hub(named, config.model.source), "model")
    source = parsed.name if isinstance(parsed, HubModel) else named
    if is_local(source) and not (Path(source) / "config.json").is_file():
        source = str(Path(source) / MODEL_FOLDER)
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception:  # noqa: BLE001  damaged ones raise every type; whoever needs its weights opens it again and says so
        return None


def model_config(
    config: RunConfig, tokenizer: Any | None = None, recipes: Path | None = None
) -> tuple[LlavaNpuConfig, list[str]]:
    """The configuration of the model that a run trains, and remarks on where it was found.

    Args:
        tokenizer: the run's, by which the vocabulary may have to grow; None: it is taken to fill it.
        recipes: a folder of run configurations. A checkpoint that does not exist yet is taken to be what the run there
            will make that writes it: so a second stage can be planned before the first has run.

    Raises:
        UserError: a configuration is missing or of an unsupported kind.
    """
    choice, remarks = config.model, []
    if choice.checkpoint is not None and not Path(choice.checkpoint).exists():
        projector = choice.projector if "projector" in choice.explicit_keys else None
        writer = find_writer(choice.checkpoint, recipes, projector) if recipes else None
        if writer is not None and writer.run.model.checkpoint is None:
            choice = writer.run.model
            remarks.append(
                f"model.checkpoint {config.model.checkpoint} does not exist yet: planned as what "
                f"{' '.join([str(writer.path), *writer.overrides])} will write"
            )
    choice = _without_adapters(choice)
    if choice.checkpoint is not None:
        model = _checkpoint(on_hub(choice.checkpoint, choice.source))
    else:
        assert choice.language_model is not None
        tower = _tower(choice, remarks)
        text = _part(on_hub(choice.language_model, choice.source), "model.language_model", remarks)
        if not hasattr(text, "vocab_size"):
            raise UserError(
                f"model.language_model: {choice.language_model} holds a model of type {text.model_type!r}, which does "
                "not read text; give a causal language model."
            )
        model = _joined(choice, tower, text, tokenizer)
    check_agreement(config.model.explicit_keys, str(config.model.checkpoint), model)
    for each in (choice, config.model):  # what it was made with, and what this run sets
        if each.image_aspect_ratio is not None:
            pinpoints = each.image_grid_pinpoints
            model.change_resolutions(chosen_resolutions(model, each.image_aspect_ratio, pinpoints))
    return model, remarks


def _tower(choice: ModelConfig, remarks: list[str]) -> Any:
    """The configuration of the run's tower, or of two, for the images that they will see."""
    configs = []
    names = choice.vision_towers
    for name, image_size in zip(names, sizes_of_towers(choice.image_size, len(names)), strict=True):
        source = on_hub(name, choice.source)
        config = _part(source, "model.vision_tower", remarks)
        config = getattr(config, "vision_config", config)
        _set_image_size(config, source, image_size, remarks)
        configs.append(config)
    return configs[0] if len(configs) == 1 else TwoTowersConfig(first=configs[0], second=configs[1])


def _set_image_size(tower: Any, source: str, image_size: int | None, remarks: list[str]) -> None:
    """Writes the size of the images that the tower will see into its configuration, as `fit_tower` does."""
    processor = _image_processor(source)
    if processor is not None:
        set_size(tower, input_size(tower, processor, image_size))
    elif image_size is not None:
        set_size(tower, (image_size, image_size))
    elif not hasattr(tower, "image_size"):
        set_size(tower, _USUAL_SIZE)
        remarks.append(f"model.vision_tower: its image processor is not here; assumed to make {_USUAL_SIZE[0]} pixels")


def _image_processor(source: str) -> Any | None:
    """The tower's image processor if it is where its configuration was read."""
    parsed = parse_source(source, "model.vision_tower")
    if isinstance(parsed, HubModel) and parsed.hub != "modelscope":
        revision = parsed.revision or "main"
        try:
            return AutoImageProcessor.from_pretrained(
                parsed.name, revision=revision, local_files_only=True, backend="pil"
            )
        except (OSError, ValueError):
            return None
    folder = fetch(parsed, "model.vision_tower", weights=False) if isinstance(parsed, HubModel) else parsed
    there = (folder / _PROCESSOR_FILE).is_file()
    return load_image_processor(str(folder), "model.vision_tower") if there else None


def _joined(choice: ModelConfig, tower: Any, text: Any, tokenizer: Any | None) -> LlavaNpuConfig:
    """As `compose` joins a tower and a language model."""
    image_token = text.vocab_size if tokenizer is None else len(tokenizer)
    words = image_token + 1 + (tokenizer is not None and tokenizer.pad_token_id is None)
    text.vocab_size = enlarged_rows(text.vocab_size, words)
    return join_configs(
        tower,
        text,
        choice.projector,
        choice.projector_options,
        image_token_index=image_token,
        vision_feature_layer=choice.vision_feature_layer,
        vision_feature_select_strategy="full" if choice.vision_select_feature == "cls_patch" else None,
        tower_fusion=choice.tower_fusion,
        scales=choice.scales,
    )


def _part(source: str, field: str, remarks: list[str]) -> Any:
    if is_local(source):
        return _read(source, field)
    parsed = parse_source(source, field)
    assert isinstance(parsed, HubModel)
    if parsed.hub == "modelscope":
        return _read(str(fetch(parsed, field, weights=False)), field)
    source, revision = parsed.name, parsed.revision
    try:
        return AutoConfig.from_pretrained(source, revision=revision or "main", local_files_only=True)
    except (OSError, ValueError):
        pass  # not in the hub's cache
    known = published_model(source)
    if known is not None:
        remarks.append(f"{field} {source}: its published shape (models/published.py)")
        return known
    try:
        return _read(str(fetch(parsed, field, weights=False)), field)
    except UserError as error:
        raise UserError(
            f"{error}\nA plan only needs its config.json: a folder that holds one is enough. Known without any: "
            f"{', '.join(published_models())}."
        ) from error


def _without_adapters(choice: ModelConfig) -> ModelConfig:
    """The base of a checkpoint that holds adapters: starting from it is starting from its base with these added."""
    folder = expand_home(choice.checkpoint or "")
    if choice.checkpoint is None or not is_local(choice.checkpoint):
        return choice
    folder = next((each for each in (folder, folder / MODEL_FOLDER) if is_adapter_folder(each)), folder)
    if not (folder / BASE).is_file():
        return choice
    base = read_source(folder / BASE)
    given = {"image_aspect_ratio": choice.image_aspect_ratio, "image_grid_pinpoints": choice.image_grid_pinpoints}
    made = base.changes or base.parts
    resolution = given if choice.image_aspect_ratio is not None else {key: made.get(key) for key in given}
    if base.checkpoint is not None:
        return _without_adapters(choice.model_copy(update={"checkpoint": base.checkpoint, **resolution}))
    parts = base.parts
    return ModelConfig(
        vision_tower=parts["vision_tower"],
        language_model=parts["language_model"],
        projector=parts["projector_type"],
        projector_options=parts.get("projector_options") or {},
        vision_feature_layer=parts.get("vision_feature_layer", -2),
        vision_select_feature="cls_patch" if parts.get("keep_prefix_tokens") else "patch",
        image_size=parts.get("image_size"),
        tower_fusion=parts.get("tower_fusion", "channel"),
        scales=parts.get("scales") or [1],
        **resolution,
    )


def _checkpoint(source: str) -> LlavaNpuConfig:
    folder = expand_home(source)
    if is_local(source):
        if not folder.exists():
            raise UserError(
                f"model.checkpoint: {source} does not exist, and no run configuration next to this one writes it. Run "
                "the first stage before, or plan with model.checkpoint=null and a model.vision_tower and "
                "model.language_model."
            )
        inner = folder / MODEL_FOLDER
        folder = inner if not (folder / "config.json").is_file() and inner.is_dir() else folder
        return open_config(folder, "model.checkpoint")
    return open_config(local_folder(source, "model.checkpoint", weights=False), "model.checkpoint")


def _read(source: str, field: str) -> Any:
    folder = expand_home(source)
    check_configuration(folder, field)
    return open_part(lambda: AutoConfig.from_pretrained(folder), field, str(folder / "config.json"))
