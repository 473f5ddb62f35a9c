"""Multiple choice on one's own data: MMBench's form, each row a question of its own (no rotations)."""

from __future__ import annotations

from functools import partial

from llava_npu.evaluation.benchmarks import Benchmark, register
from llava_npu.evaluation.choices import ENGLISH, parse_choice, read_choices, review_vanilla, score_vanilla

register(
    Benchmark(
        name="multiple_choice",
        title="Multiple choice (your own .tsv)",
        data="your own .tsv: index, question, A, B, …, answer, and image (base64) or image_path; "
        "optional: hint, category, l2-category, split",
        metric="accuracy by l2-category and category; scored here, no judge",
        read=partial(read_choices, instruction=ENGLISH, circular=False),
        parse=parse_choice,
        score=score_vanilla,
        review=review_vanilla,
        max_new_tokens=128,
    )
)
