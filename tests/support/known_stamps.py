"""Stamps that a classifier of ImageNet's classes must know."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from demo import assets
from demo.pictures import load_square

_SHOWN = {
    "animals/mammals/equines/zebra": "zebra",
    "animals/marsupials/koala": "koala",
    "animals/birds/tucan": "toucan",
    "food/fruit/banana": "banana",
    "food/fruit/pineapple": "pineapple",
    "household/dishes/teapot": "teapot",
}


def assert_knows_stamps(tower: Path, image_size: int) -> None:
    """The real classifier in this folder names at least five of the six."""
    stamps = assets.fetch(assets.STAMPS) / "usr/share/tuxpaint/stamps"
    processor = AutoImageProcessor.from_pretrained(tower)
    model = AutoModelForImageClassification.from_pretrained(tower)
    pictures = [load_square(stamps / f"{name}.png", image_size) for name in _SHOWN]
    with torch.inference_mode():
        logits = model(**processor(images=pictures, return_tensors="pt")).logits
    named = [model.config.id2label[index] for index in logits.argmax(-1).tolist()]
    assert sum(name == expected for name, expected in zip(named, _SHOWN.values(), strict=True)) >= 5, named
