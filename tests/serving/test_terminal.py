"""The chat: the same text as without streaming, a conversation that remembers, commands, errors that end nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_npu import UserError
from llava_npu.inference.detokenize import stopping_arguments
from llava_npu.inference.engine import InferenceEngine
from llava_npu.inference.request import Sampling
from llava_npu.models import compose
from llava_npu.models.loaded import LoadedModel
from llava_npu.serving.terminal import Conversation, chat_loop
from support import tiny

PICTURE = Image.new("RGB", (30, 20), (200, 0, 0))
EIGHT = Sampling(max_new_tokens=8)


def answer_once(
    loaded: LoadedModel, prompt: str, pictures: list[Image.Image], sampling: Sampling = EIGHT
) -> Iterator[str]:
    conversation = Conversation(InferenceEngine(loaded, max_batch=1), sampling)
    for picture in pictures:
        conversation.attach(picture)
    return conversation.ask(prompt)


def _generated(loaded: LoadedModel, turns: list[dict[str, str]], pictures: list[Image.Image]) -> str:
    model, processor = loaded
    inputs = processor.encode_prompts([turns], [pictures])
    ids = model.generate(
        **inputs,
        max_new_tokens=8,
        do_sample=False,
        **stopping_arguments(model, processor.tokenizer, processor.template),
    )[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


@pytest.mark.parametrize("pictures", [[], [PICTURE], [PICTURE, PICTURE]])
def test_the_stream_is_the_answer(loaded: LoadedModel, pictures: list[Image.Image]) -> None:
    prompt = "<image>\n" * len(pictures) + "What is it?"
    streamed = list(answer_once(loaded, "What is it?", pictures, EIGHT))
    assert "".join(streamed) == _generated(loaded, [{"from": "human", "value": prompt}], pictures)
    assert list(answer_once(loaded, prompt, pictures, EIGHT)) == streamed


def test_counts_are_checked(loaded: LoadedModel) -> None:
    with pytest.raises(UserError, match="has 1 <image>, but 2 images"):
        list(answer_once(loaded, "<image> What?", [PICTURE, PICTURE]))


def test_an_error_while_generating_reaches_the_caller(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(loaded[0].model, "forward", fail)
    with pytest.raises(MemoryError, match="no memory"):
        list(answer_once(loaded, "What?", []))


def _talk(loaded: LoadedModel, *lines: str, sampling: Sampling = EIGHT) -> tuple[str, Conversation]:
    conversation = Conversation(InferenceEngine(loaded, max_batch=1), sampling)
    waiting: Iterator[str] = iter(lines)
    shown: list[str] = []

    def read() -> str:
        for line in waiting:
            return line
        raise EOFError

    chat_loop(conversation, read, shown.append, lambda path: shown.append(f"[{Path(path).name}]"))
    return "".join(shown), conversation


def test_the_conversation_is_the_prompt(loaded: LoadedModel, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a red.png")
    shown, conversation = _talk(loaded, f"/image '{tmp_path}/a red.png'", "What is it?", "Why?", "/history")
    first = [{"from": "human", "value": "<image>\nWhat is it?"}]
    answer = _generated(loaded, first, [PICTURE])
    second = [*first, {"from": "gpt", "value": answer}, {"from": "human", "value": "Why?"}]
    assert conversation.turns == [*second, {"from": "gpt", "value": _generated(loaded, second, [PICTURE])}]
    assert shown.startswith(f"[a red.png]{answer}\n")
    assert "> Why?" in shown


def test_commands(loaded: LoadedModel, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "red.png")
    alone = _talk(loaded, "Why?")[0]
    cleared, conversation = _talk(loaded, f"/image {tmp_path}/red.png", "What is it?", "/clear", "Why?")
    assert cleared.endswith(f"new conversation\n{alone}")
    assert len(conversation.turns) == 2
    again, conversation = _talk(loaded, f"/image {tmp_path}/red.png", "What is it?", "Why?", "/again", "/again")
    assert len(conversation.turns) == 4
    lines = again.split("\n")
    assert lines[-2:] != lines[:2]
    other = _talk(loaded, "/system You are a parrot.", "Why?")[0]
    assert other != f"system prompt changed\n{alone}"
    back = _talk(loaded, "/system You are a parrot.", "/system", "Why?")[0]
    assert back.endswith(alone)
    _, conversation = _talk(loaded, "/set temperature 0.7", "/set top_k 5", "Why?", "/quit", "not read")
    assert (conversation.sampling.temperature, conversation.sampling.top_k) == (0.7, 5)
    assert len(conversation.turns) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image", "needs a file"),
        ("/image absent.png", "image absent.png: cannot be read"),
        ("/imgae a.png", "/imgae is not a command. Did you mean '/image'?"),
        ("/set temperature warm", "a number is expected"),
        ("/set temperature -1", "temperature is -1.0"),
        ("/set heat 1", "/set heat: allowed are max_new_tokens"),
        ("/again", "nothing has been asked yet"),
        ("<image> What?", "has 1 <image>, but 0 images"),
        ("What? " * 600, "prompt and answer together may have 512"),
        ("say <|im_end|>", "reads as markup"),
    ],
)
def test_what_is_wrong_is_said_and_the_chat_goes_on(loaded: LoadedModel, line: str, message: str) -> None:
    shown, conversation = _talk(loaded, line, "Why?")
    assert shown.startswith("error: ")
    assert message in shown
    assert len(conversation.turns) == 2


def test_what_cannot_be_answered_again_stays(loaded: LoadedModel, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "red.png")
    lines = (f"/image {tmp_path}/red.png", "What is it?", f"/image {tmp_path}/red.png", "/system <image>", "/again")
    shown, conversation = _talk(loaded, *lines)
    assert "the system prompt contains '<image>'" in shown
    assert len(conversation.turns) == 2
    conversation.use_system(None)
    assert list(conversation.again())
    list(conversation.ask("And this?"))
    assert conversation.turns[-2]["value"] == "<image>\nAnd this?"


def test_a_stopped_answer_stays_as_far_as_it_came(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(InferenceEngine(loaded, max_batch=1), Sampling(max_new_tokens=40))
    shown: list[str] = []

    def write(text: str) -> None:
        shown.append(text)
        if len("".join(shown)) > 3 and "[stopped]" not in text and text != "\n":
            raise KeyboardInterrupt

    lines = iter(["Why?"])
    chat_loop(conversation, lambda: next(lines, None) or _end(), write, shown.append)
    assert "[stopped]" in "".join(shown)
    assert conversation.turns[-1]["value"] == "".join(shown).removesuffix("\n").removesuffix(" [stopped]")


def _end() -> str:
    raise EOFError


@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation_is_refused_with_a_reason_where_it_cannot_be(bits: int) -> None:
    from llava_npu.devices import of_kind
    from llava_npu.models.loading import quantization_config

    with pytest.raises(UserError, match=rf"{bits} bits on npu: .*This device can: 16\."):
        quantization_config(bits, of_kind("npu"), torch.float16)


def test_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quantize` is not installed")
    from llava_npu.cli.options import load_model

    words = tiny.write_language_model(tmp_path / "lm", hidden_size=64, intermediate_size=128)
    model, processor = compose(str(tiny.write_clip(tmp_path / "clip")), str(words))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded, _ = load_model(str(tmp_path / "model"), "cpu", "float32", 4)
    kinds: dict[str, Any] = {name: type(module).__name__ for name, module in loaded.model.named_modules()}
    assert kinds["model.language_model.layers.0.mlp.up_proj"] == "Linear4bit"
    assert kinds["model.multi_modal_projector.linear_1"] == "Linear"
    assert {kinds[name] for name in kinds if "vision_tower" in name and name.endswith("fc1")} == {"Linear"}
    assert list(answer_once(loaded, "What is it?", [PICTURE], EIGHT))
