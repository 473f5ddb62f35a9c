"""Every reader, every kind of damage: one error that names file and place, or a note; never a traceback or silence."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.formats.datasets import read_dataset
from llava_npu.evaluation.stored_answers import StoredAnswers
from support import benchmark_samples as samples
from support.evaluation_samples import circular_rows, encoded_image, write_tsv

IMAGE = encoded_image((1, 2, 3))
TABLES: dict[str, dict[str, str]] = {
    "mmbench": {"index": "1", "question": "What?", "A": "cat", "B": "dog", "answer": "A"},
    "pope": {"index": "1", "question": "Is it?", "answer": "Yes", "category": "random"},
    "mme": {"index": "1", "question": "Is it?", "answer": "Yes", "category": "count"},
    "hallusionbench": {"index": "VD_x_0_0_0_0", "question": "Is it?", "answer": "Yes"},
    "textvqa": {"index": "1", "question": "What?", "answer": "['a', 'b']"},
    "vizwiz": {"index": "1", "question": "What?", "answers": "['a', 'b']"},
    "mmvet": {"index": "1", "question": "What?", "answer": "a", "category": "ocr"},
    "llavabench": {"index": "1", "question": "What?", "category": "conv", "caption": "A cat.", "gpt4_ans": "A cat."},
    "mmmu": {"index": "1", "question": "What?", "A": "cat", "B": "dog", "answer": "A"},
}


def table(path: Path, name: str, **change: str) -> Path:
    """Two rows, of which the second is changed."""
    first = {**TABLES[name], "image": IMAGE}
    other = first["index"][:-1] + "2"
    return write_tsv(path / f"{name}.tsv", [first, {**first, "index": other, **change}], tuple(first))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": ""}, r"row 2 \(line 3\), column 'index': "),
        ({"question": " "}, r"row 2 \(line 3\), column 'question': empty"),
        ({"image": "7777"}, r"row 2 \(line 3\), column 'image': '7777' is neither an image in base64 nor"),
        ({"image": f"!{IMAGE}"}, r"row 2 \(line 3\), column 'image': unreadable base64"),
        ({"image": IMAGE[:-1]}, r"row 2 \(line 3\), column 'image': unreadable base64"),
    ],
)
def test_cells_of_tables(tmp_path: Path, name: str, change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=rf"{name}\.tsv, {message}"):
        read_dataset(get(name), table(tmp_path, name, **change))


@pytest.mark.parametrize("name", TABLES)
def test_a_mark_for_an_image_in_a_question_costs_that_question_alone(tmp_path: Path, name: str) -> None:
    first, second = read_dataset(get(name), table(tmp_path, name, question="<image> What?")).questions
    assert first.defect == ""
    assert second.defect.startswith("its text contains '<image>'")


@pytest.mark.parametrize("name", TABLES)
def test_whole_tables(tmp_path: Path, name: str) -> None:
    path = table(tmp_path, name)
    whole = path.read_bytes()
    assert len(read_dataset(get(name), path).questions) == 2
    path.write_bytes(whole.replace(b"\n", b"\r\n"))
    assert len(read_dataset(get(name), path).questions) == 2

    lines = whole.splitlines(keepends=True)
    first = TABLES[name]["index"]
    second = f"{first[:-1]}2"
    damaged = {
        b"": "is empty",
        lines[0]: "has a header but no rows",
        whole.replace(b"question", b"query"): "no column 'question'. Columns found: .*query",
        whole.replace(b"\timage", b"\tphoto"): "no column 'image' or 'image_path'",
        whole.replace(b"\timage", b"\tindex"): "column 'index' is there twice",
        whole.replace(b"\t", b","): "no column 'index'.*separated by tabs",
        lines[0] + lines[1] + lines[1]: rf"row 2 \(line 3\), column 'index': {first} is there twice: first in row 1",
        whole[: whole.rindex(b"\t")]: r"row 2 \(line 3\): \d fields, but the header has \d columns",
        whole.decode().encode("utf-16"): "encoded in UTF-16",
        whole.replace(f"{second}\t".encode(), f'{second}\t"'.encode()): "row 2 .*not a valid tab-separated row",
        lines[0] + lines[1] + lines[2].replace(b"?", b"\xe9?"): r"row 2 \(line 3\), column 'question': not UTF-8",
    }
    for content, message in damaged.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.tsv.*{message}"):
            read_dataset(get(name), path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mmbench", {"answer": "C"}, "column 'answer': 'C' is none of this row's options"),
        ("mmmu", {"answer": "c"}, "column 'answer': 'c' is none of this row's options"),
        ("pope", {"answer": "Maybe"}, "column 'answer': 'maybe' is neither Yes nor No"),
        ("textvqa", {"answer": "['a', "}, "column 'answer': begins with '\\[' but is not a list"),
        ("vizwiz", {"answers": "[['a']]"}, "column 'answers': is not a list of strings"),
        ("mmvet", {"answer": ""}, "column 'answer': empty"),
        ("llavabench", {"gpt4_ans": ""}, "column 'gpt4_ans': empty"),
        ("mme", {"category": "counts"}, "column 'category': 'counts' is not a task of MME. Did you mean 'count'"),
    ],
)
def test_answers_of_tables(tmp_path: Path, name: str, change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=rf"{name}\.tsv, row 2 \(line 3\), {message}"):
        read_dataset(get(name), table(tmp_path, name, **change))


@pytest.mark.parametrize("name", TABLES)
def test_questions_without_a_image_are_counted(tmp_path: Path, name: str) -> None:
    notes = read_dataset(get(name), table(tmp_path, name, image="")).notes
    assert "1 of 2 questions have no image: asked in text alone." in notes


# --- LLaVA's files ----------------------------------------------------------------------------------------------------

Make = Callable[[Path], Path]
FILES: list[tuple[str, Make, str]] = [
    ("pope", lambda root: samples.pope(root, [["yes", "no"]]), "llava_pope_test.jsonl"),
    ("pope", lambda root: samples.pope(root, [["yes", "no"]]), "coco/coco_pope_adversarial.json"),
    ("mme", lambda root: samples.mme(root, {"count": 1}), "llava_mme.jsonl"),
    ("scienceqa", lambda root: samples.scienceqa(root, [True, False]), "llava_test_CQM-A.json"),
    ("scienceqa", lambda root: samples.scienceqa(root, [True, False]), "problems.json"),
    ("textvqa", samples.textvqa, "llava_textvqa_val_v051_ocr.jsonl"),
    ("textvqa", samples.textvqa, "TextVQA_0.5.1_val.json"),
    ("vqav2", samples.vqav2, "llava_vqav2_mscoco_test-dev2015.jsonl"),
    ("vqav2", samples.vqav2, "llava_vqav2_mscoco_test2015.jsonl"),
    ("vizwiz", samples.vizwiz, "llava_test.jsonl"),
    ("gqa", samples.gqa, "llava_gqa_testdev_balanced.jsonl"),
    ("gqa", samples.gqa, "data/testdev_balanced_questions.json"),
    ("seedbench", samples.seedbench, "llava-seed-bench.jsonl"),
    ("seedbench", samples.seedbench, "SEED-Bench.json"),
    ("qbench", samples.qbench, "llvisionqa_dev.json"),
    ("mmvet", samples.mmvet, "llava-mm-vet.jsonl"),
    ("mmvet", samples.mmvet, "mm-vet.json"),
    ("llavabench", samples.llavabench, "questions.jsonl"),
    ("llavabench", samples.llavabench, "context.jsonl"),
    ("llavabench", samples.llavabench, "answers_gpt4.jsonl"),
]
by_file = pytest.mark.parametrize(("name", "make", "file"), FILES, ids=[f"{name}-{file}" for name, _, file in FILES])


@by_file
def test_whole_files(tmp_path: Path, name: str, make: Make, file: str) -> None:
    data = make(tmp_path)
    path = data.parent / file
    whole = path.read_bytes()
    damaged = {
        b"": "is empty",
        b"\n \n": "is empty",
        whole[:-9]: "not valid JSON",
        b"null\n": "is expected, not nothing",
        b"[3]\n": r"an? (object|list of objects|object of objects) is expected, not",
        b"{}\n": r"missing|is expected, not",
        whole.decode().encode("utf-16"): "line 1: not UTF-8",
        whole + b"\xff": "not UTF-8",
    }
    for content, message in damaged.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"(?s){path.name}.*({message})"):
            read_dataset(get(name), data)
    path.write_bytes(b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n"))
    assert read_dataset(get(name), data).questions


def _change(path: Path, field: str, value: object) -> str:
    """Changes a field of a file's first object that has it; says where that is."""
    whole: Any
    lined = path.suffix == ".jsonl" or path.parent.name == "coco"
    text = path.read_text(encoding="utf-8")
    whole = [json.loads(line) for line in text.splitlines()] if lined else json.loads(text)
    entries = list(whole.values()) if isinstance(whole, dict) else whole
    found = next(entry for part in entries for entry in (part if isinstance(part, list) else [part]) if field in entry)
    found[field] = value
    written = "".join(json.dumps(entry) + "\n" for entry in whole) if lined else json.dumps(whole)
    path.write_text(written, encoding="utf-8")
    return path.name


