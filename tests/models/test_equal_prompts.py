"""The same messages are the same prompt through every door; the cells of the table in docs/serving.md."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoProcessor

from llava_npu import LlavaNpuProcessor, UserError
from llava_npu.data.conversation.labels import encode_conversation, encode_prompt, expand_images
from llava_npu.data.conversation.turns import join_parts
from llava_npu.data.formats.parsing import parse_record
from llava_npu.data.image_roots import ImageFolder
from llava_npu.inference import batch
from llava_npu.inference.request import Delta, Prompt, Request, Sampling
from llava_npu.models.loaded import LoadedModel, load_processor
from llava_npu.serving.api.limits import Limits
from llava_npu.serving.api.messages import Message, read_messages
from llava_npu.serving.api.service import Service
from llava_npu.serving.terminal import Conversation
from llava_npu.serving.web.conversation import ChatHistory, ServedModel, UploadedImage, stream_answers
from models.test_prompt_ids import _saved
from support.message_forms import FORMS, NOT_SAID, REFUSED, Form, as_url, table

PICTURE = Image.new("RGB", (40, 20), (200, 30, 30))
URL = as_url(PICTURE)
TEMPLATES = [("llama", "v1"), ("llama", "llama_2"), ("bytes", "chatml"), ("bytes", "tokenizer")]


@pytest.fixture(scope="module", params=TEMPLATES, ids="-".join)
def processors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model's processor as we load it, and as transformers does."""
    folder = tmp_path_factory.mktemp("model")
    config, _ = _saved(*request.param, "mlp2x_gelu", folder)
    path = str(folder / "model")
    return load_processor(path, config), AutoProcessor.from_pretrained(path)


class _Engine:
    """Keeps the prompts that it is given, and answers "A cat."."""

    max_length, max_batch = 4096, 1

    def __init__(self, processor: LlavaNpuProcessor):
        self.processor = processor
        self.prompts: list[Prompt] = []

    def check(self, prompt: Prompt, sampling: Sampling) -> None:
        self.prompts.append(prompt)

    def generate(self, prompt: Prompt, sampling: Sampling) -> Any:
        yield Delta("A cat.", 1, "stop")

    def submit(self, request: Request, tell: Callable[[Delta], None] | None = None) -> None:
        if tell is None:
            self.prompts.append(request.prompt)
            self._request = request
        else:
            tell(Delta("A cat.", 1, "stop"))

    def step(self) -> list[tuple[Request, Delta]]:
        return [(self._request, Delta("A cat.", 1, "stop"))]


def _questions(form: Form) -> list[tuple[str, int]]:
    """What a user writes, and how many images they attach, for each question."""
    written = []
    for role, content in form.said:
        if role == "user":
            parts = [content] if isinstance(content, str) else list(content or [])
            texts = [part for part in parts if part is not None]
            joined = join_parts(parts)
            apart = "<image>" in joined and not joined.startswith("<image>")
            written.append((joined if apart else "\n".join(texts), parts.count(None)))
    return written


