"""LLaVA-Bench (in the wild): a judge compares answers with GPT-4's (Liu et al. 2023, arXiv:2304.08485)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import JUDGE, Benchmark, Description, Parsed, register
from llava_npu.evaluation.formats.json_files import JsonRecord, combined_digest, read_json_table, read_jsonl
from llava_npu.evaluation.formats.llava_files import check_unique, llava_question
from llava_npu.evaluation.formats.locating import QuestionImages, companion_file, require_companion
from llava_npu.evaluation.formats.table_images import TableImages
from llava_npu.evaluation.formats.tables import read_tsv, unique_indices
from llava_npu.evaluation.judge.judging import JudgeRule
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import Score, Unit, tabulate

_RULE = "judge"
_RULES_FILE = "rule.json"
_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_ROLE = "Assistant"
_PAIR = re.compile(r"\s*(\d+(?:\.\d+)?)\s*[,\s]\s*(\d+(?:\.\d+)?)\s*")
_LOWEST, _HIGHEST = 1, 10

_INSTRUCTION = """\
Two assistants answered the question above about an image that is described by the sentences under [Context].
Grade each answer for how helpful, relevant, accurate and detailed it is, on a scale from 1 to 10, higher being better.
The order of the answers must not matter.
On the first line of your reply write the two grades alone, that of Assistant 1 first, with a space between them.
Explain them on the lines after."""


def _read(path: Path) -> Dataset:
    return _with_rules(_read_table(path) if path.suffix == ".tsv" else _read_llava(path))


def _read_llava(path: Path) -> Dataset:
    records, digest = read_jsonl(path)
    check_unique(records)
    images = QuestionImages(path, ("images", "."))
    contexts, contexts_digest = read_jsonl(require_companion(path, ("context.jsonl",), "the images' descriptions"))
    references, references_digest = read_jsonl(require_companion(path, ("answers_gpt4.jsonl",), "GPT-4's answers"))
    captions = {record.need("image"): _caption(record) for record in contexts}
    answers = {record.need("question_id"): record.need("text") for record in references}
    questions = []
    for record in records:
        name, image = record.need("question_id"), record.need("image")
        if image not in captions:
            raise record.error("image", f"{image!r} has no description in context.jsonl.")
        if name not in answers:
            raise record.error("question_id", f"{name!r} has no answer in answers_gpt4.jsonl.")
        facts = {"caption": captions[image], "reference": answers[name]}
        questions.append(llava_question(record, images, category=record.need("category"), facts=facts))
    return Dataset(path, combined_digest([digest, contexts_digest, references_digest]), tuple(questions))


def _caption(record: JsonRecord) -> str:
    if not isinstance(record.values.get("caption"), list):
        return record.need("caption")
    caption = "\n".join(record.texts("caption"))
    if not caption.strip():
        raise record.error("caption", "empty.")
    return caption


def _read_table(path: Path) -> Dataset:
    table = read_tsv(path, required=("index", "question", "category", "caption", "gpt4_ans"))
    images = TableImages(table)
    unique_indices(table)
    questions = []
    for row in table.rows:
        for column in ("question", "category", "caption", "gpt4_ans"):
            if not row.label(column):
                raise row.error(column, "empty.")
        question = Question(
            id=row.label("index"),
            text=row.text("question"),
            prompt=row.text("question"),
            images=images.of(row),
            group=row.label("index"),
            category=row.label("category"),
            facts={"caption": row.text("caption"), "reference": row.text("gpt4_ans")},
        )
        questions.append(question)
    return Dataset(path, table.sha256, tuple(questions))


def _with_rules(dataset: Dataset) -> Dataset:
    file = companion_file(dataset.path, (_RULES_FILE, f"table/{_RULES_FILE}"))
    if file is None:
        note = (
            "The judge is instructed in our own words: scores are not comparable with published ones. Put LLaVA's "
            f"llava/eval/table/{_RULES_FILE} next to the question file to use its instruction."
        )
        return replace(dataset, notes=(*dataset.notes, note))
    rules, _ = read_json_table(file)

    def with_rule(question: Question) -> Question:
        name = f"llava_bench_{question.category}"
        if name not in rules:
            raise UserError(f"{file} has no rule {name!r}. It has: {', '.join(rules)}.")
        facts = {**question.facts, "role": rules[name].need("role"), "instruction": rules[name].need("prompt")}
        return replace(question, facts=facts)

    note = f"The judge's instruction is that of {file}."
    return replace(dataset.map(with_rule), notes=(*dataset.notes, note))


def _ask(question: Question, answer: str) -> str | None:
    facts = question.facts
    role = facts.get("role", _ROLE)
    parts = [("Context", facts["caption"]), ("Question", question.prompt)]
    for number, text in enumerate((facts["reference"], answer), start=1):
        parts.append((f"{role} {number}", f"{text}\n\n[End of {role} {number}]"))
    parts += [("System", facts.get("instruction", _INSTRUCTION))]
    return "".join(f"[{name}]\n{text}\n\n" for name, text in parts)


def _grades(question: Question, reply: str) -> str | None:
    match = _PAIR.fullmatch(reply.strip().split("\n")[0])
    if not match or not all(_LOWEST <= float(grade) <= _HIGHEST for grade in match.groups()):
        return None
    return f"{match[1]} {match[2]}"


def _parse(question: Question, answer: str) -> Parsed:
    return {}


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    # Without the judge's pair there is none of the reference either: such questions are left out, as a note says.
    units = []
    for question in questions:
        reading = parsed.get(question.id, {}).get(_RULE)
        if reading:
            reference, own = (float(grade) for grade in reading.split())
            units.append((question, own, reference))
    metrics = {
        "relative score": [Unit(question, (own, reference)) for question, own, reference in units],
        "own score": [Unit(question, (own, _HIGHEST)) for question, own, _ in units],
        "reference score": [Unit(question, (reference, _HIGHEST)) for question, _, reference in units],
    }
    return [score for metric, of_metric in metrics.items() for score in tabulate(of_metric, metric, _RULE)]


def _credit(question: Question, rule: str, reading: str | None) -> float | None:
    return float(reading.split()[1]) / _HIGHEST if reading else None  # its own grade


def _review(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[str]:
    judged = [readings[_RULE] for readings in parsed.values() if _RULE in readings]
    failed = sum(reading is None for reading in judged)
    if not failed:
        return []
    return [f"{failed} of {len(judged)} questions have no grades and are left out of both means."]


register(
    Benchmark(
        name="llavabench",
        title="LLaVA-Bench (in the wild)",
        description=Description(
            source="https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild; VLMEvalKit: LLaVABench.tsv",
            form="questions.jsonl (question_id, image, category, text) with context.jsonl (image, caption), "
            f"answers_gpt4.jsonl (question_id, text), images/ and, for the original's instruction, {_RULES_FILE}; or "
            "LLaVABench.tsv (index, question, category, caption, gpt4_ans, image)",
            licence="Apache-2.0",
            prompt="the question alone",
            metric="mean grade over GPT-4's mean grade, by category; both grades from a judge that sees both answers",
            scored=(JUDGE,),
        ),
        files=(
            "llava-bench-in-the-wild/questions.jsonl",
            "llavabench/questions.jsonl",
            "LLaVABench.tsv",
            "questions.jsonl",
        ),
        read=_read,
        parse=_parse,
        score=_score,
        credit=_credit,
        review=_review,
        max_new_tokens=1024,
        rules={_RULE: "a judge model's grades of both answers"},
        checksums={"LLaVABench.tsv": "d382a093f749a697820d3dadd61c8428"},
        judging=JudgeRule(
            rule=_RULE, required=True, ask=_ask, read=_grades, system=_SYSTEM, temperature=0.2, max_tokens=1024
        ),
    )
)
