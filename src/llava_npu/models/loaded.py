"""A model together with the processor that prepares its inputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

from llava_npu.data.conversation.jinja_template import chat_template
from llava_npu.data.tokenizer import open_tokenizer
from llava_npu.errors import UserError
from llava_npu.files.json_objects import read_json
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.processing import IMAGE_TOKEN, LlavaNpuProcessor
from llava_npu.models.vision.image_processors import load_image_processor


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

    def save_pretrained(self, folder: Path) -> None:
        """Writes a model folder that needs no other."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def load_processor(source: str, config: LlavaNpuConfig) -> LlavaNpuProcessor:
    """Loads the processor that belongs to a model of this configuration from its folder."""
    tokenizer = open_tokenizer(Path(source), "model")
    image_processor = load_image_processor(source, "model")
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id:
        raise UserError(
            f"model: the tokenizer in {source} has no {IMAGE_TOKEN} token with id {config.image_token_id}, which "
            "config.json names as image_token_index. Use the tokenizer saved with this model."
        )
    settings = _processor_settings(source)
    older = Path(source).expanduser() / "chat_template.json"  # processors of transformers before 4.50 wrote this
    if not tokenizer.chat_template and older.is_file():
        tokenizer.chat_template = read_json(older).get("chat_template")
    return LlavaNpuProcessor.for_config(
        config,
        image_processor,
        tokenizer,
        template=settings.get("template"),
        image_aspect_ratio=settings.get("image_aspect_ratio", "pad"),
    )


def _processor_settings(source: str) -> dict[str, str]:
    path = Path(source).expanduser() / "processor_config.json"
    if not path.is_file():
        return {}
    values = read_json(path)
    return {key: values[key] for key in ("template", "image_aspect_ratio") if values.get(key)}
