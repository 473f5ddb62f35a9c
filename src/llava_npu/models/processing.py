"""Text and images in, tensors out: what the model was trained with is what it gets in evaluation and chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, LlavaProcessor

from llava_npu.data.images import pad_to_square
from llava_npu.data.jinja_template import chat_template
from llava_npu.data.labels import IMAGE_PLACEHOLDER, encode_prompt, encode_rendered_prompt
from llava_npu.data.templates import get_template
from llava_npu.errors import UserError
from llava_npu.models.configuration import LlavaNpuConfig

IMAGE_TOKEN = "<image>"
ASPECT_RATIOS = ("pad", "square")


class LlavaNpuProcessor(LlavaProcessor):
    """Image processor, tokenizer and conversation template of one model.

    Attributes:
        num_image_tokens: visual tokens of one image, as the model's projector answers.
        template: name of the conversation template (`llava_npu.data.templates`).
        image_aspect_ratio: "pad" to a square with the mean colour, or "square" (resize and crop).
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        num_additional_image_tokens: int = 0,
        num_image_tokens: int = 0,
        template: str = "v1",
        image_aspect_ratio: str = "pad",
        **kwargs: Any,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )
        if image_aspect_ratio not in ASPECT_RATIOS:
            raise UserError(f"image_aspect_ratio {image_aspect_ratio!r}: allowed are {', '.join(ASPECT_RATIOS)}.")
        self.num_image_tokens = num_image_tokens
        self.template = template
        self.image_aspect_ratio = image_aspect_ratio
        self._plain_llava = False

    @classmethod
    def for_config(
        cls,
        config: LlavaNpuConfig,
        image_processor: Any,
        tokenizer: Any,
        *,
        template: str | None = None,
        image_aspect_ratio: str = "pad",
    ) -> LlavaNpuProcessor:
        """The processor of a model with this configuration.

        `template` None takes the tokenizer's own chat template if it has one, else Vicuna's.
        """
        template = template or ("tokenizer" if getattr(tokenizer, "chat_template", None) else "v1")
        get_template(template)  # raises UserError for an unknown name
        tower = config.tower
        processor = cls(
            image_processor,
            tokenizer,
            patch_size=getattr(config.vision_config, "patch_size", None),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=chat_template(template, tokenizer),
            num_additional_image_tokens=tower.num_prefix_tokens,
            num_image_tokens=config.num_image_tokens,
            template=template,
            image_aspect_ratio=image_aspect_ratio,
        )
        processor._plain_llava = config.is_plain_llava
        return processor

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if self._plain_llava:  # beside a plain LLaVA model belongs a processor that every tool can open
            values["processor_class"] = LlavaProcessor.__name__
            pictures = values.get("image_processor", {})
            if self.image_aspect_ratio == "pad" and pictures.get("image_processor_type") == "CLIPImageProcessor":
                # CLIP's own crops what is not square; LLaVA's pads with the mean colour first, as in training.
                values["image_processor"] = {**pictures, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
        return values

    def preprocess_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures of any size → (images, 3, height, width), as the tower was trained on."""
        if self.image_aspect_ratio == "pad":
            mean = self.image_processor.image_mean or (0.5, 0.5, 0.5)
            red, green, blue = (int(255 * channel) for channel in mean)
            images = [pad_to_square(image, (red, green, blue)) for image in images]
        return self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]

    def encode_prompts(
        self, conversations: Sequence[Sequence[Mapping[str, str]]], images: Sequence[Sequence[Image.Image]]
    ) -> BatchFeature:
        """Prompts for generation, exactly as in training up to where the answer starts.

        Args:
            conversations: LLaVA turns (`{"from": "human"|"gpt", "value": …}`), each ending with a human turn.
            images: the pictures of each conversation, in the order of its `<image>`.

        Returns:
            `input_ids` and `attention_mask` (batch, length), padded on the left, and `pixel_values` (all images of the
            batch, 3, height, width) if there are any.
        """
        prompts = [
            self.encode_prompt(turns, len(pictures), f"prompt {number}")
            for number, (turns, pictures) in enumerate(zip(conversations, images, strict=True))
        ]
        batch = self.pad_left(prompts)
        pictures = [picture for of_one in images for picture in of_one]
        if pictures:
            batch["pixel_values"] = self.preprocess_images(pictures)
        return batch

    def encode_prompt(
        self, turns: Sequence[Mapping[str, str]], num_images: int, name: str, system: str | None = None
    ) -> list[int]:
        """One prompt's token ids, each image as many as the model has for one.

        Args:
            name: the prompt, for error messages.
            system: in place of the template's system prompt.
        """
        return self._expand(encode_prompt(turns, self.tokenizer, self.template, name, system), num_images, name)

    def encode_rendered_prompt(self, text: str, num_images: int, name: str) -> list[int]:
        """As `encode_prompt`, of a prompt that has its markup and `<image>` in it already."""
        return self._expand(encode_rendered_prompt(text, self.tokenizer), num_images, name)

    def _expand(self, input_ids: Sequence[int], num_images: int, name: str) -> list[int]:
        num_places = input_ids.count(IMAGE_PLACEHOLDER)
        if num_places != num_images:
            raise UserError(
                f"{name}: {num_places} {self.image_token} in the text, but {num_images} images are given. "
                f"Put one {self.image_token} in the text for each image."
            )
        image = [self.image_token_id] * self.num_image_tokens
        return [token for each in input_ids for token in (image if each == IMAGE_PLACEHOLDER else [each])]

    def pad_left(self, sequences: Sequence[Sequence[int]]) -> BatchFeature:
        """Pads to the longest on the left, so that all answers start at the same position."""
        longest = max(len(sequence) for sequence in sequences)
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in sequences])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences])
        return BatchFeature({"input_ids": input_ids, "attention_mask": mask})

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """As transformers' processors are called (by `pipeline`, for one): text with `<image>`, and the images."""
        kwargs.pop("videos", None), kwargs.pop("audio", None)
        text_kwargs = {**kwargs.pop("text_kwargs", {}), **kwargs.pop("common_kwargs", {}), **kwargs}
        text_kwargs = {key: value for key, value in text_kwargs.items() if key in _TEXT_ARGUMENTS}
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = _flatten(self.image_processor.fetch_images(images)) if images is not None else []
        num_places = sum(each.count(self.image_token) for each in texts)
        if texts and num_places != len(pictures):
            raise UserError(
                f"the text has {num_places} {self.image_token}, but {len(pictures)} images are given. "
                f"Put one {self.image_token} in the text for each image."
            )
        batch = BatchFeature()
        if texts:
            expanded = [each.replace(self.image_token, self.image_token * self.num_image_tokens) for each in texts]
            batch.update(self.tokenizer(expanded, **text_kwargs))
        if pictures:
            batch["pixel_values"] = self.preprocess_images([picture.convert("RGB") for picture in pictures])
        return batch


_TEXT_ARGUMENTS = frozenset(
    {
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "add_special_tokens",
        "padding_side",
        "pad_to_multiple_of",
    }
)


def _flatten(images: Any) -> list[Image.Image]:
    if isinstance(images, list | tuple):
        return [picture for nested in images for picture in _flatten(nested)]
    return [images]
