"""MM-Vet: open questions that need several abilities at once (Yu et al. 2023, arXiv:2308.02490), scored by a judge."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llava_npu.evaluation.benchmarks import JUDGE, SERVER, Benchmark, Description, Parsed, register
from llava_npu.evaluation.extraction.open_answers import read_open_table
from llava_npu.evaluation.formats.json_files import JsonRecord, combined_digest, read_json_table, read_jsonl, read_text
from llava_npu.evaluation.formats.llava_files import check_unique, llava_question
from llava_npu.evaluation.formats.locating import QuestionImages, companion_file, require_companion
from llava_npu.evaluation.judge.judging import JudgeRule
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.reports.submissions import Submission
from llava_npu.evaluation.statistics.accuracy import CATEGORY, L2_CATEGORY, OVERALL, Label, Score, hit, tabulate

_RULE = "judge"
_PROMPT_FILE = "judge_prompt.txt"
# The first word, as in MM-Vet's notebook, labelled or not. What a list begins with ("1. It …") is not a grade.
_SCORE = re.compile(
    r"[*_`\"'(\[|\s]*(?:(?:the\s+)?(?:correctness|score|grade)[*_`]*(?:\s+is)?\s*[:=|]?[*_`\s]*)?"
    r"([01](?:\.\d+)?|\.\d+)(?:\s*/\s*1(?:\.0+)?)?(?=\.?\s*$|[*_`\"')\]|,;:\s](?!\d|\s*(?:/|%|out\s+of\b)))",
    re.IGNORECASE,
)

_INSTRUCTION = """\
Grade a model's answer to a question about an image against the reference answer. In the reference, <AND> joins parts
that are all needed, and <OR> joins parts of which one is enough.
Grades are 0.0 (nothing of it is right), 0.1, 0.2, … 0.9, 1.0 (all of it is right). An answer that gives one of two
needed parts gets 0.5; wrong additions to a needed part do not make that part wrong.
Reply with the grade alone.
"""


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        # The question alone: free answers, as LLaVA's script asks for them.
        table = read_open_table(path, secret=False)
        return _with_instruction(table.map(lambda question: replace(question, prompt=question.text)))
    records, digest = read_jsonl(path)
    check_unique(records)
    annotations, annotations_digest = read_json_table(require_companion(path, ("mm-vet.json",), "MM-Vet's own file"))
    images = QuestionImages(path, ("images", "."))
    questions = [_question(record, images, annotations) for record in records]
    return _with_instruction(Dataset(path, combined_digest([digest, annotations_digest]), tuple(questions)))


def _question(record: JsonRecord, images: QuestionImages, annotations: Mapping[str, JsonRecord]) -> Question:
    name = f"v1_{record.need('question_id').removeprefix('v1_')}"
    if name not in annotations:
        raise record.error("question_id", f"{name!r} is not in mm-vet.json.")
    annotation = annotations[name]
    abilities = annotation.texts("capability")
    if not abilities:
        raise annotation.error("capability", "empty.")
    return llava_question(record, images, id=name, answer=annotation.need("answer"), category=",".join(abilities))


def _with_instruction(dataset: Dataset) -> Dataset:
    file = companion_file(dataset.path, (_PROMPT_FILE,))
    if file is None:
        note = (
            "The judge is instructed in our own words: scores are not comparable with published ones. Put MM-Vet's "
            f"prompt next to the question file as {_PROMPT_FILE} to use it, or submit to its own judge."
        )
        return replace(dataset, notes=(*dataset.notes, note))
    _, instruction = read_text(file)
    dataset = dataset.map(lambda question: replace(question, facts={"instruction": instruction}))
    return replace(dataset, notes=(*dataset.notes, f"The judge's instruction is that of {file}."))


def _ask(question: Question, answer: str) -> str | None:
    if question.answer is None or not answer.strip():
        return None
    reference = question.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    if "instruction" in question.facts:  # MM-Vet's prompt is a table, to be continued by one cell
        return question.facts["instruction"] + "\n" + " | ".join((question.text, reference, answer, ""))
    return f"{_INSTRUCTION}\nQuestion: {question.text}\nReference: {reference}\nAnswer: {answer}\nGrade:"


def _grade(question: Question, reply: str) -> str | None:
    match = _SCORE.match(reply.strip())  # an explanation may follow
    return match[1] if match and 0 <= float(match[1]) <= 1 else None


def _parse(question: Question, answer: str) -> Parsed:
    return {}


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    judged = [question for question in questions if _RULE in parsed.get(question.id, {})]
    units = [hit(question, float(parsed[question.id][_RULE] or 0)) for question in judged]
    return tabulate(units, "score", _RULE, labels=_abilities)


def _credit(question: Question, rule: str, reading: str | None) -> float | None:
    return float(reading or 0) if rule == _RULE else None


def _abilities(question: Question) -> list[Label]:
    # A question counts in each of its abilities, and in their combination.
    combination = [(L2_CATEGORY, question.category)] if question.category else []
    single = [(CATEGORY, ability) for ability in question.category.split(",") if ability]
    return [(OVERALL, OVERALL), *combination, *single]


def _results(dataset: Dataset, answers: Mapping[str, str]) -> Mapping[str, bytes]:
    names = {q.id: q.id if q.id.startswith("v1_") else f"v1_{q.id}" for q in dataset.questions}
    return {"mm-vet.json": json.dumps({names[name]: answers[name] for name in names}, indent=2).encode()}


register(
    Benchmark(
        name="mmvet",
        title="MM-Vet",
        description=Description(
            source="https://github.com/yuweihao/MM-Vet (mm-vet.zip), questions as LLaVA's eval.zip has them; "
            "VLMEvalKit: MMVet.tsv",
            form="llava-mm-vet.jsonl (question_id, image, text) with mm-vet.json (answer, capability), images/ and, "
            f"for the original's instruction, {_PROMPT_FILE}; or MMVet.tsv (index, question, answer, category, image)",
            licence="CC BY-NC 4.0",
            prompt="the question alone",
            metric="mean grade (0 to 1) by ability and by combination of abilities",
            scored=(JUDGE, SERVER),
        ),
        files=("mm-vet/llava-mm-vet.jsonl", "mmvet/llava-mm-vet.jsonl", "llava-mm-vet.jsonl", "MMVet.tsv"),
        read=_read,
        parse=_parse,
        score=_score,
        credit=_credit,
        max_new_tokens=1024,
        rules={_RULE: "a judge model's grade"},
        checksums={"MMVet.tsv": "748aa6d4aa9d4de798306a63718455e3"},
        submission=Submission("mm-vet.json: {“v1_<id>”: answer} (MM-Vet's notebook or online judge)", _results),
        judging=JudgeRule(rule=_RULE, required=True, ask=_ask, read=_grade, max_tokens=16),
    )
)
