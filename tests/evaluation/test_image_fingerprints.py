"""Answers about one image are never mixed with answers about another one under the same name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from llava_npu.data.image_sources import ImageFile
from llava_npu.errors import UserError
from llava_npu.evaluation.fingerprints import fingerprint_images
from llava_npu.evaluation.predictions import read_predictions
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.reports.comparison import compare_runs, read_runs
from llava_npu.evaluation.run import EvaluationOptions, evaluate
from support.benchmark_samples import pope, save_image
from support.evaluation_samples import FakeAnswerer

FIRST = "COCO_val2014_000000000000.png"


def answerer() -> FakeAnswerer:
    return FakeAnswerer(lambda question: "Yes")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pope(tmp_path / "data", [["yes", "no"], ["no", "yes"]])


def test_changed_images_are_refused_and_named(data: Path, tmp_path: Path) -> None:
    evaluate("pope", data, answerer(), tmp_path / "out")
    save_image(data.parent / "val2014" / FIRST, 99)
    with pytest.raises(UserError, match=rf"2 of 4 answered questions .*question 1, .*{FIRST}"):
        evaluate("pope", data, answerer(), tmp_path / "out")
    (data.parent / "val2014" / FIRST).unlink()  # gone is changed, too
    with pytest.raises(UserError, match="2 of 4 answered questions"):
        evaluate("pope", data, answerer(), tmp_path / "out")
    again = answerer()
    report = evaluate("pope", data, again, tmp_path / "out", EvaluationOptions(fresh=True))
    assert (len(again.asked), report.num_errors) == (4, 2)


def test_the_same_images_elsewhere_are_the_same(data: Path, tmp_path: Path) -> None:
    evaluate("pope", data, answerer(), tmp_path / "out")
    shutil.copytree(data.parent, tmp_path / "copy")
    for image in (tmp_path / "copy" / "val2014").iterdir():
        os.utime(image, (0, 0))
    again = answerer()
    evaluate("pope", tmp_path / "copy" / data.name, again, tmp_path / "out")
    assert again.asked == []


def test_a_image_that_was_missing_and_is_there_now_is_asked_about_again(data: Path, tmp_path: Path) -> None:
    image = data.parent / "val2014" / FIRST
    image.rename(tmp_path / "away.png")
    assert evaluate("pope", data, answerer(), tmp_path / "out").num_errors == 2
    assert evaluate("pope", data, answerer(), tmp_path / "out").num_errors == 2
    (tmp_path / "away.png").rename(image)
    again = answerer()
    report = evaluate("pope", data, again, tmp_path / "out")
    assert sorted(again.asked) == ["1", "3"]
    assert report.num_errors == 0
    assert any("2 questions whose images could not be read before" in note for note in report.notes)
    assert len(read_predictions(tmp_path / "out" / "predictions.jsonl")[0]) == 4


def test_runs_about_other_images_are_told_apart(data: Path, tmp_path: Path) -> None:
    evaluate("pope", data, answerer(), tmp_path / "one")
    save_image(data.parent / "val2014" / FIRST, 99)
    evaluate("pope", data, FakeAnswerer(lambda question: "No", "sha256:other"), tmp_path / "other")
    (comparison,) = compare_runs(read_runs([tmp_path / "one", tmp_path / "other"]))
    assert "other differs from one also in: image_files." in comparison.notes


def test_a_run_of_an_earlier_version_goes_on(data: Path, tmp_path: Path) -> None:
    evaluate("pope", data, answerer(), tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(line.pop("image_files") for line in lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    again = answerer()
    evaluate("pope", data, again, tmp_path / "out")
    assert again.asked == []


def test_beginning_end_and_length_count(tmp_path: Path) -> None:
    def fingerprint(content: bytes) -> str | None:
        (tmp_path / "a").write_bytes(content)
        return fingerprint_images([ImageFile(tmp_path / "a", "here")])

    long = bytes(20_000)
    contents = [b"", b"a", long, long + b"\0", b"a" + long[1:], long[1:] + b"a", bytes(5000), bytes(4999) + b"a"]
    assert len({fingerprint(content) for content in contents}) == len(contents)
    assert fingerprint_images(Question("1", "?", "?").images) is None
