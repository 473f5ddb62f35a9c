"""SEED-Bench, its questions about images (Li et al. 2023, arXiv:2307.16125)."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llava_npu.evaluation.benchmarks import LOCALLY, SERVER, Description, Parsed, register
from llava_npu.evaluation.extraction import rules
from llava_npu.evaluation.extraction.choices import ABOUT, ENGLISH, ChoiceBenchmark, parse_choice, read_choices
from llava_npu.evaluation.formats.json_files import JsonRecord, combined_digest, members, read_json_object, read_jsonl
from llava_npu.evaluation.formats.llava_files import llava_question
from llava_npu.evaluation.formats.locating import QuestionImages, require_companion
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.reports.submissions import Submission, as_json_lines

_IMAGE, _VIDEO = "image", "video"


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        return read_choices(path)
    records, digest = read_jsonl(path)
    whole, whole_digest = read_json_object(require_companion(path, ("SEED-Bench.json",), "SEED-Bench's own file"))
    annotations: dict[str, list[JsonRecord]] = defaultdict(list)
    for each in members(whole, "questions"):
        annotations[each.need("question_id")].append(each)
    types = whole.values.get("question_type")
    if not isinstance(types, dict):
        raise whole.error("question_type", "an object is expected: the name of each type, and its number.")
    names = {str(number): name for name, number in types.items()}
    images = QuestionImages(path, ("SEED-Bench-image", "."))
    # The file's paths begin with the folder, "SEED-Bench-image/1454426_2591111986".
    if any(record.need("image").startswith("SEED-Bench-") for record in records):
        images = QuestionImages(path, (".",))
    questions, others = [], []
    seen: Counter[str] = Counter()
    for record in records:
        name = record.need("question_id")
        if name not in annotations:
            raise record.error("question_id", f"{name!r} is not in SEED-Bench.json.")
        # The published file has an id twice: both lines are asked, each with the annotation of its question.
        seen[name] += 1
        same = [each for each in annotations[name] if each.get("question") in record.need("text")]
        if not same:
            others.append(name)
        annotation = (same or annotations[name])[0]
        if len({each.get("answer") for each in same if each.get("data_id") == annotation.get("data_id")}) > 1:
            raise annotation.error("answer", f"question {name!r} is there twice, with different answers.")
        kind = annotation.need("data_type")
        if kind not in (_IMAGE, _VIDEO):
            raise annotation.error("data_type", f"{kind!r} is neither {_IMAGE!r} nor {_VIDEO!r}.")
        if kind == _IMAGE:
            question = _annotated(record, annotation, names, images)
            own = name if seen[name] == 1 else f"{name}#{seen[name]}"
            questions.append(replace(question, id=own, group=own))
    notes = []
    if len(questions) < len(records):
        notes.append(
            f"{len(records) - len(questions)} questions about videos are left out: this is SEED-Bench (image)."
        )
    if others:
        notes.append(
            f"{len(others)} questions have other words in SEED-Bench.json than in the question file (first: "
            f"{others[0]}): joined by id, as in LLaVA's script."
        )
    missing = sum(each[0].need("data_type") == _IMAGE and name not in seen for name, each in annotations.items())
    if missing:
        notes.append(f"{missing} questions about images are not in the question file: not asked, not scored.")
    return Dataset(path, combined_digest([digest, whole_digest]), tuple(questions), tuple(notes))


def _annotated(
    record: JsonRecord, annotation: JsonRecord, types: Mapping[str, str], images: QuestionImages
) -> Question:
    options = {letter: annotation.need(f"choice_{letter.lower()}") for letter in "ABCD"}
    answer = annotation.letter("answer", options)
    kind = annotation.need("question_type_id")
    if kind not in types:
        raise annotation.error("question_type_id", f"{kind!r} is not a type of the file ({', '.join(types)}).")
    facts = {"question_id": json.dumps(annotation.values["question_id"])}  # a number or a text, as it was
    question = llava_question(record, images, options=options, answer=answer, category=types[kind], facts=facts)
    return replace(question, text=annotation.need("question"))


def _parse(question: Question, answer: str) -> Parsed:
    return {**parse_choice(question, answer), "llava": rules.exact(answer, question.options)}


def _lines(dataset: Dataset, answers: Mapping[str, str]) -> Mapping[str, bytes]:
    lines = [
        {"question_id": json.loads(question.facts["question_id"]), "prediction": answers[question.id]}
        for question in dataset.questions
        if "question_id" in question.facts
    ]
    return {"seed_bench.jsonl": as_json_lines(lines)} if lines else {}


register(
    ChoiceBenchmark(
        name="seedbench",
        title="SEED-Bench (image)",
        description=Description(
            source="https://github.com/AILab-CVC/SEED-Bench, questions as LLaVA's eval.zip has them; VLMEvalKit: "
            "SEEDBench_IMG.tsv",
            form="llava-seed-bench.jsonl (question_id, image, text) with SEED-Bench.json (questions, question_type) "
            "and SEED-Bench-image/; or SEEDBench_IMG.tsv in MMBench's form",
            licence="CC BY-NC 4.0; images from CC3M under their own terms",
            prompt=f"question, one option a line, “{ENGLISH}”",
            metric="accuracy by type of question",
            scored=(LOCALLY, SERVER),
        ),
        files=("seed_bench/llava-seed-bench.jsonl", "llava-seed-bench.jsonl", "SEEDBench_IMG.tsv"),
        read=_read,
        parse=_parse,
        rules={**ABOUT, "llava": rules.EXACT_ABOUT},
        checksums={"SEEDBench_IMG.tsv": "68017231464752261a2526d6ca3a10c0"},
        submission=Submission("seed_bench.jsonl: question_id, prediction (the leaderboard's notebook)", _lines),
    )
)
