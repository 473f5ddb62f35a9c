from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from test_dataset import Processor
from transformers import PreTrainedTokenizerBase

from llava_npu.data.dataset import MAX_SUBSTITUTES, ConversationDataset, substitutes
from llava_npu.data.records import load_records, open_records
from llava_npu.errors import UserError

COUNT = 40
BAD = {3: "missing image", 4: "damaged image", 5: "bad record"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    lines = []
    for number in range(COUNT):
        turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": f"answer {number}"}]
        lines.append(json.dumps({"id": str(number), "image": f"{number}.png", "conversations": turns}))
        Image.new("RGB", (2, 2)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").unlink()
    (tmp_path / "4.png").write_bytes(b"junk")
    lines[5] = '{"id": '
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_error_names_the_sample(path: Path, bytes_bpe: PreTrainedTokenizerBase) -> None:
    dataset = ConversationDataset(open_records(path), Processor(bytes_bpe))
    for number in BAD:
        with pytest.raises(UserError, match=rf"train.jsonl.*line {number + 1}"):
            dataset[number]
    with pytest.raises(UserError, match="not valid JSON at line 6"):
        load_records(path)


def test_skip_takes_a_good_one_and_says_so(path: Path, bytes_bpe: PreTrainedTokenizerBase) -> None:
    dataset = ConversationDataset(open_records(path), Processor(bytes_bpe), bad_samples="skip")
    for number in range(COUNT):
        sample = dataset[number]
        if number not in BAD:
            assert sample.replaced is None
            continue
        assert sample.replaced is not None
        assert f"line {number + 1}" in sample.replaced
        assert f"replaced by {sample.name}" in sample.replaced
        stand_in = next(each for each in substitutes(number, COUNT) if each not in BAD)
        assert sample.input_ids.equal(dataset[stand_in].input_ids)
        assert sample.pixel_values is not None


def test_the_draw_is_fixed_for_ever() -> None:
    """A run that is continued with another version takes the same substitutes."""
    assert substitutes(3, 40)[:6] == [14, 23, 25, 9, 23, 20]
    assert len(substitutes(0, 1)) == MAX_SUBSTITUTES
    assert set(substitutes(0, 1)) == {0}


def test_when_all_are_bad(path: Path, bytes_bpe: PreTrainedTokenizerBase) -> None:
    records = open_records(path, path.parent / "wrong folder")
    dataset = ConversationDataset(records, Processor(bytes_bpe), bad_samples="skip")
    with pytest.raises(UserError, match=r"None of the 16 samples .* Check the data file and data.image_root"):
        dataset[0]
