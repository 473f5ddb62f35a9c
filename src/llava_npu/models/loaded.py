"""A model together with the processor that prepares its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llava_npu.data.conversation.jinja_template import chat_template
from llava_npu.data.conversation.templates import get_template
from llava_npu.data.tokenizer import open_tokenizer
from llava_npu.errors import UserError
from llava_npu.files.atomic import settle
from llava_npu.files.home import expand_home
from llava_npu.files.json_objects import read_json
from llava_npu.hub.folders import check_configuration, open_part
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.processing import ASPECT_RATIOS, IMAGE_TOKEN, LlavaNpuProcessor
from llava_npu.models.projectors import make_options
from llava_npu.models.vision.image_processors import load_image_processor

_FEWEST_BITS = 2  # of a stored weight


class LoadedModel(NamedTuple):
    """A model and its processor, as `load` and `compose` return them.

    Neither works without the other, so functions that use a model take both as one argument. It unpacks as a pair:
    `model, processor = load(folder)`.
    """

    model: LlavaNpuForConditionalGeneration
    processor: LlavaNpuProcessor

    def with_template(self, template: str | None) -> LoadedModel:
        """The same model prompted with another conversation template; None keeps its own."""
        if template is None or template == self.processor.template:
            return self
        processor = copy.copy(self.processor)
        processor.template = template
        processor.chat_template = chat_template(template, processor.tokenizer)
        return self._replace(processor=processor)

    def with_image_tokens(self, tokens: int | None) -> LoadedModel:
        """The same model, changed in place to give each image `tokens` tokens; None leaves it as it is.

        Raises:
            UserError: its projector cannot (`LlavaNpuConfig.image_token_choices`).
        """
        if tokens is None:
            return self
        config = self.model.config
        config.check_image_tokens([tokens], "--image-tokens")
        if tokens == config.num_image_tokens:
            return self
        config.projector_options = {**config.projector_options, "tokens": tokens}
        config.image_seq_length = tokens
        projector = self.model.model.multi_modal_projector
        projector.options = make_options(config.projector_type, **config.projector_options)
        processor = copy.copy(self.processor)
        processor.num_image_tokens = tokens
        return self._replace(processor=processor)

    def save_pretrained(self, folder: Path) -> None:
        """Writes a model folder that needs no other."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        settle(Path(folder))


def load_processor(source: str, config: LlavaNpuConfig) -> LlavaNpuProcessor:
    """Loads the processor that belongs to a model of this configuration from its folder."""
    tokenizer = open_tokenizer(Path(source), "model")
    image_processor = load_image_processor(source, "model")
    _check_vocabulary(source, config, tokenizer)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id:
        raise UserError(
            f"model: the tokenizer in {source} has no {IMAGE_TOKEN} token with id {config.image_token_id}, which "
            "config.json names as image_token_index. Use the tokenizer saved with this model."
        )
    settings = _processor_settings(source)
    if own := _processors_chat_template(expand_home(source)):
        tokenizer.chat_template = own
    return make_processor(source, config, image_processor, tokenizer, **settings)


def make_processor(
    source: str, config: LlavaNpuConfig, image_processor: Any, tokenizer: Any, **settings: Any
) -> LlavaNpuProcessor:
    """As `LlavaNpuProcessor.for_config`; its errors name `source`."""
    return open_part(
        lambda: LlavaNpuProcessor.for_config(config, image_processor, tokenizer, **settings),
        "model (processor)",
        source,
    )


def open_config(folder: Path, field: str) -> LlavaNpuConfig:
    """The configuration of the LLaVA model in a folder.

    Args:
        field: the setting that names the folder, for messages.

    Raises:
        UserError: it is absent, damaged or of another model, or a value in it is of the wrong type.
    """
    check_configuration(folder, field)
    path = folder / "config.json"
    values = read_json(path, field)
    for part in ("vision_config", "text_config"):
        inner = values.get(part)
        if not isinstance(inner, dict):
            found = f"is {inner!r:.60}" if part in values else "is missing"
            raise UserError(f"{field}: {path}: `{part}` {found}; a LLaVA model's describes that part of the model.")
    return open_part(lambda: LlavaNpuConfig.from_pretrained(folder), field, str(path))


def check_capacity(config: Any, build: Callable[[Any], torch.nn.Module], folder: Path, field: str) -> None:
    """Raises `UserError` for a configuration of far more weights than a folder's files hold.

    Found out without memory for them: loading would first make all that are missing.

    Args:
        config: of the model; `build` makes it, on torch's default device.
        field: the setting that names the folder, for messages.
    """
    with torch.device("meta"):
        model = open_part(lambda: build(config), field, str(folder / "config.json"))
    described = sum(parameter.numel() for parameter in model.parameters())
    held = sum(path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    if described * _FEWEST_BITS > held * 8:
        raise UserError(
            f"{field}: {folder / 'config.json'} describes a model of {described:,} weights, but the weight files next "
            f"to it have {held:,} bytes in all. They do not belong together; take both from the same model."
        )


def _check_vocabulary(source: str, config: LlavaNpuConfig, tokenizer: Any) -> None:
    """Raises `UserError` where a token has no row in the embedding."""
    highest, rows = max(tokenizer.get_vocab().values(), default=0), config.text_config.vocab_size
    if highest >= rows:
        raise UserError(
            f"model: the tokenizer in {source} has token ids up to {highest}, but the `vocab_size` in its config.json "
            f"is {rows}. Use the tokenizer saved with this model."
        )


def _processors_chat_template(folder: Path) -> Any:
    """Where processors of older transformers keep theirs: it comes before the tokenizer's, which may be another."""
    for path in (folder / "processor_config.json", folder / "chat_template.json"):
        if path.is_file() and (template := read_json(path).get("chat_template")):
            return template
    return None


def _processor_settings(source: str) -> dict[str, str]:
    path = expand_home(source) / "processor_config.json"
    if not path.is_file():
        return {}
    values = read_json(path)
    settings = {key: values[key] for key in ("template", "image_aspect_ratio") if values.get(key)}
    try:
        get_template(settings.get("template", "v1"))
        if settings.get("image_aspect_ratio", "pad") not in ASPECT_RATIOS:
            raise UserError(
                f"image_aspect_ratio {settings['image_aspect_ratio']!r}: allowed are {', '.join(ASPECT_RATIOS)}."
            )
    except (UserError, TypeError) as error:
        raise UserError(f"model: {path}: {error}") from error
    return settings
