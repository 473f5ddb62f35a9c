"""What sequences begin with alike is computed once, in bounded memory, and no answer changes by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

from llava_npu.inference.detokenize import stopping_arguments
from llava_npu.inference.engine import InferenceEngine, offline_engine
from llava_npu.inference.prefix_cache import prefix_keys
from llava_npu.inference.prompts import prepare_prompt
from llava_npu.inference.request import ImageInput, Prompt, Request, Sampling
from llava_npu.inference.runner import Prefill
from llava_npu.models import compose, load
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from support import tiny

LONG = "Look at it very closely, and then say in a few words what you see. " * 2


@dataclass
class Work:
    """What the model was made to compute."""

    tower: list[int] = field(default_factory=list)  # images of each pass
    language: list[int] = field(default_factory=list)  # tokens of each pass


@contextmanager
def counted(model: LlavaNpuForConditionalGeneration) -> Iterator[Work]:
    work = Work()
    handles = [
        model.model.vision_tower.register_forward_pre_hook(lambda module, args: work.tower.append(len(args[0]))),
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: work.language.append(kwargs["inputs_embeds"].shape[:2].numel()),
            with_kwargs=True,
        ),
    ]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


def ask(engine: InferenceEngine, turns: list[str], images: list[Image.Image]) -> Prompt:
    """A prompt of questions and answers in alternation; the images are the first question's."""
    values = ["<image>\n" * len(images) + turns[0], *turns[1:]]
    roles = ("human", "gpt")
    return prepare_prompt(
        engine.processor,
        [{"from": roles[place % 2], "value": value} for place, value in enumerate(values)],
        images,
    )


def answer(engine: InferenceEngine, prompt: Prompt, tokens: int = 6) -> str:
    return engine.run([Request(prompt, Sampling(tokens))])[0]


def without_sharing(loaded: LoadedModel) -> InferenceEngine:
    return InferenceEngine(loaded, max_batch=1, prefix_tokens=0)


def test_turns_of_a_conversation_compute_their_image_once(loaded: LoadedModel, pictures: list[Image.Image]) -> None:
    engine = InferenceEngine(loaded, max_batch=2)
    with counted(loaded.model) as work:
        turns = [LONG]
        for question in ("And now?", "Why?"):
            turns += [answer(engine, ask(engine, turns, pictures[:1])), question]
        last = ask(engine, turns, pictures[:1])
        final = answer(engine, last)
    assert work.tower == [1]
    prefills = [tokens for tokens in work.language if tokens > 1]
    assert sum(prefills) <= len(last.input_ids) + 3  # every token once, but for the answers' ends
    assert final == answer(without_sharing(loaded), last)


def test_users_who_ask_about_one_image_compute_it_once(loaded: LoadedModel, pictures: list[Image.Image]) -> None:
    engine = InferenceEngine(loaded, max_batch=4)
    prompts = [ask(engine, [f"{LONG} {word}?"], pictures[:1]) for word in ("Red", "Blue", "A cat", "Why", "Where")]
    with counted(loaded.model) as work:
        texts = engine.run([Request(prompt, Sampling(6)) for prompt in prompts])
    assert work.tower == [1]
    first = work.language[0]
    assert first == len(prompts[0].input_ids)
    assert sum(tokens for tokens in work.language[1:] if tokens > 4) < first
    assert texts == [answer(without_sharing(loaded), prompt) for prompt in prompts]


@pytest.mark.parametrize("before", ["", "a", "a b", "a b c", "a b c d"])
def test_questions_that_differ_right_behind_an_image_share_it(
    loaded: LoadedModel, pictures: list[Image.Image], before: str
) -> None:
    """Wherever the image ends."""
    engine = InferenceEngine(loaded, max_batch=4)
    one, other = [
        prepare_prompt(engine.processor, [{"from": "human", "value": f"{before} <image>{word}?"}], pictures[:1])
        for word in ("Red", "Why")
    ]
    answer(engine, one)
    assert engine.runner.num_cached(other) >= other.images[0].end
    assert answer(engine, other) == answer(without_sharing(loaded), other)


def test_another_image_is_not_taken_for_the_same(loaded: LoadedModel, pictures: list[Image.Image]) -> None:
    engine = InferenceEngine(loaded, max_batch=4)
    prompts = [ask(engine, [LONG], [picture]) for picture in pictures]
    texts = engine.run([Request(prompt, Sampling(6)) for prompt in prompts])
    assert texts == [answer(without_sharing(loaded), prompt) for prompt in prompts]
    assert len(set(texts)) > 1


