"""Multiple choice on one's own data: MMBench's form, each row a question of its own (no rotations)."""

from __future__ import annotations

from llava_npu.evaluation.benchmarks import LOCALLY, MAY_JUDGE, Benchmark, Description, register
from llava_npu.evaluation.extraction.choices import (
    ABOUT,
    ENGLISH,
    parse_choice,
    read_choices,
    review_vanilla,
    score_vanilla,
)
from llava_npu.evaluation.judge import choice_judge

register(
    Benchmark(
        name="multiple_choice",
        title="Multiple choice (your own .tsv)",
        description=Description(
            source="your own",
            form=".tsv: index, question, A, B, …, answer (a letter), and image (base64) or image_path (below the "
            "table's folder); optional: hint, category, l2-category, split",
            licence="yours",
            prompt=f"hint, question, one option a line (“A. …”), “{ENGLISH}”; greedy, at most 128 new tokens",
            metric="accuracy by l2-category and category",
            scored=(LOCALLY, MAY_JUDGE),
        ),
        files=(),
        read=read_choices,
        parse=parse_choice,
        score=score_vanilla,
        review=review_vanilla,
        max_new_tokens=128,
        rules={**ABOUT, choice_judge.RULE: choice_judge.ABOUT},
        judging=choice_judge.CHOICE_JUDGE,
    )
)
