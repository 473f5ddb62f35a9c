"""MMBench, English and Chinese (Liu et al. 2023, arXiv:2307.06281), and any circular file in its form."""

from __future__ import annotations

from functools import partial

from llava_npu.evaluation.benchmarks import Benchmark, register
from llava_npu.evaluation.choices import (
    CHINESE,
    ENGLISH,
    parse_choice,
    read_choices,
    review_circular,
    score_circular,
)

_DATA = (
    "OpenCompass' MMBench .tsv, dev or test, with rotations as published (index + k·10⁶); form: evaluation/choices.py. "
    "Test answers are secret: only predictions are written."
)
_METRIC = "circular accuracy by l2-category and category, vanilla beside it; scored here, no judge"


def _mmbench(name: str, title: str, instruction: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        data=_DATA,
        metric=_METRIC,
        read=partial(read_choices, instruction=instruction, circular=True),
        parse=parse_choice,
        score=score_circular,
        review=review_circular,
        max_new_tokens=1024,  # as LLaVA's script; an answer normally ends after its letter
    )


register(_mmbench("mmbench", "MMBench (English)", ENGLISH))
register(_mmbench("mmbench_cn", "MMBench (Chinese)", CHINESE))
