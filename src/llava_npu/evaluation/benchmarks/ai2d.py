"""AI2D: diagrams of school science (Kembhavi et al. 2016, arXiv:1603.07396), the test split."""

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
        name="ai2d",
        title="AI2D (test)",
        description=Description(
            source="https://prior.allenai.org/projects/diagram-understanding (VLMEvalKit: AI2D_TEST.tsv, text labels "
            "masked by letters; AI2D_TEST_NO_MASK.tsv)",
            form="AI2D_TEST.tsv: index, question, A … D, answer, image",
            licence="CC BY-SA 4.0",
            prompt=f"question, one option a line, “{ENGLISH}”; greedy, at most 128 new tokens",
            metric="accuracy by category",
            scored=(LOCALLY, MAY_JUDGE),
        ),
        files=("AI2D_TEST.tsv", "AI2D_TEST_NO_MASK.tsv"),
        read=read_choices,
        parse=parse_choice,
        score=score_vanilla,
        review=review_vanilla,
        max_new_tokens=128,
        rules={**ABOUT, choice_judge.RULE: choice_judge.ABOUT},
        checksums={
            "AI2D_TEST.tsv": "0f593e0d1c7df9a3d69bf1f947e71975",
            "AI2D_TEST_NO_MASK.tsv": "fd8f463634d4fe9fbd23b876e8eea5be",
        },
        judging=choice_judge.CHOICE_JUDGE,
    )
)
