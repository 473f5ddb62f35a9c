"""Answers that share steps are those that `generate` gives to each alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_npu import LlavaNpuProcessor, UserError
from llava_npu.inference.detokenize import stopping_arguments
from llava_npu.inference.engine import InferenceEngine
from llava_npu.inference.prompts import prepare_prompt, with_images_first
from llava_npu.inference.request import Delta, Prompt, Request, Sampling
from llava_npu.models import compose, load
from llava_npu.models.loaded import LoadedModel
from support import tiny


@pytest.fixture
def on_device(model_folder: Path, device: torch.device) -> LoadedModel:
    return load(model_folder, device)


def _prompt(processor: LlavaNpuProcessor, question: str, pictures: list[Image.Image]) -> Prompt:
    turns = [{"from": "human", "value": with_images_first(question, len(pictures))}]
    return prepare_prompt(processor, turns, pictures)


def _reference(loaded: LoadedModel, prompt: Prompt, max_new_tokens: int) -> str:
    """transformers' generate on this prompt alone."""
    model, processor = loaded
    pixels = [image.pixel_values for image in prompt.images]
    images = {"pixel_values": torch.cat(pixels).to(model.device)} if pixels else {}
    output = model.generate(
        input_ids=torch.tensor([prompt.input_ids], device=model.device),
        attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.long, device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **images,
        **stopping_arguments(model, processor.tokenizer, processor.template),
    )
    new = output[0, len(prompt.input_ids) :]
    return processor.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def _run(engine: InferenceEngine, requests: list[Request], arrivals: list[int]) -> dict[Request, list[Delta]]:
    """Submits each request at its step."""
    deltas: dict[Request, list[Delta]] = {request: [] for request in requests}
    for step in range(10_000):
        for request, arrival in zip(requests, arrivals, strict=True):
            if arrival == step:
                engine.submit(request)
        for request, delta in engine.step():
            deltas[request].append(delta)
        if step >= max(arrivals) and not engine.num_running and not engine.num_waiting:
            return deltas
    raise AssertionError("the engine does not come to an end")


def _text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_answers_that_join_and_leave_are_those_of_generate(on_device: LoadedModel, pictures: list[Image.Image]) -> None:
    processor = on_device.processor
    chance = random.Random(0)
    prompts = [
        _prompt(processor, " ".join(["What is it?"] * chance.randint(1, 9)), pictures[: chance.randint(0, 3)])
        for _ in range(12)
    ]
    lengths = [chance.randint(1, 24) for _ in prompts]
    engine = InferenceEngine(on_device, max_batch=4)
    requests = [Request(p, Sampling(max_new_tokens=n)) for p, n in zip(prompts, lengths, strict=True)]
    deltas = _run(engine, requests, [chance.randint(0, 12) for _ in requests])
    for request, prompt, length in zip(requests, prompts, lengths, strict=True):
        assert _text(deltas[request]) == _reference(on_device, prompt, length)
        assert [delta.finish_reason for delta in deltas[request][:-1]] == [None] * (len(deltas[request]) - 1)
        last = deltas[request][-1]
        assert last.finish_reason == ("length" if last.num_tokens == length else "stop")


def test_answers_share_steps(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loaded
    calls = []
    forward = model.model.language_model.forward
    monkeypatch.setattr(
        model.model.language_model,
        "forward",
        lambda *a, **k: calls.append(k["inputs_embeds"].shape) or forward(*a, **k),
    )
    engine = InferenceEngine(loaded, max_batch=8)
    requests = [Request(_prompt(processor, f"What {n}?", []), Sampling(max_new_tokens=5)) for n in range(8)]
    _run(engine, requests, [0] * 8)
    assert len(calls) == 5  # the prompts in one packed pass, then four steps of all
    assert calls[0][0] == 1
    assert {shape[0] for shape in calls[1:]} <= set(range(1, 9))


def test_more_than_fit_wait(loaded: LoadedModel) -> None:
    engine = InferenceEngine(loaded, max_batch=2)
    requests = [Request(_prompt(loaded[1], "What?", []), Sampling(max_new_tokens=3)) for _ in range(5)]
    for request in requests:
        engine.submit(request)
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 3)


