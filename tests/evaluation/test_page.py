"""The page of questions and answers: safe in any browser, and its filters work in a real one."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.reports import page
from llava_npu.evaluation.reports.comparison import compare_runs, read_runs
from llava_npu.evaluation.reports.comparison_report import write_comparison
from llava_npu.evaluation.run import EvaluationOptions, evaluate
from support.benchmark_samples import textvqa
from support.evaluation_samples import FakeAnswerer, always_a, circular_rows, knows, question_row, write_tsv

ATTACK = '</script><script>document.title = "taken"</script><img src=x onerror="document.title = 1">'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    parsed: dict[str, Any] = json.loads(found[1])
    return parsed


def respond(question: Question) -> str:
    """Right about odd groups; in the others B, or (the last group) something that hurts."""
    if question.group == "6":
        return ATTACK
    return question.answer or "" if int(question.group) % 2 else "B"


@pytest.fixture
def written(tmp_path: Path) -> str:
    rows = circular_rows(groups=6)
    damaged = base64.b64encode(b"not an image, and long enough not to be a reference to one, is it").decode()
    rows.append(question_row(7, ["a", "b"], 0, image=damaged, hint=ATTACK))
    evaluate(
        "mmbench",
        write_tsv(tmp_path / "b.tsv", rows),
        FakeAnswerer(respond),
        tmp_path / "out",
        EvaluationOptions(batch_size=30),
    )
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_everything_is_in_the_page(written: str) -> None:
    data = data_of(written)
    assert len(data["cases"]) == 25
    assert len(data["images"]) == 6  # rotations share theirs; one cannot be read
    assert all(image.startswith("data:image/jpeg;base64,") for image in data["images"])
    first, last = data["cases"][0], data["cases"][-1]
    assert (first["truth"], first["options"]["A"], first["category"]) == ("A", "thing 1", "kind 1")
    assert first["answers"][0]["credit"] == {"strict": 1.0, "vlmevalkit": 1.0}
    assert first["answers"][0]["prompt"].startswith("What is in image 1?")
    assert last["images"] == [None]
    assert "not an image" in last["answers"][0]["error"]
    assert last["answers"][0]["credit"] == {"strict": 0.0, "vlmevalkit": 0.0}
    assert [table["folded"] for table in data["scores"]] == ["", "scores by category"]
    assert data["scores"][0]["columns"] == ["", "strict", "vlmevalkit", "n"]
    assert [row[0] for row in data["scores"][0]["rows"]] == ["circular", "vanilla", "every rotation"]
    assert data["scores"][1]["rows"][0][0] == "objects, circular"
    assert not re.search(r"""(src|href)=["'](?!data:)""", written)  # loads nothing


def test_answers_cannot_break_out_of_the_page(written: str) -> None:
    assert ATTACK in data_of(written)["cases"][-1]["text"]
    assert ATTACK not in written
    assert written.count("</script>") == 2
    script = re.findall(r"<script>(.*?)</script>", written, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in written  # only this script may run
    assert "innerHTML" not in script


def test_partly_right_answers(tmp_path: Path) -> None:
    answerer = FakeAnswerer(lambda question: "cola" if "brand" in question.text else "blue")
    evaluate("textvqa", textvqa(tmp_path), answerer, tmp_path / "out")  # three of ten annotators said cola
    data = data_of((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert [case["answers"][0]["credit"]["strict"] for case in data["cases"]] == [pytest.approx(0.9), 0.0]
    assert data["cases"][0]["references"] == [["Coca Cola", 6], ["cola", 3], ["pepsi", 1]]


def test_a_page_has_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_QUESTIONS", 5)
    monkeypatch.setattr(page, "MAX_THUMBNAIL_BYTES", 1)
    path = write_tsv(tmp_path / "b.tsv", circular_rows(groups=6))
    evaluate("mmbench", path, FakeAnswerer(respond), tmp_path / "out")
    data = data_of((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert len(data["cases"]) == 5
    assert len(data["images"]) == 1
    assert "report.html shows 5 of 24 questions, evenly spread." in data["notes"]
    assert any("leaves out 4 images" in note for note in data["notes"])


# --- in a browser -----------------------------------------------------------------------------------------------------


def in_browser(folder: Path, written: str, script: str) -> Any:
    """What some JavaScript that acts on the page gives, as Chromium runs it."""
    # What acts on the page is no script of the page: its policy would rightly refuse it.
    free = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", written)
    found = f"document.body.dataset.found = JSON.stringify((() => {{ {script} }})())"
    path = folder / "acted.html"
    path.write_text(free.replace("</body>", f"<script>{found}</script></body>"), encoding="utf-8")
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'browser'}", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    (found,) = re.findall(r'<body data-found="(.*?)">', shown)
    return json.loads(html.unescape(found))


# Sets filters, and gives what the page then counts, how many questions it shows, and what it says of rotations.
CHOOSE = """
const chosen = (values) => {
  const form = document.getElementById("filters");
  form.reset();
  for (const [name, value] of Object.entries(values)) form.querySelector(`[name=${name}]`).value = value;
  form.dispatchEvent(new Event("input"));
  return [document.getElementById("count").textContent, document.querySelectorAll("article").length];
};
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_filters(tmp_path: Path, written: str) -> None:
    cases: list[tuple[dict[str, str], str, int]] = [
        ({}, "25 of 25 questions, right: 14", 25),
        ({"run0": "wrong"}, "11 of 25 questions, right: 0", 11),
        ({"run0": "right", "category": "kind 0"}, "2 of 25 questions, right: 2", 2),
        ({"text": "THING 3"}, "4 of 25 questions, right: 4", 4),
        ({"only": "error"}, "1 of 25 questions, right: 0", 1),
        ({"only": "torn"}, "8 of 25 questions, right: 2", 8),  # groups 2 and 4: B in each rotation
        ({"text": "no such thing"}, "0 of 25 questions", 0),
    ]
    script = f"""
    const found = {json.dumps([values for values, *_ in cases])}.map(chosen);
    return [document.title, found, document.getElementById("none").innerText]
    """
    title, found, empty = in_browser(tmp_path, written, CHOOSE + script)
    assert empty.startswith("No question matches")
    assert title == "MMBench (English)"  # nothing that an answer holds was run
    assert found == [[count, articles] for _, count, articles in cases]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_filters_of_two_runs(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "b.tsv", circular_rows(groups=3))
    for name, answerer in {"weak": FakeAnswerer(always_a), "strong": FakeAnswerer(knows, "sha256:other")}.items():
        evaluate("mmbench", path, answerer, tmp_path / name, EvaluationOptions(batch_size=30))
    (comparison,) = compare_runs(read_runs([tmp_path / "weak", tmp_path / "strong"]))
    write_comparison(comparison, tmp_path / "out")
    script = """
    const differ = chosen({ only: "runs", run0: "wrong" });
    const boxes = [...document.querySelector("article").querySelectorAll(".answer")];
    document.querySelector("img").click();
    return [differ, boxes.map((box) => box.innerText.split("\\n")[0]), document.querySelectorAll(".wide").length];
    """
    page_text = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    differ, boxes, wide = in_browser(tmp_path, page_text, CHOOSE + script)
    assert differ == ["9 of 12 questions, right: weak 0, strong 9", 9]
    assert "weak 1 of 4 rotations right" in boxes[0]
    assert "strong 4 of 4 rotations right" in boxes[1]
    assert wide == 1