def _train(form: Form, processor: LlavaNpuProcessor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    messages = [*form.messages({"type": "image"}), {"role": "assistant", "content": "Yes."}]
    entry = {"messages": messages, "images": ["1.png"] * form.num_images}
    record = parse_record(entry, 0, "train.json", ImageFolder(Path(), False))
    encoded = encode_conversation(record.conversations, processor.tokenizer, processor.template)
    widths = [processor.num_image_tokens] * form.num_images
    ids = expand_images(encoded, widths, processor.image_token_id).input_ids
    answer = _reference(form, processor)
    return ids[: len(answer)]


def _chat(form: Form, processor: LlavaNpuProcessor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    engine: Any = _Engine(processor)
    system = next((content for role, content in form.said if role == "system"), None)
    conversation = Conversation(engine, Sampling(), system)  # type: ignore[arg-type]
    for text, images in _questions(form):
        for _ in range(images):
            conversation.attach(PICTURE)
        list(conversation.ask(text))
    return engine.prompts[-1].input_ids


def _serve(form: Form, processor: LlavaNpuProcessor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    service = Service(_Engine(processor), "tiny", Limits())  # type: ignore[arg-type]
    messages = form.messages({"type": "image_url", "image_url": {"url": URL}})
    asked = read_messages([Message.model_validate(each) for each in messages])
    return asyncio.run(service.prepare_conversation(asked)).input_ids


def _web(form: Form, processor: LlavaNpuProcessor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    engine: Any = _Engine(processor)

    async def talk() -> None:
        state = ChatHistory()
        for text, images in _questions(form):
            async for told in stream_answers(
                [ServedModel("tiny", engine, engine)], state, text, [UploadedImage("", PICTURE)] * images, Sampling()
            ):
                last = told
            state = last

    asyncio.run(talk())
    return engine.prompts[-1].input_ids


def _answer_all(form: Form, processor: LlavaNpuProcessor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    engine = _Engine(processor)
    monkeypatch.setattr(batch, "InferenceEngine", lambda *args, **kwargs: engine)
    ((text, images),) = _questions(form)
    batch.answer_all(LoadedModel(None, processor), [text], [[PICTURE] * images])  # type: ignore[arg-type]
    return engine.prompts[-1].input_ids


def _transformers(form: Form, processor: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    messages = form.messages({"type": "image", "image": PICTURE})
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(inputs["input_ids"][0])


READ = {
    "training": _train, "chat": _chat, "serve": _serve, "web": _web, "answer_all": _answer_all,
    "transformers": _transformers,
}  # fmt: skip


def _reference(form: Form, processor: LlavaNpuProcessor) -> list[int]:
    placed = encode_prompt(form.turns, processor.tokenizer, processor.template, system=form.system)
    return processor._expand(placed, [(20, 40)] * form.num_images, "")


CELLS = [(name, door) for name, form in FORMS.items() for door in READ if form.at(door) != NOT_SAID]


@pytest.mark.parametrize(("name", "door"), CELLS)
def test_cell(name: str, door: str, processors: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    form, (ours, theirs) = FORMS[name], processors
    for processor in (ours, theirs) if door == "transformers" else (ours,):
        if form.at(door) == REFUSED:
            with pytest.raises((UserError, TemplateError)):
                READ[door](form, processor, monkeypatch)
        else:
            assert READ[door](form, processor, monkeypatch) == _reference(form, ours)


def test_the_table_is_in_the_docs() -> None:
    assert table() in (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


@pytest.mark.parametrize("template", ["mistral", "plain"])
def test_a_system_message_is_refused_by_templates_without_one(template: str, tmp_path: Path) -> None:
    _, processor = _saved("llama", template, "mlp2x_gelu", tmp_path)
    messages = FORMS["system, image"].messages({"type": "image"})
    with pytest.raises(TemplateError, match="no place for a system prompt"):
        processor.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("template", ["llama_3", "phi_3"])
@pytest.mark.parametrize("name", ["system, image", "text", "blank system"])
def test_a_system_message_of_templates_that_bring_none(
    template: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = _saved("bytes", template, "mlp2x_gelu", tmp_path)
    ids = _reference(FORMS[name], processor)
    assert _serve(FORMS[name], processor, monkeypatch) == ids
    assert _transformers(FORMS[name], processor, monkeypatch) == ids


@pytest.mark.parametrize("name", ["text", "question, answer, question", "image alone"])
def test_captions_are_of_images_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor = _saved("llama", "plain", "mlp2x_gelu", tmp_path)
    if name == "image alone":
        ids = _serve(FORMS[name], processor, monkeypatch)
        assert _transformers(FORMS[name], processor, monkeypatch) == ids
    else:
        for door, error in ((_serve, UserError), (_transformers, TemplateError)):
            with pytest.raises(error, match="caption"):
                door(FORMS[name], processor, monkeypatch)


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content"])
def test_what_an_answer_has_next_to_its_words_is_refused(key: str, processors: tuple[Any, Any]) -> None:
    messages = FORMS["question, answer, question"].messages({"type": "image"})
    messages[1][key] = [{"id": "1"}]
    for processor in processors:
        with pytest.raises(TemplateError, match="tool calls and reasoning_content are not read"):
            processor.apply_chat_template(messages, add_generation_prompt=True)
    messages[1][key] = None
    assert processors[0].apply_chat_template(messages, add_generation_prompt=True)
