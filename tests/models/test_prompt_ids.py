"""A question has the same token ids in training, chat, server, evaluation and transformers' pipeline, whatever the
template and the tokenizer, also after saving and loading. Training is the reference.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, PreTrainedTokenizerBase

from llava_npu import LlavaNpuConfig, LlavaNpuProcessor
from llava_npu.data.conversation.labels import encode_conversation, expand_images
from llava_npu.data.conversation.special_tokens import begins_with_bos
from llava_npu.inference.prompts import prepare_prompt
from llava_npu.models.composing import add_special_tokens
from llava_npu.models.loaded import load_processor
from llava_npu.serving.api.messages import ImagePart, Message, read_messages
from support import tiny

GOLDEN = Path(__file__).parent.parent / "golden"
PICTURE = Image.new("RGB", (40, 20), (200, 30, 30))
TURNS = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Is <image> like <image><image>or\n<image>"},
    {"from": "gpt", "value": "No."},
]
IMAGE_ALONE = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]


def _tokenizer(kind: str, folder: Path) -> PreTrainedTokenizerBase:
    if kind == "bytes":
        return tiny.tokenizer()
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "llama_tokenizer.model", folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "llama":
        config["add_bos_token"] = True  # type: ignore[assignment]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
        "' ' + m.content + '</s>' }}{% endfor %}"
    )
    return tokenizer


def _saved(kind: str, template: str, projector: str, folder: Path) -> tuple[LlavaNpuConfig, LlavaNpuProcessor]:
    tokenizer = _tokenizer(kind, folder / "tokenizer")
    image_token = add_special_tokens(tokenizer)
    config = LlavaNpuConfig(
        vision_config=tiny.clip_config(),
        text_config=tiny.text_config(len(tokenizer)),
        image_token_index=image_token,
        projector_type=projector,
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaNpuProcessor.for_config(config, pictures, tokenizer, template=template)
    config.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return config, processor


def _trained(turns: list[dict[str, str]], processor: LlavaNpuProcessor) -> list[int]:
    encoded = encode_conversation(turns, processor.tokenizer, processor.template)
    pictures = [processor.num_image_tokens] * sum(turn["value"].count("<image>") for turn in turns)
    return expand_images(encoded, pictures, processor.image_token_id).input_ids


def _messages(turns: list[dict[str, str]], image: dict[str, Any]) -> list[dict[str, Any]]:
    messages = []
    for turn in turns:
        content: list[dict[str, Any]] = []
        for number, text in enumerate(turn["value"].split("<image>")):
            content += [image] * (number > 0)
            content += [{"type": "text", "text": text}] if text else []
        messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": content})
    return messages


PLAIN, OWN = "mlp2x_gelu", "linear"  # saved for transformers' LlavaProcessor, and for ours


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "projector"),
    [("v1", PLAIN), ("v1", OWN), ("llama_2", PLAIN), ("mistral", PLAIN), ("chatml", PLAIN), ("v0", PLAIN),
     ("tokenizer", PLAIN), ("tokenizer", OWN)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["bytes", "llama"])
def test_every_door_asks_what_training_taught(kind: str, template: str, projector: str, tmp_path: Path) -> None:
    config, processor = _saved(kind, template, projector, tmp_path)
    folder = str(tmp_path / "model")
    loaded, auto = load_processor(folder, config), AutoProcessor.from_pretrained(folder)
    assert type(auto).__name__ == ("LlavaProcessor" if projector == PLAIN else "LlavaNpuProcessor")
    for turns in (TURNS[:2], TURNS, IMAGE_ALONE):
        asked = turns[:-1]
        pictures = [PICTURE] * sum(turn["value"].count("<image>") for turn in asked)
        ids = prepare_prompt(loaded, asked, pictures).input_ids  # chat, the server, the page, evaluation
        assert _trained(turns, processor)[: len(ids)] == ids
        served = read_messages([Message.model_validate(each) for each in _messages(asked, _URL)])
        assert prepare_prompt(loaded, served.turns, pictures).input_ids == ids
        messages = _messages(asked, {"type": "image", "image": PICTURE})
        for each in (loaded, auto):  # what `pipeline` calls
            inputs = each.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
            assert list(inputs["input_ids"][0]) == ids
        text = loaded.apply_chat_template(messages, add_generation_prompt=True)
        assert list(loaded(text=text, images=pictures)["input_ids"][0]) == ids
        assert loaded.encode_rendered_prompt(text, [(20, 40)] * len(pictures), "prompt") == ids


_URL = ImagePart.model_validate({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}).model_dump()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama without add_bos_token"])
def test_the_begin_of_sequence_token_outlives_saving(kind: str, tmp_path: Path) -> None:
    before = _tokenizer(kind, tmp_path / "tokenizer")
    before.save_pretrained(tmp_path / "lost")
    assert begins_with_bos(AutoTokenizer.from_pretrained(tmp_path / "lost")) == (kind == "llama")  # why it is settled
    config, processor = _saved(kind, "v1", PLAIN, tmp_path / "ours")
    after = load_processor(str(tmp_path / "ours" / "model"), config).tokenizer
    assert (
        processor.tokenizer("a").input_ids
        == after("a").input_ids
        == [1, *before("a", add_special_tokens=False).input_ids]
    )


@pytest.mark.slow
def test_the_processor_pads_and_cuts_as_it_is_told(tmp_path: Path) -> None:
    _, processor = _saved("llama", "v1", OWN, tmp_path)
    texts = ["<s> <image>\nWhat is it?", "Why?"]
    batch = processor(text=texts, images=[PICTURE], padding=True, padding_side="left", return_tensors="pt")
    alone = [processor(text=texts[0], images=PICTURE)["input_ids"][0], processor(text=texts[1])["input_ids"][0]]
    assert batch["input_ids"][0].tolist() == alone[0]
    assert batch["input_ids"][1].tolist()[-len(alone[1]) :] == alone[1]
    assert batch["attention_mask"].sum(-1).tolist() == [len(ids) for ids in alone]
    assert alone[0].count(1) == alone[1].count(1) == 1
    bare = processor(text="Why?", add_special_tokens=False)["input_ids"][0]
    assert [1, *bare] == alone[1]
    assert processor(text="Why?", truncation=True, max_length=2)["input_ids"][0] == alone[1][:2]
