"""MMStar: questions that need their image (Chen et al. 2024, arXiv:2403.20330)."""

from __future__ import annotations

from functools import partial

from llava_npu.evaluation.benchmarks import LOCALLY, MAY_JUDGE, Benchmark, Description, register
from llava_npu.evaluation.extraction.choices import (
    ABOUT,
    ENGLISH,
    ChoiceForm,
    parse_choice,
    read_choices,
    review_vanilla,
    score_vanilla,
)
from llava_npu.evaluation.judge import choice_judge

register(
    Benchmark(
        name="mmstar",
        title="MMStar",
        description=Description(
            source="https://github.com/MMStar-Benchmark/MMStar (VLMEvalKit: MMStar.tsv)",
            form="MMStar.tsv: index, question, A … D, answer, category, l2_category, image",
            licence="stated by neither paper nor repository; images from other benchmarks",
            prompt=f"question, one option a line, “{ENGLISH}”; greedy, at most 128 new tokens",
            metric="accuracy by category",
            scored=(LOCALLY, MAY_JUDGE),
        ),
        files=("MMStar.tsv",),
        read=partial(read_choices, form=ChoiceForm(skips_empty_options=True)),
        parse=parse_choice,
        score=score_vanilla,
        review=review_vanilla,
        max_new_tokens=128,
        rules={**ABOUT, choice_judge.RULE: choice_judge.ABOUT},
        checksums={"MMStar.tsv": "e1ecd2140806c1b1bbf54b43372efb9e"},
        judging=choice_judge.CHOICE_JUDGE,
    )
)
