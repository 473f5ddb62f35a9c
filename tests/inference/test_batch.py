"""Many questions from Python: in order, each as it would be answered alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from llava_npu import UserError
from llava_npu.inference.batch import answer_all
from llava_npu.inference.request import Sampling
from llava_npu.models.loaded import LoadedModel


def test_answers_come_in_order(loaded: LoadedModel, pictures: list[Image.Image], tmp_path: Path) -> None:
    pictures[0].save(tmp_path / "red.png")
    questions = ["What is it?", "What else?", "Is <image> or <image> red?", "Why?"] * 3
    images: list[list] = [[tmp_path / "red.png"], [], pictures[:2], [(tmp_path / "red.png").read_bytes()]] * 3
    sampling = Sampling(max_new_tokens=6)
    together = answer_all(loaded, questions, images, sampling=sampling, max_batch=3)
    alone = [answer_all(loaded, [q], [i], sampling=sampling)[0] for q, i in zip(questions, images, strict=True)]
    assert together == alone
    assert len(set(together)) > 1


def test_the_question_is_named_in_errors(loaded: LoadedModel) -> None:
    with pytest.raises(UserError, match="question 1: image of 3 bytes: not an image"):
        answer_all(loaded, ["What?", "What?"], [[], [b"abc"]])
    assert answer_all(loaded, []) == []