def test_memory_is_bounded_and_what_was_used_longest_ago_goes(loaded: LoadedModel, pictures: list[Image.Image]) -> None:
    room = 160
    engine = InferenceEngine(loaded, max_batch=2, prefix_tokens=room)
    prompts = [ask(engine, [LONG], [picture]) for picture in pictures[:3]]
    assert room / 2 < len(prompts[0].input_ids) < room
    expected = [answer(without_sharing(loaded), prompt) for prompt in prompts]
    cached = engine.runner.num_cached
    for _ in range(2):
        assert [answer(engine, prompt) for prompt in prompts] == expected
        assert cached(prompts[2]) > len(prompts[2].input_ids) / 2
        assert cached(prompts[0]) == 0
    assert len(engine.runner._prefixes._slots) <= room


def test_rows_that_grow_keep_what_they_hold(loaded: LoadedModel, pictures: list[Image.Image]) -> None:
    engine = offline_engine(loaded, 3)
    prompts = [ask(engine, ["What is it? " * length], pictures[:1]) for length in (1, 20, 40)]
    lengths = [60, 30, 20]
    requests = [Request(prompt, Sampling(length)) for prompt, length in zip(prompts, lengths, strict=True)]
    texts = engine.run(requests)
    whole = InferenceEngine(loaded, max_batch=1)
    assert texts == [answer(whole, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    assert engine.runner.cache.store.shape[4] < engine.max_length


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_layers_with_a_sliding_window_see_the_latest_tokens(
    tmp_path: Path, pictures: list[Image.Image], kind: str
) -> None:
    """All layers of Mistral, every other layer of Gemma 3; longer answers than the window, beside `generate`."""
    words = tiny.tokenizer()
    changes = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]} if kind != "mistral" else {}
    text = (
        tiny.text_config(
            len(words), initializer_range=0.3 if kind == "mistral" else 0.8, tie_word_embeddings=False
        ).to_dict()
        | changes
    )
    text |= {"sliding_window": 12, "model_type": kind}
    for name in ("rope_parameters", "rope_scaling", "architectures"):
        text.pop(name, None)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**text)).save_pretrained(tmp_path / "lm")
    words.save_pretrained(tmp_path / "lm")
    loaded = compose(str(tiny.write_clip(tmp_path / "clip")), str(tmp_path / "lm"))
    loaded.model.eval()
    engine = InferenceEngine(loaded, max_batch=3)
    prompts = [ask(engine, [f"{LONG} {word}?"], pictures[:1]) for word in ("Red", "Blue", "What is it")]
    texts = engine.run([Request(prompt, Sampling(16)) for prompt in prompts])
    for prompt, text in zip(prompts, texts, strict=True):
        output = loaded.model.generate(
            input_ids=torch.tensor([prompt.input_ids]),
            pixel_values=prompt.images[0].pixel_values,
            max_new_tokens=16,
            do_sample=False,
            **stopping_arguments(loaded.model, words, loaded.processor.template),
        )
        new = output[0, len(prompt.input_ids) :]
        assert text == words.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    assert all(len(set(text)) > 4 for text in texts)


def test_states_behind_a_cached_prefix_are_those_of_the_whole_prompt(
    model_folder: object, pictures: list[Image.Image], device: torch.device
) -> None:
    loaded = load(str(model_folder), device)
    engine = InferenceEngine(loaded, max_batch=3)
    prompts = [ask(engine, [f"{LONG} {word}"], pictures[:1]) for word in ("Is it red?", "Is it blue or green?", "Why")]
    with torch.no_grad():
        found = engine.runner.prefill([Prefill(row, prompt, 2) for row, prompt in enumerate(prompts)])
        assert engine.runner.num_cached(prompts[1]) > len(prompts[1].input_ids) / 2
        for prompt, states in zip(prompts, found, strict=True):
            whole = loaded.model.model(
                input_ids=torch.tensor([prompt.input_ids], device=device),
                pixel_values=prompt.images[0].pixel_values.to(device),
            ).last_hidden_state[0, -2:]
            torch.testing.assert_close(states, whole, atol=2e-4, rtol=1e-3)


sequences = st.lists(st.integers(0, 1), min_size=0, max_size=12)


@given(sequences, sequences, st.sampled_from(["a", "b"]), st.sampled_from(["a", "b"]), st.integers(0, 9))
def test_keys_agree_as_far_as_tokens_and_images_do(
    one: list[int], other: list[int], first: str, second: str, start: int
) -> None:
    common = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if first != second:
        common = min(common, start)
    keys = [prefix_keys(tokens, [ImageInput(key, (8, 8), start, 4)]) for tokens, key in ((one, first), (other, second))]
    assert [len(each) for each in keys] == [len(one), len(other)]
    agree = [a == b for a, b in zip(*keys, strict=False)]
    assert agree == [number < common for number in range(len(agree))]


def test_outputs_are_computed_and_images_stay_whole() -> None:
    image = ImageInput("a", (8, 8), 10, 8)
    prefill = Prefill(0, Prompt(list(range(40)), (image,)), num_outputs=2)
    assert prefill.usable(40) == 38
    assert prefill.usable(24) == 24
    assert prefill.usable(16) == 10  # in the image: from its beginning
    assert prefill.usable(8) == 0  # too little to be worth it
