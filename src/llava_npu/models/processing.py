"""Text and images in, tensors out: what the model was trained with is what it gets in evaluation and chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, LlavaNextProcessor, LlavaProcessor

from llava_npu.data.conversation.jinja_template import chat_template
from llava_npu.data.conversation.labels import IMAGE_PLACEHOLDER, encode_prompt, encode_rendered_prompt
from llava_npu.data.conversation.special_tokens import settle_bos
from llava_npu.data.conversation.templates import default_template, get_template
from llava_npu.data.images import centre_of, pad_to_square, padding_color
from llava_npu.errors import UserError
from llava_npu.hub.folders import describe
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.projectors.grid import Grid
from llava_npu.models.vision.anyres import Size, Tiling
from llava_npu.models.vision.image_processors import as_llava_next, processor_size, with_pillow
from llava_npu.models.vision.two_towers import image_processors, stack_pixels

IMAGE_TOKEN = "<image>"
ASPECT_RATIOS = ("pad", "square", "anyres")
# Image processors that resize, crop, rescale and normalise, as LLaVA's does after it has padded.
_PADDED_BY_LLAVAS = ("CLIPImageProcessor", "SiglipImageProcessor", "BitImageProcessor")


class LlavaNpuProcessor(LlavaProcessor):
    """Image processor, tokenizer and conversation template of one model.

    Attributes:
        num_image_tokens: visual tokens of one image, as the model's projector answers; with anyres, of one tile: ask
            `count_image_tokens`.
        template: name of the conversation template (`llava_npu.data.conversation.templates`).
        image_aspect_ratio: "pad" to a square with the mean colour, "square" (resize and crop), or "anyres" (tiles).
        image_grid_pinpoints: with anyres, (height, width) of what images may be scaled into.
        token_grid: with anyres, (rows, columns) of the tokens of one tile, or their number (`Tiling.token_grid`).
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
        image_grid_pinpoints: list[list[int]] | None = None,
        token_grid: list[int] | int | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            with_pillow(image_processor),
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
        self.image_grid_pinpoints = image_grid_pinpoints
        self.token_grid = token_grid
        self._plain_model_type: str | None = None

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

        `template` None is `templates.default_template`'s choice. With a configuration of an
        anyres model, `image_aspect_ratio` is "anyres".
        """
        template = template or default_template(tokenizer, config.text_config.model_type)
        get_template(template)  # raises UserError for an unknown name
        settle_bos(tokenizer)
        tower, tiling = config.tower, config.tiling
        processor = cls(
            image_processor,
            tokenizer,
            patch_size=getattr(config.vision_config, "patch_size", None),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=chat_template(template, tokenizer),
            num_additional_image_tokens=tower.num_prefix_tokens,
            num_image_tokens=config.num_image_tokens,
            template=template,
            image_aspect_ratio=image_aspect_ratio if tiling is None else "anyres",
            image_grid_pinpoints=config.image_grid_pinpoints,
            token_grid=_as_json(tiling.token_grid) if tiling is not None else None,
        )
        processor._plain_model_type = config.plain_model_type if config.is_plain_llava else None
        processor._check_pixels(config.input_size)
        return processor

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        # A plain LLaVA model needs a processor that every tool can open.
        if self._plain_model_type == "llava":
            values["processor_class"] = LlavaProcessor.__name__
            images = values.get("image_processor", {})
            if self.image_aspect_ratio == "pad" and images.get("image_processor_type") in _PADDED_BY_LLAVAS:
                # Their own crops or stretches what is not square; LLaVA's pads with the mean colour first, as in
                # training, and crops unless told otherwise.
                padded = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
                values["image_processor"] = {**images, **padded, "do_center_crop": bool(images.get("do_center_crop"))}
        elif self._plain_model_type == "llava_next":
            assert self.tiling is not None
            values["processor_class"] = LlavaNextProcessor.__name__
            values["image_processor"] = as_llava_next(self.image_processor, self.tiling).to_dict()
        return values

    def count_image_tokens(self, size: Size) -> int:
        """Visual tokens of an image of this (height, width), which `llava_npu.data.images.image_size` reads quickly."""
        tiling = self.tiling
        return self.num_image_tokens if tiling is None else tiling.num_tokens(size)

    @property
    def tiling(self) -> Tiling | None:
        """With anyres, how images are cut; else None."""
        if self.image_grid_pinpoints is None or self.token_grid is None:
            return None
        tile_size = processor_size(self.image_processor)
        assert tile_size is not None
        resolutions = tuple((height, width) for height, width in self.image_grid_pinpoints)
        grid = self.token_grid if isinstance(self.token_grid, int) else (self.token_grid[0], self.token_grid[1])
        return Tiling(resolutions, tile_size, grid)

    def preprocess_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB images of any size → (images, 3, height, width), as the tower was trained on.

        With anyres the first axis counts the tiles of all images; of two towers, the channels are those of both
        (`stack_pixels`).
        """
        tiling = self.tiling
        if tiling is not None:
            images = [tile for image in images for tile in tiling.cut(image)]
        pixels = []
        for processor in image_processors(self.image_processor):
            fitted = list(images) if tiling is not None else [self._bounded(image, processor) for image in images]
            pixels.append(processor(images=fitted, return_tensors="pt")["pixel_values"])
        return stack_pixels(pixels)

    def _check_pixels(self, size: Size) -> None:
        """Raises `UserError` unless an image becomes finite pixels of (height, width) `size`."""
        try:
            pixels = self.preprocess_images([Image.new("RGB", (size[1], size[0]))])
        except UserError:
            raise
        except Exception as error:  # whatever a setting of a wrong type leads to
            raise UserError(
                f"the image processor's settings cannot be used: {describe(error)}. Use those saved with the model."
            ) from error
        found = tuple(pixels.shape[-2:])
        if found != size:
            raise UserError(
                f"the image processor makes images of {found[0]}×{found[1]} pixels, but the model takes "
                f"{size[0]}×{size[1]} (`image_size` of its tower). Use the image processor saved with the model."
            )
        if not pixels.isfinite().all():
            raise UserError("the image processor makes infinite pixels: see its `image_mean` and `image_std`.")

    def _bounded(self, image: Image.Image, processor: Any) -> Image.Image:
        """Padded if this model pads, and of a long thin image no more than the image processor will keep."""
        size = processor.size
        edge = size.get("shortest_edge")
        if self.image_aspect_ratio == "pad":
            height, width = size.get("height", edge), size.get("width", edge)
            target = (height, width) if height and width and processor.do_resize else None
            return pad_to_square(
                image, padding_color(processor.image_mean or (0.5, 0.5, 0.5)), target, processor.resample
            )
        if edge and getattr(processor, "do_center_crop", False):
            crop = (processor.crop_size["height"], processor.crop_size["width"])
            return centre_of(image, edge, crop, processor.resample)
        return image

    def encode_prompts(
        self, conversations: Sequence[Sequence[Mapping[str, str]]], images: Sequence[Sequence[Image.Image]]
    ) -> BatchFeature:
        """Prompts for generation, exactly as in training up to where the answer starts.

        Args:
            conversations: LLaVA turns (`{"from": "human"|"gpt", "value": …}`), each ending with a human turn.
            images: the images of each conversation, in the order of its `<image>`.

        Returns:
            `input_ids` and `attention_mask` (batch, length), padded on the left, and if there are images `pixel_values`
            (all images of the batch, 3, height, width) and, with anyres, `image_sizes` (images, 2).
        """
        prompts = [
            self.encode_prompt(turns, sizes_of(pil_images), f"prompt {number}")
            for number, (turns, pil_images) in enumerate(zip(conversations, images, strict=True))
        ]
        batch = self.pad_left(prompts)
        pil_images = [image for of_one in images for image in of_one]
        if pil_images:
            batch.update(self._image_inputs(pil_images))
        return batch

    def encode_prompt(
        self, turns: Sequence[Mapping[str, str]], image_sizes: Sequence[Size], name: str, system: str | None = None
    ) -> list[int]:
        """One prompt's token ids, each image as many as the model has for one of its size.

        Args:
            image_sizes: (height, width) of each image.
            name: the prompt, for error messages.
            system: in place of the template's system prompt.
        """
        return self._expand(encode_prompt(turns, self.tokenizer, self.template, name, system), image_sizes, name)

    def encode_rendered_prompt(self, text: str, image_sizes: Sequence[Size], name: str) -> list[int]:
        """As `encode_prompt`, of a prompt that has its markup and `<image>` in it already."""
        return self._expand(encode_rendered_prompt(text, self.tokenizer, self.template), image_sizes, name)

    def _expand(self, input_ids: Sequence[int], image_sizes: Sequence[Size], name: str) -> list[int]:
        num_places = input_ids.count(IMAGE_PLACEHOLDER)
        if num_places != len(image_sizes):
            raise UserError(
                f"{name}: {num_places} {self.image_token} in the text, but {len(image_sizes)} images are given. "
                f"Put one {self.image_token} in the text for each image."
            )
        images = (self.count_image_tokens(size) for size in image_sizes)
        return [
            token
            for each in input_ids
            for token in ([self.image_token_id] * next(images) if each == IMAGE_PLACEHOLDER else [each])
        ]

    def _image_inputs(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        inputs = {"pixel_values": self.preprocess_images(images)}
        if self.tiling is not None:
            inputs["image_sizes"] = torch.tensor(sizes_of(images))
        return inputs

    def pad_left(self, sequences: Sequence[Sequence[int]]) -> BatchFeature:
        """Pads to the longest on the left, so that all answers start at the same position."""
        longest = max(len(sequence) for sequence in sequences)
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in sequences])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences])
        return BatchFeature({"input_ids": input_ids, "attention_mask": mask})

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """As transformers' processors are called (by `pipeline`, for one): text with `<image>`, and the images.

        A text is tokenized as in training: piece by piece between its images, and with one begin-of-sequence token
        where the tokenizer has sequences start with one, be it written in the text or not (`add_special_tokens=False`:
        only if it is written).
        """
        kwargs.pop("videos", None), kwargs.pop("audio", None)
        options = {**kwargs.pop("text_kwargs", {}), **kwargs.pop("common_kwargs", {}), **kwargs}
        texts = [text] if isinstance(text, str) else list(text or [])
        pil_images = _flatten(self.image_processor.fetch_images(images)) if images is not None else []
        num_places = sum(each.count(self.image_token) for each in texts)
        if texts and num_places != len(pil_images):
            raise UserError(
                f"the text has {num_places} {self.image_token}, but {len(pil_images)} images are given. "
                f"Put one {self.image_token} in the text for each image."
            )
        batch = BatchFeature()
        if texts:
            sizes = iter(sizes_of(pil_images))
            longest = options.get("max_length") if options.get("truncation") else None
            input_ids = []
            for each in texts:
                of_text = [next(sizes) for _ in range(each.count(self.image_token))]
                add_bos = options.get("add_special_tokens", True)
                placed = encode_rendered_prompt(each, self.tokenizer, self.template, add_bos=add_bos)
                input_ids.append(self._expand(placed, of_text, "text")[:longest])
            padding = {key: value for key, value in options.items() if key in _PADDING_ARGUMENTS}
            batch.update(self.tokenizer.pad({"input_ids": input_ids}, **{"padding": False, **padding}))
        if pil_images:
            batch.update(self._image_inputs([image.convert("RGB") for image in pil_images]))
        return batch


_PADDING_ARGUMENTS = frozenset({"padding", "max_length", "return_tensors", "padding_side", "pad_to_multiple_of"})


def sizes_of(images: Sequence[Image.Image]) -> list[Size]:
    """(height, width) of each."""
    return [(image.height, image.width) for image in images]


def _as_json(token_grid: Grid | int) -> list[int] | int:
    return token_grid if isinstance(token_grid, int) else list(token_grid)


def _flatten(images: Any) -> list[Image.Image]:
    if isinstance(images, list | tuple):
        return [image for nested in images for image in _flatten(nested)]
    return [images]
