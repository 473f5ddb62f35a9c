"""What the questions about one image begin with is computed once, and no answer changes by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_npu.evaluation import benchmarks
from llava_npu.evaluation.answering import ChooseLikeliest, GenerateText, ModelAnswerer
from llava_npu.evaluation.questions import Question
from llava_npu.inference import runner
from llava_npu.models.loaded import LoadedModel
from support.evaluation_samples import circular_rows, write_tsv


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    """Three images with four rotations each, one question in text alone, one about two images."""
    rows = circular_rows(groups=3)
    for row in rows:
        row["hint"] = "a hint, so that prompts differ in length " * (int(str(row["index"])) % 1_000_000 - 1)
    given = list(benchmarks.get("mmbench").read(write_tsv(tmp_path / "bench.tsv", rows)).questions)
    two = (*given[0].images, *given[-1].images)
    return [*given, replace(given[0], id="blind", images=()), replace(given[1], id="two", images=two)]


@contextmanager
def counted_tokens(model: Any) -> Iterator[list[int]]:
    """Tokens of each pass through the language model."""
    counts: list[int] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    try:
        yield counts
    finally:
        handle.remove()


def one_at_a_time(tiny: LoadedModel, method: Any, questions: list[Question]) -> list[Any]:
    return [answer for question in questions for answer in ModelAnswerer(tiny, method).answer([question])]


at_once = pytest.mark.parametrize("tokens_at_once", [1, 150, None], ids=["row by row", "some rows", "all rows"])


@pytest.mark.slow
@at_once
def test_shared_batches_generate_what_one_at_a_time_does(
    tiny: LoadedModel, questions: list[Question], monkeypatch: pytest.MonkeyPatch, tokens_at_once: int | None
) -> None:
    alone = one_at_a_time(tiny, GenerateText(8), questions)
    monkeypatch.setattr(runner, "_TOKENS_AT_ONCE_ON_HOST", tokens_at_once)
    together = ModelAnswerer(tiny, GenerateText(8)).answer(questions)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in alone}) > 4


@pytest.mark.slow
@at_once
@pytest.mark.parametrize("candidates", ["text", "letter"])
def test_shared_batches_find_the_same_likelihoods(
    tiny: LoadedModel,
    questions: list[Question],
    candidates: str,
    monkeypatch: pytest.MonkeyPatch,
    tokens_at_once: int | None,
) -> None:
    method = ChooseLikeliest(candidates)
    alone = one_at_a_time(tiny, method, questions)
    monkeypatch.setattr(runner, "_TOKENS_AT_ONCE_ON_HOST", tokens_at_once)
    for one, other in zip(alone, ModelAnswerer(tiny, method).answer(questions), strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def test_what_prompts_share_is_computed_once(tiny: LoadedModel, questions: list[Question]) -> None:
    rotations = [question for question in questions if question.group == "1" and len(question.images) == 1]
    with counted_tokens(tiny.model) as alone:
        one_at_a_time(tiny, GenerateText(1), rotations)
    with counted_tokens(tiny.model) as together:
        ModelAnswerer(tiny, GenerateText(1)).answer(rotations)
    first, rest = together
    assert first in alone
    assert rest / 3 < first / 2  # the system text, the image and the question once; three times the options


def test_batches_share_what_an_earlier_one_has_computed(tiny: LoadedModel, questions: list[Question]) -> None:
    rotations = [question for question in questions if question.group == "1" and len(question.images) == 1]
    answerer = ModelAnswerer(tiny, GenerateText(1))
    with counted_tokens(tiny.model) as passes:
        for question in rotations:
            answerer.answer([question])
    assert max(passes[1:]) < passes[0] * 3 / 4


def test_prompts_that_share_nothing_are_prefilled_apart_and_decoded_together(
    tiny: LoadedModel, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host, where several long prompts in one pass are slower than one after the other."""
    apart = [question for question in questions if question.rotation == int(question.group) - 1][:3]
    assert len({question.images for question in apart}) == 3
    alone = one_at_a_time(tiny, GenerateText(3), apart)
    monkeypatch.setattr(runner, "_TOKENS_AT_ONCE_ON_HOST", 100)
    with counted_tokens(tiny.model) as passes:
        together = ModelAnswerer(tiny, GenerateText(3)).answer(apart)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert passes[3:] == [3, 3]
    assert min(passes[:3]) > 3
