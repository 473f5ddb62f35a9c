from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from llava_npu.data.conversation.labels import IGNORE_INDEX
from llava_npu.data.dataset import ConversationDataset, collate
from llava_npu.data.records import load_records
from llava_npu.errors import UserError

IMAGE_TOKEN_ID = 399


class Processor:
    """Three tokens per image; pixels are the image's mean colour."""

    template = "chatml"
    image_token_id = IMAGE_TOKEN_ID
    num_image_tokens = 3
    tiling: Any = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def count_image_tokens(self, size: tuple[int, int]) -> int:
        return self.num_image_tokens

    def preprocess_images(self, images: list[Image.Image]) -> torch.Tensor:
        assert all(image.mode == "RGB" for image in images)
        colors = [image.resize((1, 1)).getpixel((0, 0)) for image in images]
        return torch.tensor(colors).float().reshape(len(images), 3, 1, 1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for color in ("red", "lime", "blue"):
        Image.new("RGB", (4, 4), color).save(tmp_path / f"{color}.png")

    def record(name: str, question: str, **images: Any) -> dict[str, Any]:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes " * 3}]
        return {"id": name, "conversations": turns, **images}

    records = [
        record("one", "<image>\nq", image="red.png"),
        record("text", "how are you"),
        record("two", "is <image> like <image>", image=["lime.png", "blue.png"]),
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def dataset(data: Path, bytes_bpe: PreTrainedTokenizerBase) -> ConversationDataset:
    return ConversationDataset(load_records(data), Processor(bytes_bpe))


def test_samples(dataset: ConversationDataset) -> None:
    one, text, two = (dataset[i] for i in range(3))
    assert text.pixel_values is None
    assert one.pixel_values is not None
    assert two.pixel_values is not None
    assert one.pixel_values.shape == (1, 3, 1, 1)
    assert two.pixel_values[:, :, 0, 0].tolist() == [[0, 255, 0], [0, 0, 255]]
    assert [(sample.input_ids == IMAGE_TOKEN_ID).sum().item() for sample in (one, text, two)] == [3, 0, 6]
    assert (one.labels[one.input_ids == IMAGE_TOKEN_ID] == IGNORE_INDEX).all()
    assert one.name.endswith("record 0 (id 'one')")


def test_batch(dataset: ConversationDataset) -> None:
    samples = [dataset[i] for i in range(3)]
    batch = collate(samples, pad_token_id=0)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert batch["pixel_values"][:, :, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        assert batch["input_ids"][row, :length].equal(sample.input_ids)
        assert batch["labels"][row, :length].equal(sample.labels)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert (batch["input_ids"][row, length:] == 0).all()


def test_text_only_batch_has_no_pixels(dataset: ConversationDataset) -> None:
    assert set(collate([dataset[1]], 0)) == {"input_ids", "attention_mask", "labels"}


def test_template_of_its_own(data: Path, bytes_bpe: PreTrainedTokenizerBase) -> None:
    records = load_records(data)[:1]
    sample = ConversationDataset(records, Processor(bytes_bpe), template="plain")[0]
    assert bytes_bpe.decode(sample.labels[sample.labels != IGNORE_INDEX]) == "yes yes yes \n"


def test_cut_image_is_not_opened(data: Path, bytes_bpe: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The text was cut before the second image, so the first image is all the model gets."""
    turns = [("human", "<image>\nq"), ("gpt", "a"), ("human", "<image>\nq"), ("gpt", "b")]
    record = {
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "image": ["red.png", "gone.png"],
    }
    data.write_text(json.dumps([record]))
    records, processor = load_records(data), Processor(bytes_bpe)
    with pytest.raises(UserError, match=r"gone\.png"):
        ConversationDataset(records, processor)[0]
    whole = ConversationDataset(
        records, processor, features={path: torch.zeros(1, 3, 1) for path in records[0].image_paths}
    )[0]
    second = [i for i, token in enumerate(whole.input_ids.tolist()) if token == IMAGE_TOKEN_ID][3]
    sample = ConversationDataset(records, processor, max_length=second + 2)[0]
    assert len(sample.input_ids) == second
    assert sample.pixel_values is not None
    assert sample.pixel_values.shape[0] == 1


def test_cached_features(data: Path, bytes_bpe: PreTrainedTokenizerBase) -> None:
    records = load_records(data)
    paths = [path for record in records for path in record.image_paths]
    features = {path: torch.full((1, 3, 2), float(i)) for i, path in enumerate(paths)}
    for path in paths:
        path.unlink()  # no image is opened
    dataset = ConversationDataset(records, Processor(bytes_bpe), features=features)
    batch = collate([dataset[i] for i in range(3)], 0)
    assert "pixel_values" not in batch
    assert batch["vision_features"][:, 0, 0].tolist() == [0, 1, 2]
    assert dataset[1].vision_features is None
    features.pop(paths[2])
    with pytest.raises(UserError, match=r"record 2 \(id 'two'\): image .*blue.png is not in the feature cache"):
        dataset[2]


class TilingProcessor(Processor):
    """An image is as many tiles as it is high, and takes as many tokens."""

    tiling = "as high as wide"

    def count_image_tokens(self, size: tuple[int, int]) -> int:
        return size[0]

    def preprocess_images(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.cat([torch.zeros(image.height, 3, 1, 1) for image in images])


def test_images_that_differ_in_tokens(data: Path, bytes_bpe: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    Image.new("RGB", (4, 7)).save(tmp_path / "lime.png")
    records, processor = load_records(data), TilingProcessor(bytes_bpe)
    samples = [ConversationDataset(records, processor)[index] for index in range(3)]
    assert [(sample.input_ids == IMAGE_TOKEN_ID).sum().item() for sample in samples] == [4, 0, 11]
    assert [sample.image_sizes for sample in samples] == [((4, 4),), None, ((7, 4), (4, 4))]
    batch = collate(samples, 0)
    assert batch["image_sizes"].tolist() == [[4, 4], [7, 4], [4, 4]]
    assert len(batch["pixel_values"]) == 15
    features = {path: torch.zeros(9, 3, 2) for record in records for path in record.image_paths}
    cached = ConversationDataset(records, processor, features=features)[2]
    assert (cached.vision_features.shape, cached.image_sizes) == ((18, 3, 2), samples[2].image_sizes)


@pytest.mark.parametrize("content", [None, b"", b"junk"])
def test_bad_image_names_the_record(dataset: ConversationDataset, content: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "red.png").unlink()
    if content is not None:
        (tmp_path / "red.png").write_bytes(content)
    with pytest.raises(UserError, match=r"train.json:record 0 \(id 'one'\): image .*red.png: "):
        dataset[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_in_a_data_loader(dataset: ConversationDataset, num_workers: int) -> None:
    loader = DataLoader(dataset, batch_size=2, collate_fn=lambda samples: collate(samples, 0), num_workers=num_workers)
    assert [batch["input_ids"].shape[0] for batch in loader] == [2, 1]
