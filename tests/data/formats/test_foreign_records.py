"""Records of other projects: what is read otherwise than they mean it is an error that names the key, or is masked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from llava_npu.data.conversation.labels import IGNORE_INDEX, encode_conversation
from llava_npu.data.formats.parsing import Record, parse_record
from llava_npu.data.image_roots import ImageFolder
from llava_npu.data.records import fingerprint, load_records
from llava_npu.errors import UserError


def _parse(**record: Any) -> Record:
    return parse_record(record, 0, "data.json:record 0", ImageFolder(Path("images")))


def _messages(question: Any = "Why?", answer: Any = "Because.", **keys: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **keys}]


@pytest.mark.parametrize("key", ["loss", "weight", "train_on_turn", "calculate_loss", "mask"])
@pytest.mark.parametrize("template", ["v1", "llama_2", "mistral", "chatml"])
def test_an_excluded_answer_is_not_learned(key: str, template: str, llama: PreTrainedTokenizerBase) -> None:
    excludes = int(key == "mask")
    bad, good = _messages("One?", "BAD", **{key: excludes}), _messages("Two?", "GOOD", **{key: 1 - excludes})
    record = _parse(messages=[*bad, *good])
    masked = encode_conversation(record.conversations, llama, template, record=record)
    whole = encode_conversation(_parse(messages=[*_messages("One?", "BAD"), *good]).conversations, llama, template)
    assert masked.input_ids == whole.input_ids
    learned = [token for token in masked.labels if token != IGNORE_INDEX]
    assert "BAD" in llama.decode([token for token in whole.labels if token != IGNORE_INDEX])
    assert "BAD" not in llama.decode(learned)
    assert llama.decode(learned) in llama.decode(whole.input_ids)
    assert "GOOD" in llama.decode(learned)


@pytest.mark.parametrize("key", ["Loss", "noLoss", "isMasked", "loss "])
def test_how_a_key_is_written_does_not_matter(key: str) -> None:
    excludes = key in ("noLoss", "isMasked")
    record = _parse(messages=[*_messages("One?", "BAD", **{key: excludes}), *_messages()])
    assert [turn.supervised for turn in record.conversations if turn.role == "gpt"] == [False, True]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (_messages(loss_weight=0), r"messages\[1\]: 'loss_weight' is 0 .* 'loss': false"),
        (_messages(doTrain=False), r"messages\[1\]: 'doTrain' is False .* 'loss': false"),
        (_messages("Why?", [{"type": "text", "text": "BAD", "weight": 0}]), r"messages\[1\]: part 0: 'weight' is 0"),
        (_messages(loss=False), "every answer is excluded from the loss"),
        (_messages(weight=0.5), r"messages\[1\]: 'weight' is 0.5 \(float\); allowed are true and false"),
        (_messages(loss_scale="react"), r"messages\[1\]: 'loss_scale' .* 'loss': false"),
        (
            [{"role": "user", "content": "Why?", "loss": True}, *_messages()[1:]],
            r"messages\[0\]: 'loss' .* only answers",
        ),
        (
            _messages(tool_calls=[{"function": {"name": "f"}}]),
            r"messages\[1\]: 'tool_calls' .* tool calls are not learned",
        ),
        (_messages(reasoning_content="Hm."), r"messages\[1\]: 'reasoning_content' is 'Hm.'; it would not be learned"),
        ([{"role": "user", "content": "Why?", "images": ["a.png"]}, *_messages()[1:]], r"messages\[0\]: 'images'"),
        (_messages("<video>\nWhat happens?"), "contains '<video>', but only images are read"),
        (_messages("What is said?\n<audio>"), "contains '<audio>', but only images are read"),
        (_messages("Image 1: <img>a.png</img>\nWhat?"), "contains '<img>a.png</img>', another project's mark"),
        (_messages("<|image_1|>\nWhat?"), "another project's mark of an image"),
        (_messages("<image_placeholder>What?"), "another project's mark of an image"),
        *[
            (_messages(f"{mark}\nWhat?"), "another project's mark of an image")
            for mark in ("![a](a.png)", "[IMG]", "<IMG_CONTEXT>", "<image/>", "<Image>", "<__media__>")
        ],
        (_messages("<speech>\nWhat?"), "contains '<speech>', but only images are read"),
        (_messages("<|video_pad|>What?"), r"contains '<\|video_pad\|>', but only images are read"),
        *[
            (_messages(text), f"contains '{mark}.*', but only images are read")
            for mark, text in (
                ("<Video>", "<Video>\nWhat?"),
                ("<video_0>", "<video_0>What?"),
                ("<video>a.mp4</", "<video>a.mp4</video>What?"),
                ("[?] <audio>", "What? <audio>"),
                ("<AudioHere>", "<AudioHere>What?"),
                (r"<\|audio_1\|>", "<|audio_1|>What?"),
            )
        ],
        *[
            (_messages(f"{mark}What?"), "another project's mark")
            for mark in ("<image1>", "<pic>1.png</pic>", "<image >")
        ],
        (_messages(tools=["f"]), r"messages\[1\]: 'tools' .* tool calls are not learned"),
        (_messages(thinking_blocks=["Hm."]), r"messages\[1\]: 'thinking_blocks' .* it would not be learned"),
        (_messages(value="No."), r"messages\[1\] has both 'value' and 'content', which differ"),
        (_messages([{"type": "image", "image": "1.png", "text": "What?"}]), r"messages\[0\]: part 0 is .*allowed are"),
        (_messages(label=False), r"messages\[1\]: 'label' is False .* marked as bad would be learned as a good answer"),
        (_messages(**{"from": "human"}), r"messages\[1\] has both 'from' and 'role', which differ"),
        (_messages(thought="Hm."), r"messages\[1\]: 'thought' is 'Hm.'; it would not be learned"),
        (_messages([{"type": "text", "text": "What?", "image": "a.png"}]), r"messages\[0\]: part 0: 'image' is"),
    ],
)
def test_what_cannot_be_learned_is_refused(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.json:record 0 .*{message}"):
        _parse(messages=messages)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("video", "v.mp4"),
        ("videos", ["v.mp4"]),
        ("audios", ["a.wav"]),
        ("image_path", "a.png"),
        ("img", "a.png"),
        ("tools", "[]x"),
        ("rejected_response", "No."),
        ("label", False),
        ("is_correct", False),
        ("rejects", ["No."]),
        ("preference", 2),
        ("negative_messages", [[{"role": "user"}]]),
        ("objects", {"bbox": [[0, 0, 1, 1]]}),
        ("Video", "v.mp4"),
        ("videoPath", "v.mp4"),
        ("sound", "a.wav"),
        ("frames", ["a.png"]),
        ("media", ["a.png"]),
        ("image-path", "a.png"),
        ("_images", ["a.png"]),
        ("imagess", ["a.png"]),
        ("iamge", "a.png"),
        ("chosen", "Yes."),
        ("history", [["Who?", "I."]]),
        ("loss", False),
        ("weight", 0),
        ("sample_weight", 0.5),
        ("train", False),
        ("skip", True),
        ("tool_calls", ["images/0.png"]),
        ("reasoning_content", "Hm."),
        ("messages_rejected", [{"role": "user"}]),
        ("systemPrompt", "Be brief."),
        ("clip", "a.MP4"),
        ("left_image", "a.jpg"),
        ("screenshots", ["a.png", "b.png"]),
        ("jpg", {"bytes": b"x", "path": None}),
    ],
)
def test_keys_of_a_record_that_matter_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"'{key}' is "):
        _parse(messages=_messages(), **{key: value})


def test_what_does_not_matter_is_silent() -> None:
    _parse(
        messages=_messages(tool_calls=None, reasoning_content="", loss=True), videos=[], tools=None, source="web", x=1
    )
    _parse(messages=_messages(), imageid=7, imageWidth=640, imagine="yes", village="x", usage="x")
    _parse(messages=_messages(), id="a.jpg", source="a.html", shots=[], note="It is a.png\nor not")
    _parse(messages=_messages("<image>\nWhat?"), image="a.png", file_name="b.png")
    _parse(messages=_messages(), image_id=7, video_id="x", label="False", frames=[], weight=0.5, length=3)
    _parse(
        messages=_messages(), train=True, label=True, masked=False, skip=0, weight=1, training_source="x", trainer="y"
    )
    _parse(messages=_messages("How do I write ![this](a.png), [image] or <img> in a README?"))
    _parse(messages=_messages("<image>\nWhat?"), image="a.png", image_url="https://example.org/a.png")
    _parse(messages=_messages("How does HTML's <video> work?\n<video>\n</video>"))


def test_an_excluded_answer_of_a_pair() -> None:
    pairs = [{"user": "One?", "assistant": "BAD", "loss": False}, {"user": "Two?", "assistant": "GOOD", "source": "x"}]
    turns = _parse(texts=pairs).conversations
    assert [turn.text for turn in turns if turn.role == "gpt" and turn.supervised] == ["GOOD"]


def test_parts_of_a_message_are_lines() -> None:
    def text(*parts: str) -> str:
        content = [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in parts]
        record = _parse(messages=_messages(content), images=["a.png"] * parts.count("image"))
        return record.conversations[0].text

    assert text("Answer briefly.", "Why?") == "Answer briefly.\nWhy?"
    assert text("Answer briefly.", "image", "Why?") == "<image>\nAnswer briefly.\nWhy?"
    assert text("image", "image", "Which?") == "<image>\n<image>\nWhich?"
    assert text("Is ", "image", " newer than ", "image", "?", "Say yes or no.") == (
        "Is <image> newer than <image>?\nSay yes or no."
    )


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data.json").write_text(json.dumps([{"messages": _messages("<image>What?"), "image": "a.png"}]))
    (record,) = load_records("~/data.json", "~/images")
    assert record.image_paths == (tmp_path / "images" / "a.png",)
    assert fingerprint("~/data.json") == fingerprint(tmp_path / "data.json")
