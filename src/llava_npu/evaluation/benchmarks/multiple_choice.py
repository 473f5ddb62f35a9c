"""Files in MMBench's form that need no code of their own.

AI2D: diagrams of school science (Kembhavi et al. 2016, arXiv:1603.07396), the test split.
MMStar: questions that need their image (Chen et al. 2024, arXiv:2403.20330).
One's own data, each row a question of its own (no rotations).
"""

from __future__ import annotations

from functools import partial

from llava_npu.evaluation.benchmarks import LOCALLY, MAY_JUDGE, Description, register
from llava_npu.evaluation.extraction.choices import ENGLISH, ChoiceForm, read_choices
from llava_npu.evaluation.judge.choice_judge import JudgedChoiceBenchmark

register(
    JudgedChoiceBenchmark(
        name="ai2d",
        title="AI2D (test)",
        description=Description(
            source="https://prior.allenai.org/projects/diagram-understanding (VLMEvalKit: AI2D_TEST.tsv, text labels "
            "masked by letters; AI2D_TEST_NO_MASK.tsv)",
            form="AI2D_TEST.tsv: index, question, A … D, answer, image",
            licence="CC BY-SA 4.0",
            prompt=f"question, one option a line, “{ENGLISH}”",
            metric="accuracy by category",
            scored=(LOCALLY, MAY_JUDGE),
        ),
        files=("AI2D_TEST.tsv", "AI2D_TEST_NO_MASK.tsv"),
        checksums={
            "AI2D_TEST.tsv": "0f593e0d1c7df9a3d69bf1f947e71975",
            "AI2D_TEST_NO_MASK.tsv": "fd8f463634d4fe9fbd23b876e8eea5be",
        },
    )
)

register(
    JudgedChoiceBenchmark(
        name="mmstar",
        title="MMStar",
        description=Description(
            source="https://github.com/MMStar-Benchmark/MMStar (VLMEvalKit: MMStar.tsv)",
            form="MMStar.tsv: index, question, A … D, answer, category, l2_category, image",
            licence="stated by neither paper nor repository; images from other benchmarks",
            prompt=f"question, one option a line, “{ENGLISH}”",
            metric="accuracy by category",
            scored=(LOCALLY, MAY_JUDGE),
        ),
        files=("MMStar.tsv",),
        read=partial(read_choices, form=ChoiceForm(skips_empty_options=True)),
        checksums={"MMStar.tsv": "e1ecd2140806c1b1bbf54b43372efb9e"},
    )
)

register(
    JudgedChoiceBenchmark(
        name="multiple_choice",
        title="Multiple choice (your own .tsv)",
        description=Description(
            source="your own",
            form=".tsv: index, question, A, B, …, answer (a letter), and image (base64) or image_path (below the "
            "table's folder); optional: hint, category, l2-category, split",
            licence="yours",
            prompt=f"hint, question, one option a line (“A. …”), “{ENGLISH}”",
            metric="accuracy by l2-category and category",
            scored=(LOCALLY, MAY_JUDGE),
        ),
        files=(),
    )
)
