"""A model's answers: batches, feature cache, ablations, likelihood; against one-at-a-time computation."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_npu
from llava_npu.data.conversation.labels import encode_conversation, expand_images
from llava_npu.data.image_sources import LoadedImage
from llava_npu.data.images import load_image
from llava_npu.data.records import load_records
from llava_npu.errors import UserError
from llava_npu.evaluation import benchmarks
from llava_npu.evaluation.ablations import with_images
from llava_npu.evaluation.answering import ChooseLikeliest, GenerateText, ModelAnswerer, build_answerer
from llava_npu.evaluation.caption_loss import caption_loss
from llava_npu.evaluation.fingerprints import fingerprint_model
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.run import EvaluationOptions, evaluate
from llava_npu.inference import engine, features
from llava_npu.inference.features import FeatureCache
from llava_npu.models.loaded import LoadedModel
from support.evaluation_samples import circular_rows, plain_image, question_row, write_tsv


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    rows = circular_rows(groups=3, options=3)
    for row in rows:
        if row["index"] == 2:
            row["hint"] = "a hint of some length, so that prompts differ in length"
    return list(benchmarks.get("mmbench").read(write_tsv(tmp_path / "bench.tsv", rows)).questions)


@contextmanager
def counted_images(model: Any) -> Iterator[list[int]]:
    """How many images each run of the vision tower gets."""
    counts: list[int] = []
    tower = model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[0]))
    try:
        yield counts
    finally:
        handle.remove()


def test_a_batch_answers_as_one_at_a_time_from_pixels_does(tiny: LoadedModel, questions: list[Question]) -> None:
    model, processor = tiny
    mixed = [*questions, replace(questions[0], id="blind", images=())]
    together = ModelAnswerer(tiny, GenerateText(6)).answer(mixed)
    for question, answer in zip(mixed, together, strict=True):
        # Reference: the whole path from pixels, one question at a time, as the original evaluation loop does.
        turns = [{"from": "human", "value": answer.prompt}]
        inputs = processor.encode_prompts([turns], [[image.open() for image in question.images]])
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.text == text.strip()
        assert answer.error is None
    assert len({answer.text for answer in together}) > 1


def test_prompt_has_one_mark_per_image_and_none_without(tiny: LoadedModel, questions: list[Question]) -> None:
    answerer = ModelAnswerer(tiny, GenerateText(1))
    assert answerer.answer(questions[:1])[0].prompt == f"<image>\n{questions[0].prompt}"
    blind, _ = with_images(questions[:1], "none")
    assert answerer.answer(blind)[0].prompt == questions[0].prompt


@pytest.mark.parametrize("mode", ["generate", "likelihood"])
def test_each_image_is_encoded_once(tiny: LoadedModel, questions: list[Question], mode: str) -> None:
    answerer = build_answerer(mode, tiny, max_new_tokens=1)
    with counted_images(tiny[0]) as counts:
        answerer.answer(questions[:4])
        answerer.answer(questions[4:])
    assert sum(counts) == 3  # of 9 questions and 27 options


def test_feature_cache_forgets_the_oldest(tiny: LoadedModel) -> None:
    images = [LoadedImage(str(shade), plain_image((shade, shade, shade))) for shade in (0, 80, 160, 240)]
    cache = FeatureCache(tiny, max_images=2)
    with counted_images(tiny[0]) as counts:
        found, _ = cache.load(images)  # more than it can keep, but all are given
        assert len(found) == 4
        cache.load(images[2:])
        cache.load(images[:1])
        cache.load(images[2:3])
    assert counts == [4, 1, 1]
    torch.testing.assert_close(found["80"].tensor, cache.load(images[1:2])[0]["80"].tensor)


def test_a_host_encodes_large_images_one_by_one(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [LoadedImage(str(shade), plain_image((shade, shade, shade))) for shade in (0, 80, 160)]
    together, _ = FeatureCache(tiny).load(images)
    monkeypatch.setattr(features, "_PIXELS_AT_ONCE_ON_HOST", 2 * 32 * 32)
    with counted_images(tiny[0]) as counts:
        apart, _ = FeatureCache(tiny).load(images)
    assert counts == [2, 1]
    for key, found in apart.items():
        torch.testing.assert_close(found.tensor, together[key].tensor)


def test_likelihood_is_that_of_the_training_loss(tiny: LoadedModel, questions: list[Question]) -> None:
    model, processor = tiny
    answers = ModelAnswerer(tiny, ChooseLikeliest("text")).answer(questions)
    for question, answer in zip(questions, answers, strict=True):
        assert answer.scores is not None
        for letter, text in question.options.items():
            # Reference: transformers' own loss, from pixels, one option at a time.
            turns = [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": text}]
            encoded = encode_conversation(turns, processor.tokenizer, processor.template)
            expanded = expand_images(encoded, [processor.num_image_tokens], processor.image_token_id)
            with torch.no_grad():
                loss = model(
                    input_ids=torch.tensor([expanded.input_ids]),
                    attention_mask=torch.ones(1, len(expanded.input_ids), dtype=torch.long),
                    pixel_values=processor.preprocess_images([question.images[0].open()]),
                    labels=torch.tensor([expanded.labels]),
                ).loss
            assert answer.scores[letter] == pytest.approx(-loss.item(), abs=2e-4)
        assert answer.text == max(answer.scores, key=answer.scores.__getitem__)


def test_likelihood_of_texts_does_not_depend_on_the_order_of_options(
    tiny: LoadedModel, questions: list[Question]
) -> None:
    answers = ModelAnswerer(tiny, ChooseLikeliest("text")).answer(questions)
    chosen = {
        (question.group, question.options[answer.text]) for question, answer in zip(questions, answers, strict=True)
        if not question.text.startswith("a hint")
    }  # fmt: skip
    assert len({group for group, _ in chosen}) == len(chosen) == 3


def test_rotations_share_the_scores_of_their_options(tiny: LoadedModel, questions: list[Question]) -> None:
    model = tiny.model
    tokens: list[int] = []
    language_model = model.model.language_model
    handle = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        ModelAnswerer(tiny, ChooseLikeliest("text")).answer(
            [question for question in questions if question.group == "1"]
        )
    finally:
        handle.remove()
    # Of 3 rotations with 3 options each: the question and an option once, then the two other options.
    whole, rest = tokens
    longest = max(len(tiny.processor.tokenizer.tokenize(option)) for option in questions[0].options.values())
    assert rest <= 2 * (longest + 2) < whole


def test_likelihood_of_letters_sees_the_options(tiny: LoadedModel, questions: list[Question]) -> None:
    (answer,) = ModelAnswerer(tiny, ChooseLikeliest("letter")).answer(questions[:1])
    assert answer.prompt == f"<image>\n{questions[0].prompt}"
    assert answer.scores is not None
    assert set(answer.scores) == {"A", "B", "C"}


def test_wrong_image_changes_the_likelihood(tiny: LoadedModel, questions: list[Question]) -> None:
    answerer = ModelAnswerer(tiny, ChooseLikeliest("text"))
    shuffled, _ = with_images(questions, "shuffled")
    for right, wrong in zip(answerer.answer(questions), answerer.answer(shuffled), strict=True):
        assert right.scores != pytest.approx(wrong.scores, abs=1e-4)


def test_unreadable_image_spares_the_rest_of_the_batch(tiny: LoadedModel, tmp_path: Path) -> None:
    damaged = base64.b64encode(b"no image, but long enough to be taken for one, is it not").decode()
    rows = [question_row(1, ["a", "b"], 0), question_row(2, ["a", "b"], 0, image=damaged)]
    path = write_tsv(tmp_path / "bench.tsv", rows)
    good, bad = ModelAnswerer(tiny, GenerateText(2)).answer(benchmarks.get("mmbench").read(path).questions)
    assert good.error is None
    assert bad.error is not None
    assert "row 2, column 'image'" in bad.error


def test_a_prompt_longer_than_the_models_context_is_an_error_of_that_question(
    tiny: LoadedModel, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tiny[0].config.get_text_config()
    long = replace(questions[0], id="long", prompt="word " * text.max_position_embeddings)
    first, second = ModelAnswerer(tiny, GenerateText(2)).answer([long, questions[1]])
    assert f"the model has positions for {text.max_position_embeddings}" in (first.error or "")
    assert second.error is None
    assert second.text


@pytest.mark.parametrize("method", [GenerateText(2), ChooseLikeliest("text"), ChooseLikeliest("letter")])
def test_text_that_spells_a_special_token_costs_only_its_question(
    tiny: LoadedModel, questions: list[Question], method: Any
) -> None:
    bad = replace(questions[0], id="bad", prompt="What does </s> mean?")
    option = replace(questions[0], id="option", options={"A": "blue", "B": "</s>"})
    answers = ModelAnswerer(tiny, method).answer([bad, option, *questions[1:3]])
    assert "its text contains '</s>', which template 'v1'" in (answers[0].error or "")
    assert (answers[1].error is None) is (method != ChooseLikeliest("text"))  # the others' prompts do not show it
    alone = ModelAnswerer(tiny, method).answer(questions[1:3])
    assert [answer.text for answer in answers[2:]] == [answer.text for answer in alone]


@pytest.mark.parametrize("form", ["text", "letter"])
def test_a_model_of_captions_is_asked_for_the_likeliest(
    tiny: LoadedModel, questions: list[Question], form: str
) -> None:
    """Template `plain`, that of stage 1, has nothing but images in a prompt, and none without."""
    plain = tiny.with_template("plain")
    (found,) = ModelAnswerer(plain, ChooseLikeliest(form)).answer(questions[:1])
    assert found.error is None
    assert found.scores
    assert found.scores.keys() == questions[0].options.keys()


def test_a_batch_too_large_for_memory_is_one_clear_error(
    tiny: LoadedModel, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 9 GiB.\nDetails")

    answerer = ModelAnswerer(tiny, GenerateText(2), "a device")
    monkeypatch.setattr(tiny.model.model, "forward", fail)
    with pytest.raises(
        UserError, match=r"a batch of 2 questions does not fit .* a device: out .* smaller --batch-size"
    ):
        answerer.answer(questions[:2])


def test_stops_where_the_template_ends_an_answer(
    tiny: LoadedModel, questions: list[Question], monkeypatch: Any
) -> None:
    tokenizer = tiny.processor.tokenizer
    words = tokenizer("B<|im_end|>rubbish", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id

    def answer(template: str, tokens: list[int]) -> str:
        coming = iter(tokens)
        monkeypatch.setattr(engine, "choose_tokens", lambda *arguments: [next(coming)])
        (found,) = ModelAnswerer(tiny.with_template(template), GenerateText(len(words))).answer(questions[:1])
        return found.text

    assert answer("chatml", words) == "B"
    assert answer("v1", words) == "B<|im_end|>rubbish"
    assert answer("v1", [words[0], end, *words]) == "B"


def test_fingerprint_is_of_the_weights(tiny: LoadedModel) -> None:
    model, _ = tiny
    before = fingerprint_model(model)
    assert before == fingerprint_model(model)
    bias = model.model.multi_modal_projector.linear_1.bias
    with torch.no_grad():
        kept = bias[0].item()
        bias[0] = torch.nextafter(bias[0], torch.tensor(torch.inf))
        changed = fingerprint_model(model)
        bias[0] = kept
    assert changed != before
    assert fingerprint_model(model) == before


def test_settings_name_what_answers_depend_on(tiny: LoadedModel, monkeypatch: Any) -> None:
    processor = tiny.processor
    settings = ModelAnswerer(tiny, GenerateText(5)).settings
    assert (settings["answer"], settings["max_new_tokens"], settings["template"]) == ("generate", 5, "v1")
    assert settings["dtype"] == "float32"
    monkeypatch.setattr(processor, "image_aspect_ratio", "square")
    assert ModelAnswerer(tiny, GenerateText(5)).settings["processor"] != settings["processor"]


def test_answers_are_the_same_on_every_device(
    tiny: LoadedModel, questions: list[Question], device: torch.device
) -> None:
    model, processor = tiny
    moved = copy.deepcopy(model).to(device)
    for method in (GenerateText(4), ChooseLikeliest("text")):
        here = ModelAnswerer(tiny, method).answer(questions)
        there = ModelAnswerer(LoadedModel(moved, processor), method).answer(questions)
        assert [answer.text for answer in there] == [answer.text for answer in here]
        for one, other in zip(here, there, strict=True):
            assert (one.scores or {}) == pytest.approx(other.scores or {}, abs=1e-3)


def test_unknown_mode(tiny: LoadedModel) -> None:
    with pytest.raises(UserError, match="'likelyhood' is unknown"):
        build_answerer("likelyhood", tiny, max_new_tokens=1)


def test_open_question_cannot_be_chosen(tiny: LoadedModel) -> None:
    with pytest.raises(UserError, match="question 7 has no options"):
        ModelAnswerer(tiny, ChooseLikeliest("text")).answer([Question("7", "Why?", "Why?")])


def test_evaluation_from_python(tiny: LoadedModel, tmp_path: Path) -> None:
    """As docs/evaluation.md shows it."""
    data = write_tsv(tmp_path / "bench.tsv", [{**row, "split": "dev"} for row in circular_rows(groups=1)])
    answerer = llava_npu.build_answerer("generate", tiny, max_new_tokens=2)
    report = llava_npu.evaluate("mmbench", data, answerer, tmp_path / "out")
    assert 0 <= report.overall("circular", "vlmevalkit", split="dev").value <= 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["generate", "likelihood", "likelihood-letter"])
def test_whole_evaluation(tiny: LoadedModel, tmp_path: Path, mode: str) -> None:
    path = write_tsv(tmp_path / "bench.tsv", circular_rows(groups=3))
    reports = [
        evaluate(
            "mmbench",
            path,
            build_answerer(mode, tiny, max_new_tokens=4),
            tmp_path / str(size),
            EvaluationOptions(batch_size=size),
        )
        for size in (1, 5)
    ]
    assert reports[0].scores == reports[1].scores
    assert reports[0].overall("circular").count == 3
    again = evaluate("mmbench", path, build_answerer(mode, tiny, max_new_tokens=4), tmp_path / "1")
    assert again.scores == reports[0].scores  # nothing left to do, and recognised as the same model


# --- caption loss -----------------------------------------------------------------------------------------------------


@pytest.fixture
def captions(tmp_path: Path) -> list[Any]:
    records = []
    for number in range(5):
        plain_image((50 * number, 255 - 50 * number, 90)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"A thing of {number}s."}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "captions.json").write_text(json.dumps(records))
    return load_records(tmp_path / "captions.json")


def test_caption_loss_is_the_mean_over_tokens(tiny: LoadedModel, captions: list[Any]) -> None:
    model, processor = tiny
    total, count = 0.0, 0
    for record in captions:  # reference: transformers' own loss, one record at a time from pixels
        encoded = encode_conversation(record.conversations, processor.tokenizer, processor.template)
        expanded = expand_images(encoded, [processor.num_image_tokens], processor.image_token_id)
        supervised = sum(label != -100 for label in expanded.labels)
        with torch.no_grad():
            loss = model(
                input_ids=torch.tensor([expanded.input_ids]),
                pixel_values=processor.preprocess_images([load_image(record.image_paths[0])]),
                labels=torch.tensor([expanded.labels]),
            ).loss.item()
        total, count = total + loss * supervised, count + supervised
    measured = caption_loss(tiny, captions, batch_size=2)
    assert measured.num_tokens == count
    assert measured.num_records == 5
    assert measured.value == pytest.approx(total / count, abs=1e-4)
    assert measured.low <= measured.value <= measured.high


def test_caption_loss_with_a_wrong_image_or_none(tiny: LoadedModel, captions: list[Any]) -> None:
    given, shuffled, none = (caption_loss(tiny, captions, images) for images in ("given", "shuffled", "none"))
    assert len({given.value, shuffled.value, none.value}) == 3
    assert given.num_tokens == shuffled.num_tokens == none.num_tokens
    same_concept = caption_loss(tiny, captions, "shuffled", concepts=["a", "a", "b", "b", "b"])
    assert same_concept.num_tokens == given.num_tokens


def test_caption_loss_errors(tiny: LoadedModel, captions: list[Any]) -> None:
    captions[3].image_paths[0].write_bytes(b"torn")
    with pytest.raises(UserError, match=r"captions.json:record 3"):
        caption_loss(tiny, captions)
    with pytest.raises(UserError, match="'wrong' is unknown"):
        caption_loss(tiny, captions, "wrong")
    with pytest.raises(UserError, match="no records"):
        caption_loss(tiny, [])
    with pytest.raises(UserError, match="at least two"):
        caption_loss(tiny, captions[:1], "shuffled")
