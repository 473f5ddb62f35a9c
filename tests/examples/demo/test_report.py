"""The report says what was measured, whether it is good or bad."""

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from demo.assets import EASY_VQA
from demo.profiles import PROFILES
from demo.questions import CONCEPTS, SHAPES
from demo.report import TOWER_NOTE, Example, Findings, write_report
from llava_npu.evaluation.ablations import GIVEN, NONE, SHUFFLED


def _value(value: float, width: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width, "count": 100}


def _parts(value: float, **more: float) -> dict[str, dict[str, dict[str, float]]]:
    of_one = {"unrotated": _value(value), **{name.replace("_", " "): _value(each) for name, each in more.items()}}
    return {CONCEPTS: of_one, SHAPES: {"unrotated": _value(value)}}


def _measured(score: float, blind: float = 0.25) -> dict[str, dict[str, object]]:
    return {
        "caption loss": {GIVEN: _value(3 - score), SHUFFLED: _value(3.5)},
        "captioning": {GIVEN: _parts(score), SHUFFLED: _parts(0.25)},
        "answering": {GIVEN: _parts(score), NONE: _parts(blind), SHUFFLED: _parts(blind)},
        "letters": {GIVEN: _parts(score, circular=score / 2), NONE: _parts(blind), SHUFFLED: _parts(blind)},
    }


def _findings(tmp_path: Path, tuned: float, blind: float) -> Findings:
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(picture, "PNG")
    for stage in ("align", "finetune"):
        (tmp_path / stage).mkdir(exist_ok=True)
        lines = [json.dumps({"step": step, "loss": 4.0 / step}) for step in (1, 2, 3)]
        (tmp_path / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    example = Example(
        picture.getvalue(),
        "What is <b>it</b>?",
        {"A": "a zebra", "B": "an owl"},
        "B",
        CONCEPTS,
        {"untrained": None, "aligned": "A", "tuned": "B"},
        {"untrained": "<script>alert(1)</script>", "aligned": "a horse", "tuned": "an owl"},
    )
    return Findings(
        profile=PROFILES["default"],
        seed=0,
        device="a device",
        measured={"untrained": _measured(0.25), "aligned": _measured(0.5), "tuned": _measured(tuned, blind)},
        split={
            "captions": 10, "conversations": 20, "pictures_by_source": {"stamps": 10}, "held_out": {"zebra": "x"},
            "left_out_of_training": 3,
        },
        examples=[example],
        losses={stage: tmp_path / stage for stage in ("align", "finetune")},
        assets=[EASY_VQA],
        lost={"tuxpaint-stamps": "apt-get is missing"},
        seconds={"align": 100.0},
        peak_memory=3_000_000_000,
    )  # fmt: skip


@pytest.mark.slow
def test_page_stands_alone_and_escapes_what_the_model_says(tmp_path):
    page = write_report(_findings(tmp_path, 0.6, 0.25), tmp_path).read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "not CLIP" in page
    assert "apt-get is missing" in page
    assert EASY_VQA.licence in page


@pytest.mark.slow
def test_numbers_are_in_table_and_json(tmp_path):
    findings = _findings(tmp_path, 0.6, 0.25)
    write_report(findings, tmp_path)
    markdown = (tmp_path / "results.md").read_text()
    assert (
        "| answering about held-out concepts | its picture | 25 | 25.0 (20.0–30.0) | 50.0 (45.0–55.0) | 60.0"
        in markdown
    )
    assert TOWER_NOTE in markdown
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["measured"]["tuned"]["letters"][GIVEN][CONCEPTS]["circular"]["value"] == 0.3
    assert all(each["shown"] for each in results["shown"])


@pytest.mark.parametrize(("tuned", "blind"), [(0.28, 0.25), (0.6, 0.58)])
def test_a_score_within_reach_of_a_baseline_is_said_not_to_be_shown(tmp_path, tuned, blind):
    verdicts = _findings(tmp_path, tuned, blind).verdicts()
    answering = next(each for each in verdicts if each[1].startswith("answering about held-out"))
    assert not answering[0]
    assert "does not exclude" in answering[1]


@pytest.mark.slow
def test_plots_are_pictures(tmp_path):
    write_report(_findings(tmp_path, 0.6, 0.25), tmp_path)
    for name in ("losses.png", "accuracy.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 300
