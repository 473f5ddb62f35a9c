"""RefCOCO, RealWorldQA, CV-Bench, BLINK, MathVista, CHAIR: published files, and scores next to the official code's.

The outcomes are those of the functions named in the benchmarks' files, at the commits given there, on these answers;
`benchmarks/official_scorers.py` compares thousands more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.extraction import boxes, lmms_eval
from llava_npu.evaluation.extraction.coco_objects import coco_objects, singular
from llava_npu.evaluation.formats.datasets import read_dataset
from llava_npu.evaluation.reports.report import Report
from llava_npu.evaluation.run import evaluate
from support.benchmark_samples import CHAIR_SYNONYMS, chair, save_image, write_json, write_jsonl
from support.evaluation_samples import FakeAnswerer, encoded_image, image_bytes, write_parquet, write_tsv

LETTER = "Answer with the option's letter from the given choices directly."


def run(name: str, data: Path, output: Path, said: dict[str, str]) -> Report:
    return evaluate(name, data, FakeAnswerer(lambda question: said[question.id]), output)


def value(report: Report, metric: str, rule: str, name: str = "overall") -> float:
    (found,) = [s for s in report.scores if (s.metric, s.extraction, s.name) == (metric, rule, name)]
    return found.value


# --- RefCOCO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "lmms", "qwen", "kit"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4), None, (0.1, 0.2, 0.3, 0.4)),
        ("It is at [0.1,0.2,0.3,0.4], or [0.5,0.5,0.6,0.6].", (0.1, 0.2, 0.3, 0.4), None, (0.1, 0.2, 0.3, 0.4)),
        ("[0.3, 0.4, 0.1, 0.2]", (0.3, 0.4, 0.1, 0.2), None, (0.1, 0.2, 0.3, 0.4)),
        ("<box>(100,200),(300,400)</box>", None, (100 / 999, 200 / 999, 300 / 999, 400 / 999), (0.1, 0.2, 0.3, 0.4)),
        ("[100 200 300 400]", None, None, (0.1, 0.2, 0.3, 0.4)),
        ("[100, 200, 300, 1200]", (100, 200, 300, 1200), None, (0.2, 0.5, 0.6, 1)),  # pixels of 500 × 400, clipped
        ("(1,2),(3)", None, None, None),
        ("[.1, .2, .3, .4]", None, None, (0.1, 0.2, 0.3, 0.4)),
        ("nothing", None, None, None),
    ],
)
def test_boxes(answer: str, lmms: Any, qwen: Any, kit: Any) -> None:
    found = boxes.lmms_eval(answer), boxes.qwen_vl(answer), boxes.vlmevalkit(answer, 500, 400)
    for one, expected in zip(found, (lmms, qwen, kit), strict=True):
        assert one == (pytest.approx(expected) if expected else None)


def test_iou() -> None:
    assert boxes.iou((0, 0, 1, 1), (0, 0, 1, 0.5)) == 0.5
    assert boxes.iou((0, 0, 0.4, 1), (0.6, 0, 1, 1)) == 0
    assert boxes.iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    far = boxes.lmms_eval(f"[{'9' * 400}, 0, {'9' * 400}, 1]")
    assert far is not None
    assert boxes.iou(far, (0, 0, 1, 1)) == boxes.iou((float("nan"), 0, 1, 1), (0, 0, 1, 1)) == 0  # the mean stays one


_REGION = {"question_id": "1", "image": image_bytes(), "answer": ["dog"], "bbox": [1.0, 2.0, 3.0, 4.0]}
_PROBLEM = {"pid": "1", "question": "How many?", "answer_type": "float", "answer": "3", "decoded_image": image_bytes()}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("refcoco", {**_REGION, "image": b"no image"}, "row 1, field 'image': no image, or a damaged one"),
        ("refcoco", {**_REGION, "bbox": [float("nan"), 2.0, 3.0, 4.0]}, "'bbox': .* are not all finite"),
        ("mathvista", {**_PROBLEM, "precision": "x"}, "'precision': 'x' is not a number of decimals"),
        ("mathvista", {**_PROBLEM, "choices": list(map(str, range(30)))}, "30 choices; at most 26"),
    ],
)
def test_damaged_rows(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_dataset(get(name), write_parquet(tmp_path / "val.parquet", [row]))


def test_refcoco(tmp_path: Path) -> None:
    row = {"question_id": "17", "answer": ["left dog", "the dog"], "bbox": [10.0, 5.0, 20.0, 10.0]}
    hub = write_parquet(tmp_path / "val-00000-of-00001.parquet", [{**row, "image": image_bytes(size=(100, 50))}])
    questions = read_dataset(get("refcoco"), hub).questions
    assert [(q.id, q.text) for q in questions] == [("17/1", "left dog"), ("17/2", "the dog")]
    assert questions[0].answer == "0.1,0.1,0.3,0.3"
    assert questions[0].prompt.endswith("of the region this sentence describes: left dog")
    said = {"17/1": "[0.1, 0.1, 0.3, 0.2]", "17/2": "[0.1, 0.1, 0.3, 0.19]"}  # an IoU of 0.5, and less
    report = run("refcoco", hub, tmp_path / "out", said)
    assert value(report, "accuracy@0.5", "lmms-eval") == 0.5
    assert value(report, "mean IoU", "lmms-eval") == pytest.approx((0.5 + 0.45) / 2)
    assert value(report, "accuracy@0.5", "qwen-vl") == 0

    save_image(tmp_path / "images" / "a.png")
    line = {"image": "a.png", "sent": "left dog", "bbox": [10, 5, 30, 15], "width": 100, "height": 50}
    lines = write_jsonl(tmp_path / "refcocog_val.jsonl", [line])
    (question,) = read_dataset(get("refcocog"), lines).questions
    assert question.answer == questions[0].answer
    write_jsonl(lines, [{**line, "bbox": [1, 2, 3]}])
    with pytest.raises(UserError, match=r"line 1, field 'bbox': four numbers are expected"):
        read_dataset(get("refcocog"), lines)


# --- letters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "ranked", "first", "cambrian"),
    [
        ("B", "B", "B", "B"),
        ("(b)", None, "B", "B"),
        ("B. cat", "B", "B", "B"),
        ("The answer is B.", "B", "T", "B"),
        ("The answer is (B) cat", "B", "T", "B"),
        ("A or C", "A", "A", "A"),
        ("DNA is it, option C) perhaps", "C", "D", "D"),
        ("I choose D because A is wrong", "A", "I", "I"),
        ("Answer: c", "A", "A", "C"),
        ("答案是C", "C", None, "答"),
        ("ABBA!", "A", "A", "A"),
        ("", None, None, None),
        (" . ", None, None, None),
    ],
)
def test_letters(answer: str, ranked: str | None, first: str | None, cambrian: str | None) -> None:
    assert lmms_eval.ranked_letter(answer, "ABCD") == ranked
    assert lmms_eval.first_letter(answer) == first
    assert lmms_eval.cambrian_letter(answer) == cambrian


def test_realworldqa(tmp_path: Path) -> None:
    options = "Where is it?\nA. Left\nB. Right\nC. Ahead\n"
    ask = "Please answer directly with only the letter of the correct option and nothing else."
    rows = [
        {"image": image_bytes(1), "question": options + ask, "answer": "B"},
        {"image": image_bytes(2), "question": "How many?\nPlease answer with a single word or number.", "answer": "2"},
    ]
    data = write_parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    first, second = read_dataset(get("realworldqa"), data).questions
    assert (first.options, first.prompt) == ({"A": "Left", "B": "Right", "C": "Ahead"}, options + ask)
    assert second.options == {}
    for number, (said, expected) in enumerate([
        ({"0": "Right", "1": "2."}, {"strict": 1, "vlmevalkit": 1, "lmms-eval": 0.5, "cambrian": 0.5}),
        ({"0": "The answer is B", "1": "two"}, {"strict": 1, "vlmevalkit": 0.5, "lmms-eval": 0.5, "cambrian": 0.5}),
    ]):  # fmt: skip
        report = run("realworldqa", data, tmp_path / f"out{number}", said)
        assert {rule: value(report, "vanilla", rule) for rule in expected} == expected


def cv_rows(source: str, count: int, start: int) -> list[dict[str, Any]]:
    kind = "3D" if source == "Omni3D" else "2D"
    return [
        {"idx": start + n, "type": kind, "task": "Depth" if kind == "3D" else "Count", "source": source,
         "question": "How many?", "prompt": "How many? Select from the following choices.\n(A) 1\n(B) 2",
         "choices": ["1", "2"], "answer": "(A)", "image": image_bytes(start + n)}
        for n in range(count)
    ]  # fmt: skip


def test_cvbench_weighs_sources(tmp_path: Path) -> None:
    flat = write_parquet(tmp_path / "test_2d.parquet", [*cv_rows("ADE20K", 4, 0), *cv_rows("COCO", 1, 4)])
    deep = write_parquet(tmp_path / "test_3d.parquet", cv_rows("Omni3D", 2, 5))
    said = {str(n): "A" if n in (0, 1, 4, 5) else "B" for n in range(7)}  # ADE20K 2 of 4, COCO 1 of 1, Omni3D 1 of 2
    report = run("cvbench", flat, tmp_path / "out", said)
    assert value(report, "CV-Bench", "strict") == pytest.approx(((0.5 + 1) / 2 + 0.5) / 2)
    assert value(report, "CV-Bench 2D", "cambrian") == 0.75
    assert value(report, "accuracy", "strict", "ADE20K") == 0.5
    assert value(report, "accuracy", "strict") == 4 / 7
    assert read_dataset(get("cvbench"), deep).questions[0].prompt.endswith(f"(B) 2\n{LETTER}")
    deep.unlink()
    assert "No 3D questions" in read_dataset(get("cvbench"), flat).notes[0]


def test_blink_averages_tasks(tmp_path: Path) -> None:
    def rows(task: str, count: int) -> list[dict[str, Any]]:
        images = {f"image_{n}": image_bytes(n) if n < 3 else None for n in range(1, 5)}
        prompt = "Which? Select from the following options.\n(A) left\n(B) right"
        return [
            {"idx": f"val_{task}_{n}", "sub_task": task, "question": "Which?", "prompt": prompt, "answer": "(B)",
             "choices": ["left", "right"], **images}
            for n in range(1, count + 1)
        ]  # fmt: skip

    for task, count in (("Art_Style", 1), ("Counting", 3)):
        write_parquet(tmp_path / "BLINK" / task / "val-00000-of-00001.parquet", rows(task, count))
    dataset = read_dataset(get("blink"), tmp_path)
    assert len(dataset.questions[0].images) == 2
    assert "2 of 14 tasks are there: Art_Style, Counting." in dataset.notes
    said = {question.id: "(B)" if question.category == "Art_Style" else "left" for question in dataset.questions}
    report = run("blink", tmp_path, tmp_path / "out", said)
    assert value(report, "mean of tasks", "strict") == 0.5
    assert value(report, "vanilla", "strict") == 0.25
    assert value(report, "vanilla", "lmms-eval", "Counting") == 0


def test_vlmevalkit_tables(tmp_path: Path) -> None:
    row = {"index": 0, "question": "Which?", "A": "left", "B": "right", "answer": "B", "category": "Counting"}
    images = "['{}', '{}']".format(*(encoded_image((n, 2, 3)) for n in (1, 2)))
    data = write_tsv(tmp_path / "BLINK.tsv", [{**row, "image": images}])
    report = run("blink", data, tmp_path / "out", {"0": "B"})
    assert value(report, "mean of tasks", "vlmevalkit") == 1
    flat = {
        **row,
        "split": "2D",
        "source": "COCO",
        "prompt": "Which? (A) left (B) right",
        "image": encoded_image((1, 2, 3)),
    }
    data = write_tsv(tmp_path / "CV-Bench-2D.tsv", [flat], tuple(flat))
    report = run("cvbench", data, tmp_path / "cv", {"0": "B"})
    assert value(report, "CV-Bench 2D", "vlmevalkit") == 1
    with pytest.raises(UserError, match="index 0: source 'x' of split '2D'"):
        read_dataset(get("cvbench"), write_tsv(data, [{**flat, "source": "x"}], tuple(flat)))
    data = write_tsv(tmp_path / "RealWorldQA.tsv", [{**row, "image": encoded_image((1, 2, 3))}])
    assert value(run("realworldqa", data, tmp_path / "real", {"0": "right"}), "vanilla", "lmms-eval") == 0


# --- MathVista --------------------------------------------------------------------------------------------------------


def problem(kind: str, answer: str, choices: list[str] | None = None, precision: float | None = None) -> dict[str, Any]:
    return {"pid": "1", "question": "How long?", "query": "Hint: …\nQuestion: How long?", "choices": choices,
            "answer": answer, "answer_type": kind, "precision": precision,
            "question_type": "multi_choice" if choices else "free_form",
            "metadata": {"task": "geometry problem solving", "skills": ["geometry reasoning", "arithmetic reasoning"],
                         "category": "math-targeted-vqa"}}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "answer", "strict", "authors", "kit"),
    [
        (problem("text", "9", ["7", "9"]), "9", 1, 1, 1),
        (problem("text", "9", ["7", "9"]), "B", 1, 0, 1),  # not a bare choice: the authors ask a model
        (problem("text", "9", ["7", "9"]), 'The answer is "B".', 1, 1, 0),
        (problem("text", "9", ["7", "9"]), 'The answer is "8".', 0, 0, 0),  # the first of equally close texts
        (problem("text", "7", ["7", "9"]), "", 0, 1, 0),  # so is an empty answer read
        (problem("integer", "3"), "3", 1, 1, 1),
        (problem("integer", "3"), "3.0", 1, 0, 0),
        (problem("integer", "3"), 'The answer is "3.9".', 1, 1, 0),  # cut off
        (problem("integer", "3"), "There are 3 of 5.", 0, 0, 0),
        (problem("integer", "3"), "Of 5, the answer is 3.", 1, 0, 0),
        (problem("float", "2.8", precision=1), "2.75", 1, 1, 0),  # rounded
        (problem("float", "2.8", precision=1), "nan", 0, 0, 0),
        (problem("list", "[1, 2]"), "It is [1, 2].", 1, 0, 0),
        (problem("list", "[1, 2]"), 'The answer is "[1, 2]".', 1, 1, 0),
    ],
)
def test_mathvista(tmp_path: Path, record: dict[str, Any], answer: str, strict: int, authors: int, kit: int) -> None:
    data = write_parquet(
        tmp_path / "testmini-00000-of-00001-7256.parquet", [{**record, "decoded_image": image_bytes()}]
    )
    known = get("mathvista")
    (question,) = read_dataset(known, data).questions
    assert question.prompt == record["query"]
    found = known.parse(question, answer)
    credits = {rule: known.credit(question, rule, reading) for rule, reading in found.items()}
    assert credits == {"strict": strict, "mathvista": authors, "vlmevalkit": kit}


def test_mathvista_counts_what_needs_a_model(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "1.png")
    records = {str(n): {**problem("integer", "3"), "pid": str(n), "image": "images/1.png"} for n in (1, 2)}
    data = write_json(tmp_path / "data" / "testmini.json", records)
    report = run("mathvista", data, tmp_path / "out", {"1": "3", "2": "It is 3."})
    assert value(report, "accuracy", "mathvista") == 0.5
    assert value(report, "accuracy", "strict", "geometry reasoning") == 1
    assert any("1 answers cannot be read by the authors' rules (first: 2)" in note for note in report.notes)
    rule = get("mathvista").judging
    assert rule is not None
    asked = read_dataset(get("mathvista"), data).questions[1]
    assert "It is 3." in (rule.ask(asked, "It is 3.") or "")
    assert rule.read(asked, " 3\n") == "3"


# --- CHAIR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two men and a woman with dogs.", ["person", "person", "dog"]),
        ("A bus; buses; ties, a tie.", ["bus", "tie"]),  # pattern's singulars: bu, bus, ty, tie
        ("Wine glasses. A baby bear next to a teddy bear", ["wine glass", "bear", "teddy bear"]),
        ("the seat of the toilet", ["toilet"]),
        ("A traffic light, a traffic, light", ["traffic light"]),
        ("children's skis on a dog-like puppy/bear", ["person", "skis"]),
        ("The PEOPLE (a child!) “sit”\n\n**puppies**", ["person", "person", "dog"]),
        ("", []),
    ],
)
def test_objects_in_captions(caption: str, objects: list[str]) -> None:
    assert coco_objects(CHAIR_SYNONYMS).of_caption(caption) == objects


def test_singular_forms() -> None:
    words = ("geese", "mice", "knives", "glasses", "ponies", "benches", "scissors", "potatoes", "calves", "women")
    found = ["goose", "mouse", "knife", "glass", "pony", "bench", "scissors", "potato", "calf", "woman"]
    assert list(map(singular, words)) == found


def test_chair(tmp_path: Path) -> None:
    data = chair(tmp_path)
    first, second = read_dataset(get("chair"), data).questions
    assert first.prompt == "Please describe this image in detail."
    assert (first.references, second.references) == (("dog", "person"), ("bear", "bus"))
    report = run("chair", data, tmp_path / "out", {"0": "A man, a dog and a trolley.", "1": "A panda."})
    assert value(report, "CHAIRs", "chair") == 0.5
    assert value(report, "CHAIRi", "chair") == 0.25
    assert any("lower is better" in note for note in report.notes)


def test_chair_data_that_lacks_something(tmp_path: Path) -> None:
    data = chair(tmp_path)
    (tmp_path / "synonyms.txt").rename(tmp_path / "other.txt")
    with pytest.raises(UserError, match="needs CHAIR's list of synonyms"):
        read_dataset(get("chair"), data)
    (tmp_path / "other.txt").rename(tmp_path / "synonyms.txt")
    instances = tmp_path / "annotations" / "instances_val2014.json"
    whole = instances.read_text()
    for old, new, message in (
        ('"category_id": 18', '"category_id": 99', "'category_id': no category of the file has this number"),
        ('"image_id": 1,', '"image_id": "x",', "'image_id': 'x' is not a whole number"),
    ):
        instances.write_text(whole.replace(old, new, 1))
        with pytest.raises(UserError, match=f"annotations 1, field {message}"):
            read_dataset(get("chair"), data)
    instances.write_text(whole)
    write_jsonl(data, [{"image": "COCO_val2014_000000000009.jpg"}])
    with pytest.raises(UserError, match=r"has no captions of 1 images \(first: 9\)"):
        read_dataset(get("chair"), data)