def test_cancelled_and_late_answers_leave_and_the_others_are_not_disturbed(loaded: LoadedModel) -> None:
    prompt = _prompt(loaded[1], "What is it?", [])
    engine = InferenceEngine(loaded, max_batch=3)
    first, second, third, waiting = (Request(prompt, Sampling(max_new_tokens=12)) for _ in range(4))
    for request in (first, second, third, waiting):
        engine.submit(request)
    engine.step(), engine.step()
    first.cancel(), waiting.cancel()
    second.deadline = 0.0
    ends = {request: delta.finish_reason for request, delta in engine.step() if delta.finish_reason}
    assert ends == {first: "cancelled", second: "timeout", waiting: "cancelled"}
    assert (engine.num_running, engine.num_waiting) == (1, 0)
    rest: list[Delta] = []
    while engine.num_running:
        rest += [delta for _, delta in engine.step()]
    assert rest[-1].num_tokens <= 12
    assert _text(list(engine.generate(prompt, Sampling(max_new_tokens=12)))).endswith(_text(rest))


def test_an_error_reaches_its_answers_and_the_engine_goes_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    engine = InferenceEngine(loaded, max_batch=2)
    prompt = _prompt(processor, "What is it?", [])
    expected = _text(list(engine.generate(prompt, Sampling(max_new_tokens=4))))

    def fail(*arguments: object, **more: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.model, "forward", fail)
        with pytest.raises(MemoryError, match="no memory"):
            list(engine.generate(prompt, Sampling(max_new_tokens=4)))
    assert engine.num_running == 0
    assert _text(list(engine.generate(prompt, Sampling(max_new_tokens=4)))) == expected


def test_a_closed_stream_frees_its_row(loaded: LoadedModel) -> None:
    engine = InferenceEngine(loaded, max_batch=2)
    stream: Iterator[Delta] = engine.generate(_prompt(loaded[1], "What?", []), Sampling(max_new_tokens=50))
    next(stream)
    assert engine.num_running == 1
    stream.close()  # type: ignore[attr-defined]
    assert engine.num_running == 0


def test_draws_repeat_with_their_seed_whatever_runs_beside(loaded: LoadedModel) -> None:
    prompt = _prompt(loaded[1], "What is it?", [])
    drawn = Sampling(max_new_tokens=12, temperature=1.5, top_p=0.95, top_k=50, seed=7)
    engine = InferenceEngine(loaded, max_batch=4)
    alone = _text(list(engine.generate(prompt, drawn)))
    requests = [Request(prompt, drawn), Request(prompt, Sampling(max_new_tokens=9)), Request(prompt, drawn)]
    deltas = _run(engine, requests, [2, 0, 3])
    assert _text(deltas[requests[0]]) == _text(deltas[requests[2]]) == alone
    assert alone != _text(list(engine.generate(prompt, Sampling(max_new_tokens=12))))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_values_out_of_range_are_named(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**values)


def test_a_prompt_without_room_for_its_answer_is_refused(loaded: LoadedModel) -> None:
    engine = InferenceEngine(loaded, max_batch=1, max_length=40)
    with pytest.raises(UserError, match="up to 64 are asked for, but prompt and answer together may have 40"):
        list(engine.generate(_prompt(loaded[1], "What?", []), Sampling(max_new_tokens=64)))
    with pytest.raises(UserError, match="max_length 100000: this model's language model reads 512"):
        InferenceEngine(loaded, max_length=100_000)


def test_a_decoded_token_copies_no_cache_on_an_npu(device: torch.device, tmp_path: Path) -> None:
    if device.type != "npu":
        pytest.skip("its operator takes contiguous tensors only")
    from torch_npu.simulation import count_copied_bytes

    words = tiny.write_language_model(tmp_path / "lm", hidden_size=128, max_position_embeddings=1024)
    model, processor = compose(str(tiny.write_clip(tmp_path / "clip")), str(words))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    engine = InferenceEngine(load(tmp_path / "model", device, torch.bfloat16), max_batch=2, max_length=1024)
    prompts = [_prompt(processor, "What is it? " * repeated, []) for repeated in (10, 20)]
    for prompt in prompts:
        engine.submit(Request(prompt, Sampling(max_new_tokens=20)))
    for _ in range(3):
        engine.step()
    with count_copied_bytes() as copied:
        engine.step()
    keys = min(len(prompt.input_ids) for prompt in prompts)
    assert copied[0] < keys * 2 * 32 * 2  # of one layer's keys, 2 heads of 32 in bfloat16: not even those are copied
