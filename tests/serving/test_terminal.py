"""Streaming an answer: the same text as without streaming, and errors that reach the caller."""

from __future__ import annotations

import pytest
from PIL import Image

import tiny
from llava_npu import LlavaNpuForConditionalGeneration, LlavaNpuProcessor, UserError
from llava_npu.models import compose
from llava_npu.serving.terminal import stream_answer

PICTURE = Image.new("RGB", (30, 20), (200, 0, 0))
Loaded = tuple[LlavaNpuForConditionalGeneration, LlavaNpuProcessor]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("parts")
    model, processor = compose(str(tiny.write_clip(folder / "clip")), str(tiny.write_language_model(folder / "lm")))
    return model.eval(), processor


@pytest.mark.parametrize("pictures", [[], [PICTURE], [PICTURE, PICTURE]])
def test_the_stream_is_the_answer(loaded: Loaded, pictures: list[Image.Image]) -> None:
    model, processor = loaded
    prompt = "<image>\n" * len(pictures) + "What is it?"
    inputs = processor.encode_prompts([[{"from": "human", "value": prompt}]], [pictures])
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    streamed = list(stream_answer(model, processor, "What is it?", pictures, max_new_tokens=8))
    assert "".join(streamed) == processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert list(stream_answer(model, processor, prompt, pictures, max_new_tokens=8)) == streamed


def test_counts_are_checked(loaded: Loaded) -> None:
    with pytest.raises(UserError, match="has 1 <image>, but 2 images"):
        list(stream_answer(*loaded, "<image> What?", [PICTURE, PICTURE]))


def test_an_error_while_generating_reaches_the_caller(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**arguments: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(loaded[0], "generate", fail)
    with pytest.raises(MemoryError, match="no memory"):
        list(stream_answer(*loaded, "What?", []))
