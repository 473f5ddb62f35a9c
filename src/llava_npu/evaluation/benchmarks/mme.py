"""MME: fourteen tasks of perception and cognition, two questions per image (Fu et al. 2023, arXiv:2306.13394).

A task scores 100·accuracy + 100·accuracy+, where accuracy+ counts the images of which both questions are right.
Perception (ten tasks) goes to 2000, cognition (four) to 800.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from llava_npu.errors import UserError, nearest
from llava_npu.evaluation.benchmarks import LOCALLY, Benchmark, Description, Parsed, register
from llava_npu.evaluation.extraction import yes_no
from llava_npu.evaluation.formats.json_files import JsonRecord, combined_digest, read_jsonl, read_text
from llava_npu.evaluation.formats.llava_files import SHORT, llava_question
from llava_npu.evaluation.formats.locating import QuestionImages, require_companion
from llava_npu.evaluation.formats.tables import Row
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.reports.submissions import Submission
from llava_npu.evaluation.statistics.accuracy import (
    CATEGORY,
    Label,
    Score,
    Unit,
    extraction_rules,
    hit,
    own_labels,
    ratio,
    statistic,
    tabulate,
)
from llava_npu.evaluation.statistics.bootstrap import Array

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = {**dict.fromkeys(PERCEPTION, "perception"), **dict.fromkeys(COGNITION, "cognition")}
_RULES = ("strict", "mme", "vlmevalkit")
_ONE_LINE = str.maketrans("\t\n\r", "   ")  # nothing moves: the tool reads the first four characters
_ROOT = "MME_Benchmark_release_version"
_SUFFIX = "Please answer yes or no."


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        dataset = yes_no.read_yes_no_table(path, _of_row, SHORT)
    else:
        records, digest = read_jsonl(path)
        images = QuestionImages(path, (_ROOT, "images", "."))
        root = require_companion(path, (_ROOT, "."), "MME's folder of tasks")
        questions, files, seen = [], set(), defaultdict[str, int](int)
        for record in records:
            question, truths = _labelled(record, images, root)
            seen[question.id] += 1
            questions.append(replace(question, id=f"{question.id}#{seen[question.id]}"))
            files.add(truths)
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)]
        dataset = Dataset(path, combined_digest([digest, *digests]), tuple(questions))
    return replace(dataset, notes=tuple(_notes(dataset.questions)))


def _labelled(record: JsonRecord, images: QuestionImages, root: Path) -> tuple[Question, Path]:
    name = PurePosixPath(record.need("question_id"))
    task = _task(record, "question_id", name.parts[0] if name.parts else ".")
    file = f"{name.name.split('.')[0]}.txt"
    candidates = [root / task / "questions_answers_YN" / file, root / task / file]
    truths = next((candidate for candidate in candidates if candidate.is_file()), None)
    if truths is None:
        raise record.error("question_id", f"no answers for it: neither {candidates[0]} nor {candidates[1]} is there.")
    asked = record.need("text").replace(SHORT, "").strip()
    answers = _answers(truths)
    # LLaVA's file lacks the suffix in places, or has one space less before it than MME's.
    forms = {" ".join(form.split()) for form in (asked, f"{asked} {_SUFFIX}")}
    original = next((each for each in answers if " ".join(each.split()) in forms), None)
    if original is None:
        raise record.error("text", f"the question is not in {truths}: {asked[:80]!r}.")
    question = llava_question(
        record,
        images,
        answer=answers[original],
        group=f"{task}/{name.name}",
        category=task,
        l2_category=TASKS[task],
        facts={"file": file, "question": original},
    )
    return question, truths


def _answers(path: Path) -> dict[str, str]:
    answers: dict[str, str] = {}
    for number, line in enumerate(read_text(path)[1].splitlines(), start=1):
        if not line.strip():
            continue
        question, tab, answer = line.strip().partition("\t")
        if not tab or answer.strip().lower() not in (yes_no.YES, yes_no.NO):
            raise UserError(f"{path}, line {number}: a question, a tab, and Yes or No are expected, not {line[:80]!r}.")
        truth = answer.strip().lower()
        if answers.setdefault(question, truth) != truth:
            raise UserError(f"{path}, line {number}: the same question has the answers Yes and No: {question[:80]!r}.")
    return answers


def _of_row(row: Row, question: Question) -> Question:
    task = _task(row, "category", question.category)
    image = row.label("image_path") or (question.images[0].key if question.images else question.id)
    facts = {"file": f"{PurePosixPath(image).name.split('.')[0]}.txt", "question": question.text}
    return replace(question, group=f"{task}/{image}", l2_category=TASKS[task], facts=facts)


def _task(record: JsonRecord | Row, field: str, task: str) -> str:
    if task not in TASKS:
        raise record.error(field, f"{task!r} is not a task of MME.{nearest(task, TASKS)} Tasks: {', '.join(TASKS)}.")
    return task


def _notes(questions: Sequence[Question]) -> list[str]:
    notes = []
    odd = [group for group, of_group in _by_image(questions).items() if len(of_group) != 2]
    if odd:
        notes.append(
            f"{len(odd)} images have not exactly two questions (first: {odd[0]}): they count as wrong in accuracy+."
        )
    absent = [task for task in TASKS if task not in {question.category for question in questions}]
    if absent:
        notes.append(f"Tasks that the file lacks, which lowers the sums: {', '.join(absent)}.")
    return notes


def _by_image(questions: Sequence[Question]) -> dict[str, list[Question]]:
    images: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        images[question.group].append(question)
    return images


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    known = [question for question in questions if question.answer is not None]
    scores = []
    for rule in extraction_rules(parsed):
        right = {question.id: parsed.get(question.id, {}).get(rule) == question.answer for question in known}
        images = _by_image(known).values()
        both = {group[0].group: len(group) == 2 and all(right[each.id] for each in group) for group in images}
        sums = [_unit(group, sum(right[each.id] for each in group), both[group[0].group]) for group in images]
        scores += tabulate(sums, "score", rule, _sum_of_tasks)
        single = [hit(question, right[question.id]) for question in known]
        paired = [hit(group[0], both[group[0].group]) for group in images]
        scores += tabulate(single, "accuracy", rule, labels=_task_only)
        scores += tabulate(paired, "accuracy+", rule, labels=_task_only)
    return scores


def _unit(group: Sequence[Question], right: int, both: bool) -> Unit:
    amounts = np.zeros((len(TASKS), 4))
    amounts[list(TASKS).index(group[0].category)] = right, len(group), both, 1
    return Unit(group[0], tuple(amounts.ravel()), len(group), group[0].category)


@statistic
def _sum_of_tasks(sums: Array) -> Array:
    tasks = sums.reshape(len(sums), len(TASKS), 2, 2)  # (n, tasks, accuracy and accuracy+, right and all)
    return ratio(tasks.reshape(-1, 2)).reshape(len(sums), -1).sum(axis=1)


def _task_only(question: Question) -> list[Label]:
    return [label for label in own_labels(question) if label[0] == CATEGORY]


def _review(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[str]:
    return ["Guessing would score 75 a task: 750 in perception, 300 in cognition."]


def _answer_files(dataset: Dataset, answers: Mapping[str, str]) -> Mapping[str, bytes]:
    lines: dict[str, list[str]] = defaultdict(list)
    images = _by_image(dataset.questions)
    for group in images.values():  # the tool takes every two lines for a pair
        for question in group:
            truth = (question.answer or "").capitalize()
            answer = answers[question.id].translate(_ONE_LINE)
            cells = (question.facts["file"], question.facts["question"], truth, answer)
            lines[question.category].append("\t".join(cells))
    return {f"{task}.txt": ("\n".join(of_task) + "\n").encode() for task, of_task in lines.items()}


register(
    Benchmark(
        name="mme",
        title="MME (perception, cognition)",
        description=Description(
            source="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation (on request), "
            "questions as LLaVA's eval.zip has them; VLMEvalKit: MME.tsv",
            form="llava_mme.jsonl (question_id “task/image.png”, image, text) with "
            "MME_Benchmark_release_version/<task>/ (images in images/ or next to it; <image>.txt in "
            "questions_answers_YN/ or next to it: question, tab, Yes or No); or MME.tsv (index, question, answer, "
            "category, image_path, image)",
            licence="for academic research only, not to be passed on",
            prompt=f"question (it ends “{_SUFFIX}”), “{SHORT}”",
            metric="for each task 100·accuracy + 100·accuracy+ (both questions of an image right); their sums over "
            "perception (to 2000) and cognition (to 800)",
            scored=(LOCALLY,),
        ),
        files=("MME/llava_mme.jsonl", "llava_mme.jsonl", "MME.tsv"),
        read=_read,
        parse=yes_no.parse_by(*_RULES),
        score=_score,
        review=_review,
        rules=yes_no.about(*_RULES),
        checksums={"MME.tsv": "b36b43c3f09801f5d368627fb92187c3"},
        submission=Submission(
            "<task>.txt, tab-separated: image's .txt, question, truth, answer (for MME's eval_tool/calculation.py)",
            _answer_files,
        ),
    )
)
