"""What prompts begin with alike is computed once, and nothing of what a prompt sees changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_samples import circular_rows, plain_image, write_tsv
from hypothesis import given
from hypothesis import strategies as st

from llava_npu.data.image_sources import LoadedImage
from llava_npu.evaluation import benchmarks
from llava_npu.evaluation.answering import ChooseLikeliest, GenerateText, ModelAnswerer
from llava_npu.evaluation.questions import Question
from llava_npu.inference import features
from llava_npu.inference.features import ImageFeatures
from llava_npu.inference.prefix_cache import Prompt, begin, beginning_lengths, can_share, shared_lengths
from llava_npu.models.loaded import LoadedModel

IMAGE = 9  # the image token of the prompts below
IMAGES = [LoadedImage(str(shade), plain_image((shade, 90, 255 - shade))) for shade in (10, 120, 240)]


def prompt(text: str, *images: int) -> Prompt:
    """ "12II3" for tokens; I is an image token."""
    ids = tuple(IMAGE if character == "I" else int(character) for character in text)
    return Prompt(ids, tuple(IMAGES[number] for number in images))


@pytest.mark.parametrize(
    ("prompts", "lengths"),
    [
        ([prompt("1II234", 0), prompt("1II256", 0)], [4, 4]),
        ([prompt("1II23", 0), prompt("1II2", 0)], [3, 3]),  # one token at least stays behind
        ([prompt("1II2", 0), prompt("1II2", 0)], [3, 3]),
        ([prompt("1II234", 0), prompt("1II256", 1)], None),  # other images: other keys and values
        ([prompt("1234"), prompt("1256")], [2, 2]),
        ([prompt("1II234", 0), prompt("2II256", 0)], None),  # they part before the image ends
        ([prompt("1II24", 0), prompt("1II25", 0), prompt("1II7777", 1)], [4, 4, 6]),  # the rest as long as the others'
        ([prompt("1II2345", 0), prompt("1II6", 0), prompt("1II7", 1)], [3, 3, 3]),  # but not into the image
        ([prompt("1II23", 0)], None),
    ],
)
def test_shared_lengths(prompts: list[Prompt], lengths: list[int] | None) -> None:
    assert shared_lengths(prompts, IMAGE) == lengths


texts = st.builds(
    lambda before, images, after: ("1" * before + "I" * 2 * images + after, images),
    st.integers(0, 2),
    st.integers(0, 2),
    st.text("123", min_size=1, max_size=6),
)


@given(st.lists(texts, min_size=1, max_size=7), st.randoms())
def test_beginnings_hold_all_images_and_leave_a_token(chosen: list[tuple[str, int]], random: Any) -> None:
    prompts = [prompt(text, *(random.randrange(2) for _ in range(images))) for text, images in chosen]
    lengths = shared_lengths(prompts, IMAGE)
    if lengths is None:
        return
    assert len({(each.ids[:length], each.images) for each, length in zip(prompts, lengths, strict=True)}) < len(prompts)
    for each, length in zip(prompts, lengths, strict=True):
        assert 1 <= length < len(each.ids)
        assert IMAGE not in each.ids[length:]


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
def counted_tokens(model: Any) -> Iterator[list[tuple[int, int]]]:
    """(rows, columns) of each pass through the language model."""
    shapes: list[tuple[int, int]] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()


def one_at_a_time(tiny: LoadedModel, method: Any, questions: list[Question]) -> list[Any]:
    return [answer for question in questions for answer in ModelAnswerer(tiny, method).answer([question])]


at_once = pytest.mark.parametrize("tokens_at_once", [1, 150, None], ids=["row by row", "some rows", "all rows"])


@at_once
def test_shared_batches_generate_what_one_at_a_time_does(
    tiny: LoadedModel, questions: list[Question], monkeypatch: pytest.MonkeyPatch, tokens_at_once: int | None
) -> None:
    alone = one_at_a_time(tiny, GenerateText(8), questions)
    monkeypatch.setattr(features, "_TOKENS_AT_ONCE_ON_HOST", tokens_at_once)
    together = ModelAnswerer(tiny, GenerateText(8)).answer(questions)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in alone}) > 4


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
    monkeypatch.setattr(features, "_TOKENS_AT_ONCE_ON_HOST", tokens_at_once)
    for one, other in zip(alone, ModelAnswerer(tiny, method).answer(questions), strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def test_what_prompts_share_is_computed_once(tiny: LoadedModel, questions: list[Question]) -> None:
    model = tiny.model
    rotations = [question for question in questions if question.group == "1" and len(question.images) == 1]
    with counted_tokens(model) as alone:
        one_at_a_time(tiny, GenerateText(1), rotations)
    with counted_tokens(model) as together:
        ModelAnswerer(tiny, GenerateText(1)).answer(rotations)
    (one_row, beginning), (rows, rest) = together
    assert (one_row, rows) == (1, 4)
    assert beginning + rest == max(columns for _, columns in alone)
    assert beginning > rest  # the system text, the image, the question


def test_prompts_that_share_nothing_are_read_apart_and_answered_together(
    tiny: LoadedModel, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host, where several long prompts in one pass are slower than one after the other."""
    apart = [question for question in questions if question.rotation == int(question.group) - 1][:3]
    assert len({question.images for question in apart}) == 3
    alone = one_at_a_time(tiny, GenerateText(3), apart)
    monkeypatch.setattr(features, "_TOKENS_AT_ONCE_ON_HOST", 100)
    with counted_tokens(tiny[0]) as passes:
        together = ModelAnswerer(tiny, GenerateText(3)).answer(apart)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [rows for rows, _ in passes] == [1, 1, 1, 3, 3, 3]
    assert [columns for _, columns in passes[3:]] == [1, 1, 1]