@pytest.mark.parametrize(
    ("name", "make", "file", "field", "value", "message"),
    [
        (*FILES[0], "question_id", None, "line 1, field 'question_id': empty"),
        (*FILES[0], "question_id", 2, "line 2, field 'question_id': '2' is there twice: first in line 1"),
        (*FILES[9], "image", "../../x.png", "line 1, field 'image': .* leads out of the image folder"),
        (*FILES[0], "category", "rare", "line 1, field 'category': 'rare' has no label file"),
        (*FILES[1], "label", "maybe", "line 1, field 'label': 'maybe' is neither yes nor no"),
        (*FILES[2], "question_id", "counts/0000.png", "line 1, field 'question_id': 'counts' is not a task of MME"),
        (*FILES[4], "answer", True, "record '1', field 'answer': True is not the place of one of the 3 choices"),
        (*FILES[6], "answers", "red", "data 1, field 'answers': 'red' is not a list of strings"),
        (*FILES[8], "question_id", 1, "line 2, field 'question_id': '1' is there twice"),
        (*FILES[11], "answer", [], "record '201', field 'answer': '\\[\\]' is not a string"),
        (*FILES[13], "answer", "E", "questions 1, field 'answer': 'E' is none of the choices"),
        (*FILES[13], "data_type", "photo", "questions 1, field 'data_type': 'photo' is neither"),
        (*FILES[16], "capability", [], "record 'v1_0', field 'capability': empty"),
        (*FILES[18], "caption", [], "line 1, field 'caption': empty"),
    ],
)
def test_fields_of_files(
    tmp_path: Path, name: str, make: Make, file: str, field: str, value: object, message: str
) -> None:
    data = make(tmp_path)
    where = _change(data.parent / file, field, value)
    with pytest.raises(UserError, match=rf"{where}, {message}"):
        read_dataset(get(name), data)


