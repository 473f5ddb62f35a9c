"""Image processors of transformers: loading, their sizes, and the two forms that an anyres model's has.

Pillow resizes, on every machine: transformers' other backend (torchvision) gives slightly different pixels, and would
be taken wherever it happens to be installed.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, LlavaNextImageProcessorPil

from llava_npu.hub.folders import open_image_processor
from llava_npu.models.vision.anyres import Size, Tiling
from llava_npu.models.vision.two_towers import TwoTowersImageProcessor, image_processors


def load_image_processor(source: str, field: str) -> Any:
    """The image processor in a model folder or hub repository: of one image, also where LLaVA-NeXT's is stored.

    Raises:
        UserError: there is none; `field` names the setting that `source` comes from.
    """
    processor = open_image_processor(source, field)
    if isinstance(processor, LlavaNextImageProcessorPil | LlavaImageProcessorPil):  # tiles and padding are ours
        return CLIPImageProcessorPil.from_dict(_settings(processor))
    return processor


def with_pillow(image_processor: Any) -> Any:
    """The same image processor with transformers' Pillow backend, which its Auto classes take where nothing else is."""
    pillow = getattr(transformers, f"{type(image_processor).__name__}Pil", None)
    return image_processor if pillow is None else pillow.from_dict(image_processor.to_dict())


def as_llava_next(image_processor: Any, tiling: Tiling) -> LlavaNextImageProcessorPil:
    """What transformers' LLaVA-NeXT needs to cut tiles and prepare each as `image_processor` does."""
    settings = {
        "do_center_crop": False,  # its own default
        **_settings(image_processor),
        "crop_size": dict(
            zip(("height", "width"), tiling.tile_size, strict=True)
        ),  # it takes the tile's size from here
        "image_grid_pinpoints": [list(pair) for pair in tiling.resolutions],
    }
    return LlavaNextImageProcessorPil.from_dict(settings)


def processor_size(image_processor: Any) -> Size | None:
    """(height, width) of the images that an image processor makes; None if they keep shapes of their own.

    Of two towers, what holds the images of both.
    """
    if isinstance(image_processor, TwoTowersImageProcessor):
        sizes = [made for each in image_processors(image_processor) if (made := processor_size(each)) is not None]
        return (max(height for height, _ in sizes), max(width for _, width in sizes)) if len(sizes) == 2 else None
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    if size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    if size.get("shortest_edge"):
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def set_processor_size(image_processor: Any, size: Size) -> Any:
    """A copy of an image processor that makes images of this size, and changes no pixel of images that have it.

    Of two towers, the larger images get this size, the smaller ones grow as much.
    """
    height, width = size
    if isinstance(image_processor, TwoTowersImageProcessor):
        whole = processor_size(image_processor)
        assert whole is not None  # the towers were given their sizes
        resized = []
        for each in image_processors(image_processor):
            made = processor_size(each)
            assert made is not None
            resized.append(set_processor_size(each, (made[0] * height // whole[0], made[1] * width // whole[1])))
        return TwoTowersImageProcessor(*resized)
    exact = {"height": height, "width": width}
    crops = bool(getattr(image_processor, "do_center_crop", False)) and height == width
    shape = {"size": {"shortest_edge": height}, "crop_size": exact} if crops else {"size": exact, "crop_size": None}
    return type(image_processor).from_dict({**image_processor.to_dict(), **shape, "do_center_crop": crops})


def _settings(image_processor: Any) -> dict[str, Any]:
    """What is common to the image processors of single images, without what belongs to one class."""
    own = ("image_processor_type", "image_grid_pinpoints", "processor_class", "do_pad")
    return {key: value for key, value in image_processor.to_dict().items() if key not in own}