def test_a_prompt_that_ends_in_its_image_is_not_cut(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_TOKENS_AT_ONCE_ON_HOST", 2)
    assert beginning_lengths(tiny[0], [prompt("1II2", 0), prompt("1II", 1)], IMAGE) is None
    assert beginning_lengths(tiny[0], [prompt("1II2", 0), prompt("1II3", 1)], IMAGE) == [3, 3]


def test_generation_sees_the_positions_of_the_whole_prompt(tiny: LoadedModel) -> None:
    """Scores, not only the tokens that win: a few padded columns counted as positions change those slightly."""
    model, processor = tiny
    images = IMAGES[:2]
    asked = [("Is it red?", 0), ("Is it blue, or is it rather green than blue?", 0), ("Why", 0), ("What?", 1)]
    turns = [[{"from": "human", "value": f"<image>\n{text}"}] for text, _ in asked]
    prompts = [
        Prompt(tuple(processor.encode_prompt(each, [(1, 1)], "a prompt")), (images[number],))
        for each, (_, number) in zip(turns, asked, strict=True)
    ]
    encoded = model.encode_images(processor.preprocess_images([image.open() for image in images]))
    seen = {
        image.key: ImageFeatures(feature[None], (1, 1)) for image, feature in zip(images, encoded.detach(), strict=True)
    }
    lengths = shared_lengths(prompts, processor.image_token_id)
    assert lengths is not None
    wanted: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3, "output_scores": True}
    wanted["return_dict_in_generate"] = True
    with torch.no_grad():
        begun = begin(tiny, prompts, lengths, seen)
        together = model.generate(
            input_ids=begun.input_ids, attention_mask=begun.attention_mask, past_key_values=begun.cache, **wanted
        )
    for row, (each, (_, number)) in enumerate(zip(turns, asked, strict=True)):
        alone = model.generate(**processor.encode_prompts([each], [[images[number].open()]]), **wanted)
        for one, other in zip(together.scores, alone.scores, strict=True):
            torch.testing.assert_close(one[row], other[0], atol=1e-3, rtol=1e-4)


def test_states_behind_a_beginning_are_those_of_the_whole_prompt(tiny: LoadedModel, device: torch.device) -> None:
    import copy

    model, processor = tiny
    model = copy.deepcopy(model).to(device)
    turns = [[{"from": "human", "value": f"<image>\n{text}"}] for text in ("Is it red?", "Is it blue or green?", "Why")]
    images = [IMAGES[0], IMAGES[0], IMAGES[1]]
    prompts = [
        Prompt(tuple(processor.encode_prompt(each, [(1, 1)], "a prompt")), (image,))
        for each, image in zip(turns, images, strict=True)
    ]
    with torch.no_grad():
        pixels = processor.preprocess_images([image.open() for image in IMAGES])
        encoded = model.encode_images(pixels.to(device)).cpu()
        seen = {image.key: ImageFeatures(feature[None], (1, 1)) for image, feature in zip(IMAGES, encoded, strict=True)}
        lengths = shared_lengths(prompts, processor.image_token_id)
        assert lengths is not None
        begun = begin(tiny, prompts, lengths, seen)
        behind = model.model(
            input_ids=begun.input_ids[:, begun.computed :].to(device),
            attention_mask=begun.attention_mask.to(device),
            position_ids=begun.position_ids[:, begun.computed :].to(device),
            past_key_values=begun.cache,
        ).last_hidden_state[:, -1]
        for number, (each, image) in enumerate(zip(prompts, images, strict=True)):
            whole = model.model(
                input_ids=torch.tensor([each.ids], device=device),
                pixel_values=processor.preprocess_images([image.open()]).to(device),
            ).last_hidden_state[0, -1]
            torch.testing.assert_close(behind[number], whole, atol=2e-4, rtol=1e-3)


def test_a_sliding_window_is_not_shared(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny
    assert can_share(model)
    monkeypatch.setattr(model.config.text_config, "sliding_window", 64, raising=False)
    assert not can_share(model)