@pytest.mark.parametrize(
    ("name", "make", "file", "field", "value", "defect"),
    [
        (*FILES[9], "text", "<image> Is it?", "its text contains '<image>', which stands for an image"),
        (*FILES[3], "image", "", "its text contains '<image>', but its field 'image' is missing"),
        (*FILES[14], "candidates", ["<image>", "Blurred"], "its text contains '<image>'"),
    ],
)
def test_fields_that_cost_their_question_alone(
    tmp_path: Path, name: str, make: Make, file: str, field: str, value: object, defect: str
) -> None:
    data = make(tmp_path)
    _change(data.parent / file, field, value)
    if len(get(name).read(data).questions) == 1:
        with pytest.raises(UserError, match=rf"{data.name}: no question can be asked. The first, \d+: {defect}"):
            read_dataset(get(name), data)
    else:
        defects = [question.defect for question in read_dataset(get(name), data).questions if question.defect]
        assert [each[: len(defect)] for each in defects] == [defect]


def test_vqav2_questions_outside_the_test_set_are_counted(tmp_path: Path) -> None:
    data = samples.vqav2(tmp_path)
    _change(data, "question_id", 99)
    (note,) = read_dataset(get("vqav2"), data).notes
    assert "1 questions are not in llava_vqav2_mscoco_test2015.jsonl (first: 99): not submitted." in note


def test_a_spreadsheets_quotes_are_read(tmp_path: Path) -> None:
    rows = circular_rows(1)
    rows[0]["question"] = 'Is "this"\na\ttable?'
    path = write_tsv(tmp_path / "a.tsv", rows)
    assert read_dataset(get("mmbench"), path).questions[0].text == 'Is "this"\na\ttable?'
    with path.open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file, delimiter="\t"))[0] == "index"


def test_questions_with_one_id_are_told_apart(tmp_path: Path) -> None:
    """Their answers are kept by id: one would stand for both."""
    base = {"category": "VD", "subcategory": "illusion", "visual_input": "0", "set_id": "0", "figure_id": "0"}
    records = [
        {**base, "question_id": "0", "question": f"Is it {truth}?", "gt_answer": truth, "filename": None}
        for truth in "100"
    ]
    (tmp_path / "HallusionBench.json").write_text(json.dumps(records))
    benchmark = get("hallusionbench")
    dataset = read_dataset(benchmark, tmp_path)
    name = "VD_illusion_0_0_0_0"
    assert [question.id for question in dataset.questions] == [name, f"{name}#2", f"{name}#3"]
    assert any(note.startswith("1 ids stand for several questions") for note in dataset.notes)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"id": name, "answer": a}) + "\n" for a in ("yes", "no", "yes"))
    )
    answers = StoredAnswers(tmp_path / "a.jsonl", dataset.questions).answer(dataset.questions)
    parsed = {q.id: benchmark.parse(q, a.text) for q, a in zip(dataset.questions, answers, strict=True)}
    scores = {(each.metric, each.extraction): each.value for each in benchmark.score(dataset.questions, parsed)}
    assert scores["aAcc", "strict"] == pytest.approx(2 / 3)
