"""Q-Bench, low-level perception (Wu et al. 2023, arXiv:2309.14181), English and Chinese."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from llava_npu.evaluation.benchmarks import LOCALLY, MAY_JUDGE, SERVER, Benchmark, Description, register
from llava_npu.evaluation.extraction.choices import CHINESE, ENGLISH, ChoiceForm, read_choices
from llava_npu.evaluation.formats.json_files import JsonRecord, read_json_list
from llava_npu.evaluation.formats.locating import QuestionImages
from llava_npu.evaluation.judge.choice_judge import JudgedChoiceBenchmark
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.reports.submissions import Submission, as_json_lines

# The lines between question and options in Q-Bench's script for LLaVA. Its Chinese one has "\在" where "\n在" was
# meant: the backslash went to the model, with no line break.
_CHOOSE = {
    "en": "\nChoose between one of the options as follows:\n",
    "zh": "\\在下列选项中选择一个:\n",
}
# What LLaVA's scripts call the answers to the Chinese files.
_ANSWERED_AS = {"质衡-问答-验证集": "llvisionqa_zh_dev", "质衡-问答-测试集": "llvisionqa_zh_test"}
_TYPES = {"0": "yes-or-no", "1": "what", "2": "how"}
_CONCERNS = {"0": "distortion", "1": "other", "2": "in-context distortion", "3": "in-context other"}


def _read(path: Path, language: str) -> Dataset:
    if path.suffix == ".tsv":
        return read_choices(path, ChoiceForm(ENGLISH if language == "en" else CHINESE))
    records, digest = read_json_list(path)
    images = QuestionImages(path, ("images_llvisionqa", "images_llviqionqa", "images", "."))
    questions = tuple(_question(number, record, images, language) for number, record in enumerate(records))
    return Dataset(path, digest, questions)


def _question(number: int, record: JsonRecord, images: QuestionImages, language: str) -> Question:
    text = record.need("question")
    candidates = record.texts("candidates")
    if not 2 <= len(candidates) <= len(string.ascii_uppercase):
        raise record.error("candidates", f"{len(candidates)} of them; at least two are expected.")
    options = record.options("candidates")
    lines = "".join(f"{letter}. {option}\n" for letter, option in options.items())
    right = record.get("correct_ans")  # absent in the test file
    if right and right not in candidates:
        raise record.error("correct_ans", f"{right!r} is none of the candidates.")
    return Question(
        id=str(number),
        text=text,
        prompt=text + _CHOOSE[language] + lines,
        images=(images.image(record, "img_path"),),
        options=options,
        answer=string.ascii_uppercase[candidates.index(right)] if right else None,
        group=str(number),
        category=_TYPES.get(record.get("type"), record.get("type")),
        l2_category=_CONCERNS.get(record.get("concern"), record.get("concern")),
        facts={"record": json.dumps(record.values)},
    )


def _responses(dataset: Dataset, answers: Mapping[str, str]) -> Mapping[str, bytes]:
    if dataset.path.suffix == ".tsv":
        return {}
    lines = [
        {**json.loads(question.facts["record"]), "response": answers[question.id]} for question in dataset.questions
    ]
    stem = dataset.path.stem
    return {f"{_ANSWERED_AS.get(stem, stem)}_answers.jsonl": as_json_lines(lines)}


def _qbench(name: str, title: str, language: str, files: tuple[str, ...], instruction: str) -> Benchmark:
    return JudgedChoiceBenchmark(
        name=name,
        title=title,
        description=Description(
            source="https://huggingface.co/datasets/nanyangtu/LLVisionQA-QBench"
            + ("; VLMEvalKit: Q-Bench1_VAL.tsv, Q-Bench1_TEST.tsv" if language == "en" else ""),
            form=".json, a list: img_path, question, candidates, correct_ans, type, concern; with images_llvisionqa/"
            + ("; or the .tsv in MMBench's form" if language == "en" else ""),
            licence="CC BY-NC-SA 4.0",
            prompt=f"question, “{_CHOOSE[language].strip()}”, one option a line; of a .tsv: question, one option a "
            f"line, “{instruction}”",
            metric="accuracy by type of question and concern; of the test file, whose answers are secret, predictions",
            scored=(LOCALLY, MAY_JUDGE, SERVER),
        ),
        files=files,
        read=partial(_read, language=language),
        max_new_tokens=1024,
        checksums={
            "Q-Bench1_VAL.tsv": "837bdb6cd2da571713543462815187b7",
            "Q-Bench1_TEST.tsv": "15e759bfd58c9d5f30b23a317d347153",
        },
        submission=Submission(
            f"llvisionqa_{'' if language == 'en' else 'zh_'}dev_answers.jsonl (or test): each record of the .json with "
            "`response` added",
            _responses,
        ),
    )


_FOLDERS = ("qbench/", "")
register(
    _qbench(
        "qbench",
        "Q-Bench (English)",
        "en",
        (*(f"{folder}llvisionqa_{split}.json" for split in ("dev", "test") for folder in _FOLDERS), "Q-Bench1_VAL.tsv"),
        ENGLISH,
    )
)
register(
    _qbench(
        "qbench_cn",
        "Q-Bench (Chinese)",
        "zh",
        tuple(f"{folder}质衡-问答-{split}.json" for split in ("验证集", "测试集") for folder in _FOLDERS),
        CHINESE,
    )
)
