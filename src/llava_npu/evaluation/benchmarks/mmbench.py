"""MMBench, English and Chinese (Liu et al. 2023, arXiv:2307.06281), and any circular file in its form."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from llava_npu.evaluation.benchmarks import LOCALLY, MAY_JUDGE, Benchmark, Description, register
from llava_npu.evaluation.extraction.choices import (
    CHINESE,
    ENGLISH,
    ChoiceForm,
    read_choices,
    review_circular,
    score_circular,
)
from llava_npu.evaluation.formats.tables import Row
from llava_npu.evaluation.judge.choice_judge import JudgedChoiceBenchmark
from llava_npu.evaluation.questions import Dataset
from llava_npu.evaluation.reports.submissions import Submission, as_spreadsheet, number_or_text

_NOT_SUBMITTED = frozenset({"hint", "category", "source", "image", "comment", "l2-category"})
_PREDICTION_PLACE = 6
_MD5 = {
    "MMBench_DEV_EN.tsv": "b6caf1133a01c6bb705cf753bb527ed8",
    "MMBench_TEST_EN.tsv": "6939fadb0ce626fefc0bdc9c64efc528",
    "MMBench_DEV_CN.tsv": "08b8fc3324a5ed74155350f57be69fbd",
    "MMBench_TEST_CN.tsv": "7e1239baf0ee4c8b513e19705a0f317e",
    "MMBench_DEV_EN_V11.tsv": "30c05be8f2f347a50be25aa067248184",
    "MMBench_TEST_EN_V11.tsv": "8d1a704e791df6f5d9fb3ef782b65365",
    "MMBench_DEV_CN_V11.tsv": "593f9b5f6bea453d870a798b34ae4f37",
    "MMBench_TEST_CN_V11.tsv": "156e6569f9547afb16603eca16e85373",
}
_CLOSED = (
    "the server (mmbench.opencompass.org.cn) has been closed since 2026-03-31. The answers of the test files were "
    "released (https://github.com/open-compass/MMBench/issues/61): download MMBench_TEST_EN_V11.tsv or "
    "MMBench_TEST_CN_V11.tsv again from opencompass.openxlab.space/utils/benchmarks/MMBench, and score what was "
    "predicted with `--data` that file and `--predictions` this run's predictions.jsonl."
)


def _submitted(row: Row) -> Mapping[str, str]:
    return {column: value for column, value in row.cells.items() if column not in _NOT_SUBMITTED}


def _spreadsheet(dataset: Dataset, answers: Mapping[str, str]) -> Mapping[str, bytes]:
    # As LLaVA's convert_mmbench_for_submission.py: the table without some columns, `prediction` as the seventh.
    columns = list(dataset.questions[0].facts)
    place = min(_PREDICTION_PLACE, len(columns))
    rows = []
    for question in dataset.questions:
        cells: list[str | int | None] = [_cell(column, question.facts[column]) for column in columns]
        rows.append([*cells[:place], answers[question.id], *cells[place:]])
    header = [*columns[:place], "prediction", *columns[place:]]
    return {f"{dataset.path.stem}.xlsx": as_spreadsheet(header, rows)}


def _cell(column: str, value: str) -> str | int | None:
    if value.strip().lower() in ("", "nan"):
        return None
    return number_or_text(value.strip()) if column == "index" else value


def _mmbench(name: str, title: str, instruction: str, files: tuple[str, ...], closed: str = "") -> Benchmark:
    return JudgedChoiceBenchmark(
        name=name,
        title=title,
        description=Description(
            source="https://github.com/open-compass/MMBench (VLMEvalKit: MMBench_DEV_EN.tsv and others from "
            "opencompass.openxlab.space/utils/benchmarks/MMBench; LLaVA: mmbench_dev_20230712.tsv, "
            "mmbench_dev_cn_20231003.tsv from download.openmmlab.com)",
            form=".tsv: index, question, hint, A, B, …, answer, category, l2-category, split, image (base64, or the "
            "index of the row that holds it). The rotations of question g are the rows g + k·10⁶, as published",
            licence="Apache-2.0",
            prompt=f"hint, question, one option a line (“A. …”), “{instruction}”",
            metric="circular accuracy (every rotation right) by l2-category and category, and vanilla accuracy",
            scored=(LOCALLY, MAY_JUDGE),
        ),
        files=files,
        read=partial(read_choices, form=ChoiceForm(instruction, circular=True, facts=_submitted)),
        score=score_circular,
        review=review_circular,
        max_new_tokens=1024,  # as LLaVA's script; an answer normally ends after its letter
        checksums=_MD5,
        submission=Submission(
            ".xlsx: the table without hint, category, source, image, comment and l2-category, `prediction` as the "
            "seventh column (as the server took it)",
            _spreadsheet,
        ),
        closed=closed,
    )


register(
    _mmbench(
        "mmbench",
        "MMBench (English)",
        ENGLISH,
        (
            "MMBench_DEV_EN.tsv",
            *(f"{folder}mmbench_dev_{name}2023*.tsv" for name in ("", "en_") for folder in ("mmbench/", "")),
            "MMBench_DEV_EN_V11.tsv",
        ),
    )
)
register(
    _mmbench(
        "mmbench_cn",
        "MMBench (Chinese)",
        CHINESE,
        (
            "MMBench_DEV_CN.tsv",
            "mmbench_cn/mmbench_dev_cn_*.tsv",
            "mmbench/mmbench_dev_cn_*.tsv",
            "mmbench_dev_cn_*.tsv",
            "MMBench_DEV_CN_V11.tsv",
        ),
    )
)
register(
    _mmbench(
        "mmbench_test",
        "MMBench test (English)",
        ENGLISH,
        (
            "MMBench_TEST_EN.tsv",
            *(f"{folder}mmbench_test_{name}2023*.tsv" for name in ("", "en_") for folder in ("mmbench/", "")),
            "MMBench_TEST_EN_V11.tsv",
        ),
        _CLOSED,
    )
)
register(
    _mmbench(
        "mmbench_cn_test",
        "MMBench test (Chinese)",
        CHINESE,
        (
            "MMBench_TEST_CN.tsv",
            "mmbench_cn/mmbench_test_cn_*.tsv",
            "mmbench/mmbench_test_cn_*.tsv",
            "mmbench_test_cn_*.tsv",
            "MMBench_TEST_CN_V11.tsv",
        ),
        _CLOSED,
    )
)
