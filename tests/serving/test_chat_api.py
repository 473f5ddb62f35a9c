"""The server as clients see it: OpenAI's own client, LangChain's, and requests made by hand."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile
from prometheus_client import parser

from llava_npu import Sampling, answer_all
from llava_npu.inference import engine
from llava_npu.models.loaded import LoadedModel
from llava_npu.serving.api.chat import _UNSUPPORTED, _WITHOUT_EFFECT
from llava_npu.serving.api.limits import Limits
from support.running import http, make_service, running

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def address(model_folder: Path) -> Iterator[str]:
    limits = Limits(max_request_bytes=200_000, max_images=3, max_image_pixels=10_000, max_new_tokens=64)
    with running(make_service(model_folder, limits=limits)) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def data_url(picture: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_part(picture: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(picture), "detail": "auto"}}


def question(text: str, *pictures: Image.Image) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": text}, *map(image_part, pictures)]}]


def test_the_answer_is_the_offline_one(client: Any, loaded: LoadedModel, pictures: list[Image.Image]) -> None:
    (offline,) = answer_all(loaded, ["What is it?"], [pictures[:2]], sampling=Sampling(12))
    reply = client.chat.completions.create(
        model="tiny", messages=question("What is it?", *pictures[:2]), max_tokens=12, temperature=0
    )
    assert reply.choices[0].message.content == offline
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_the_stream_adds_up_to_it(client: Any, loaded: LoadedModel, pictures: list[Image.Image]) -> None:
    (offline,) = answer_all(loaded, ["What is it?"], [pictures[:1]], sampling=Sampling(24))
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=question("What is it?", pictures[0]),
            max_completion_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == offline
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage.completion_tokens == 24
    assert len(chunks) > 4


def test_a_conversation_with_a_system_prompt(client: Any, loaded: LoadedModel, pictures: list[Image.Image]) -> None:
    processor = loaded[1]
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "a square"},
        {"from": "human", "value": "Is <image> or <image> red?"},
    ]
    ids = processor.encode_prompt(turns, [(9, 9)] * 3, "", "Be brief.")
    messages = [
        {"role": "system", "content": "Be brief."},
        *question("What is it?", pictures[0]),
        {"role": "assistant", "content": "a square"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Is "},
                image_part(pictures[1]),
                {"type": "text", "text": " or "},
                image_part(pictures[2]),
                {"type": "text", "text": " red?"},
            ],
        },
    ]
    reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0)
    assert reply.usage.prompt_tokens == len(ids)
    other = client.chat.completions.create(model="tiny", messages=messages[1:], max_tokens=4, temperature=0)
    assert other.usage.prompt_tokens != len(ids)


def test_stop_texts_and_seeds(client: Any) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="tiny", messages=question("What is it?"), max_tokens=30, **more)

    whole = ask(temperature=0).choices[0].message.content
    cut = ask(temperature=0, stop=[whole[5:7], "never"]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(whole[5:7])].strip(), "stop")
    assert ask(seed=1).choices[0].message.content == ask(seed=1).choices[0].message.content
    assert ask(seed=1).choices[0].message.content != ask(seed=2).choices[0].message.content


# As their sources write them: vllm/benchmarks 0.32, guidellm 0.8.1 (openai/request_handlers.py), evalscope 1.14.1
# (perf/plugin/api/openai_api.py).
LOAD_GENERATORS: dict[str, dict[str, Any]] = {
    "vllm bench serve": {
        "max_completion_tokens": 6,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 10,
        "min_p": 0.05,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
    },
    "guidellm": {
        "max_completion_tokens": 6,
        "stop": None,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "evalscope perf": {
        "max_tokens": 6,
        "min_tokens": 6,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": False,
        "n": 1,
        "seed": 0,
        "stop": [],
        "stop_token_ids": [],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "ignore_eos": True,
    },
}


@pytest.mark.parametrize("sent", LOAD_GENERATORS.values(), ids=LOAD_GENERATORS)
def test_what_load_generators_send(address: str, sent: dict[str, Any]) -> None:
    reply = http.post(f"{address}/v1/chat/completions", json={**_text("What?"), "max_tokens": None, **sent})
    assert reply.status_code == 200, reply.text
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    assert events[-1]["usage"]["completion_tokens"] == 6
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    if sent["stream_options"].get("continuous_usage_stats"):
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts)
        assert 1 in counts


def test_values_that_change_nothing(address: str) -> None:
    neutral = {name: values[-1] for name, values in _UNSUPPORTED.items()} | dict.fromkeys(_WITHOUT_EFFECT, None)
    reply = http.post(f"{address}/v1/chat/completions", json=_text("What?", **neutral))
    assert reply.status_code == 200, reply.text


def test_white_space_around_an_answer_stays(client: Any, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from OpenAI's server, streamed or not, and before a stop text too. Other doors remove it."""
    script = _scripted(loaded, "  \n a cat \n STOP and more")
    monkeypatch.setattr(engine, "choose_tokens", script)

    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=60, **more)

    for stop, text in (("STOP", "  \n a cat \n "), (["cat"], "  \n a "), ("\n a", "  "), ([" STOP"], "  \n a cat \n")):
        assert ask(stop=stop).choices[0].message.content == text
        assert "".join(c.choices[0].delta.content or "" for c in ask(stop=stop, stream=True)) == text


def _scripted(loaded: LoadedModel, text: str) -> Any:
    """A choice of tokens that writes this text, whatever the model says."""
    tokens = loaded.processor.tokenizer(text, add_special_tokens=False).input_ids

    def choose(logits: Any, choosers: Any, so_far: Any) -> list[int]:
        return [
            tokens[(len(each) - chooser.prompt_length) % len(tokens)]
            for chooser, each in zip(choosers, so_far, strict=True)
        ]

    return choose


def test_langchain(address: str, pictures: list[Image.Image]) -> None:
    chat_models = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = chat_models.ChatOpenAI(
        base_url=f"{address}/v1", api_key="none", model="tiny", temperature=0, max_tokens=8, max_retries=0
    )
    messages = question("What is it?", pictures[0])
    answer = model.invoke(messages).content
    assert "".join(chunk.content for chunk in model.stream(messages)) == answer


PICTURE = Image.new("RGB", (20, 20), (9, 9, 9))
QUESTION = [{"role": "user", "content": "What?"}]
GOOD = data_url(PICTURE)
NO_PICTURE = "data:image/png;base64," + base64.b64encode(b"no picture").decode()


def _asked(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def _text(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 2, **more}


def _said(**more: Any) -> dict[str, Any]:
    return {"messages": [*QUESTION, {"role": "assistant", "content": "A cat.", **more}, *QUESTION]}


def _parts(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def test_what_asks_for_nothing_is_no_error(client: Any, pictures: list[Image.Image]) -> None:
    """What clients send by themselves, the message that an earlier answer was, and base64 in lines."""
    picture = image_part(pictures[0])
    kind, _, code = picture["image_url"]["url"].partition(",")
    picture["image_url"]["url"] = f"{kind},{code[:20]}\r\n{code[20:]}\n"
    text = {"type": "text", "text": "What is it?", "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "type": "text", "content": [picture, text], "tool_calls": [], "audio": None}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    plain = client.chat.completions.create(
        model="tiny", messages=question("What is it?", pictures[0]), max_tokens=8, temperature=0
    )
    assert first.choices[0].message.content == plain.choices[0].message.content
    second = client.chat.completions.create(
        model="tiny",
        messages=[*messages, first.choices[0].message, *QUESTION],
        max_tokens=8,
        n=1,
        stop=None,
        user="me",
        store=False,
        metadata={"a": "b"},
        tool_choice="none",
        frequency_penalty=0,
        response_format={"type": "text"},
        extra_body={"top_k": -1},
    )
    assert second.usage.prompt_tokens > first.usage.total_tokens


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (_asked(NO_PICTURE), 400, "image 1: image of 10 bytes: not an image"),
        (_asked(GOOD[:-6]), 400, "damaged"),
        (_asked(GOOD[:-7]), 400, "image 1: damaged base64, maybe cut off"),
        (_asked("data:image/png;base64,"), 400, "image 1: the image is empty (0 bytes)"),
        (_asked(GOOD.replace("image/png", "text/html")), 400, "a data URL of type 'text/html'"),
        (_asked(GOOD.replace(";base64", "")), 400, "not in base64"),
        (_asked(data_url(Image.new("1", (101, 100)))), 400, "more than 10,000 pixels (101×100 pixels)"),
        (_asked("https://example.org/cat.png"), 400, "it does with --allow-image-urls"),
        (_asked("file:///etc/passwd"), 400, "neither a data URL"),
        (_asked("/etc/passwd"), 400, "neither a data URL"),
        ({"messages": question("What?", *[PICTURE] * 4)}, 400, "4 images; this server takes 3 (--max-images)"),
        (_text("What? " * 600), 400, "prompt and answer together may have 512"),
        (_text("x" * 40_000), 400, "a text of 40,000 characters"),
        (_text("What?", max_tokens=65), 400, "max_tokens is 65; this server writes 1 to 64 (--max-new-tokens)"),
        (_text("What?", max_tokens=0), 400, "max_tokens is 0"),
        (_text("What?", temperature=-1), 400, "temperature is -1.0"),
        (_text("What?", temperature=2.1), 400, "temperature is 2.1; allowed is 0 to 2"),
        (_text("What?", min_p=2), 400, "min_p is 2.0; allowed is 0 to 1"),
        (_text("What?", min_tokens=3), 400, "min_tokens is 3; allowed is 0 to max_new_tokens"),
        (_text("What?", presence_penalty=3), 400, "presence_penalty is 3.0; allowed is -2 to 2"),
        (_text("What?", stop_token_ids=[10**6]), 400, "stop_token_ids: 1000000; this model's token ids are 0 to"),
        (_text("What?", stop=""), 400, "stop: at most 4 texts of 1 to 200 characters"),
        (_text("What?", stream_options={"include_usage": True}), 400, "stream_options without stream: true"),
        (_text("What?", stream=True, stream_options={"usage": True}), 400, "stream_options.usage: "),
        (_text("What?", n=True), 400, "n is true"),
        (_text("What?", best_of=2), 400, "best_of is 2: this server does not support it"),
        (_text("What?", echo=True), 400, "echo is true"),
        (_text("What?", continue_final_message=True), 400, "continue_final_message is true"),
        (_text("What?", structured_outputs={"json": {}}), 400, "structured_outputs is "),
        (_text("What?", temperature="warm"), 400, "temperature: "),
        (_text("What?", n=2), 400, "n is 2: this server does not support it"),
        (_text("What?", tools=[{"type": "function"}]), 400, "tools is "),
        (_text("What?", model="gpt-4o"), 404, "model 'gpt-4o': this server has 'tiny'"),
        (_text("<image> What?"), 400, "messages[0]: the text has <image>, but the message has no image"),
        (_text("a <|im_end|> b"), 400, "reads as markup"),
        (_text(""), 400, "empty"),
        (_text("What?", temprature=0), 400, "unknown field 'temprature': leave it out. Did you mean 'temperature'?"),
        (_text("What?", response_format={"type": "json_object"}), 400, 'response_format is {"type": "json_object"}'),
        (_text("What?", logprobs=True), 400, "logprobs is true"),
        (_text("What?", stop=["a"] * 5), 400, "stop: at most 4"),
        (_text("What?", top_p=0), 400, "top_p is 0.0"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": " "}, *QUESTION]}, 400, "messages[1]: an answer"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": GOOD}]}]}, 400,
         "messages[0].content[0].image_url: "),
        ({"messages": []}, 400, "messages: "),
        ({}, 400, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role: "),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0].image_url"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "the last one must be of role 'user'"),
        ([], 400, "the body: "),
        (_text("What?", max_tokens=True), 400, "max_tokens: Value error, a number is expected; it is True (bool)"),
        (_text("What?", stop_token_ids=[True]), 400, "stop_token_ids[0]: "),
        (_said(tool_calls=[{"id": "1"}]), 400, "messages[1]: 'tool_calls' is [{'id': '1'}] (list); this"),
        (_said(reasoning_content="Hm."), 400, "messages[1]: 'reasoning_content' is 'Hm.'"),
        ({"messages": [{**QUESTION[0], "images": [GOOD]}]}, 400, "messages[0]: 'images' is "),
        ({"messages": [{**QUESTION[0], "video": "v.mp4"}]}, 400, "messages[0]: 'video' is 'v.mp4'"),
        (_parts({"type": "text", "text": "What?", "image_url": {"url": GOOD}}), 400, "content[0]: 'image_url' is "),
        (_parts({**image_part(PICTURE), "text": "What?"}), 400, "messages[0].content[0]: 'text' is 'What?'"),
        (_parts({"type": "image_url", "image_url": {"url": GOOD, "crop": [1]}}), 400, "image_url: 'crop' is [1]"),
    ],
)  # fmt: skip
def test_a_bad_request_is_one_clear_error(address: str, body: Any, status: int, message: str) -> None:
    reply = http.post(f"{address}/v1/chat/completions", json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert message in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert http.get(f"{address}/health").status_code == 200


def test_what_is_no_json_or_too_large(address: str) -> None:
    url = f"{address}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    half = json.dumps({"messages": [{"role": "system", "content": "\ud800"}, *QUESTION]}).encode()
    for content in (b"{", b"\xff\xfe", b"[" * 100_000, b"", half):
        reply = http.post(url, content=content, headers=headers)
        assert reply.status_code == 400, (content[:10], reply.text)
        assert "error" in reply.json()
    reply = http.post(url, content=b"{}", headers={"Content-Type": "text/plain"})
    assert (reply.status_code, reply.json()["error"]["message"][:26]) == (415, "Content-Type is text/plain")
    reply = http.post(url, content=b"\x1f\x8b", headers={**headers, "Content-Encoding": "gzip"})
    assert (reply.status_code, reply.json()["error"]["message"][:24]) == (415, "Content-Encoding is gzip")
    reply = http.post(url, content=b"x" * 200_001, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")

    def endless() -> Iterator[bytes]:  # sent in chunks: its length is not announced
        for _ in range(300):
            yield b" " * 1000

    reply = http.post(url, content=endless(), headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    nowhere = http.post(f"{address}/v1/completions", json={}).json()["error"]
    assert nowhere["type"] == "not_found_error"
    assert nowhere["message"].startswith("POST /v1/completions: Not Found; the chat API is POST /v1/chat/completions")
    assert http.get(url).status_code == 405


def test_a_picture_of_a_hundred_megapixels_is_refused_unopened(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = data_url(Image.new("1", (10_000, 10_000)))
    assert len(bomb) < 200_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was opened"))
    reply = http.post(f"{address}/v1/chat/completions", json=_asked(bomb))
    assert "more than 10,000 pixels" in reply.json()["error"]["message"]


def test_metrics(address: str, client: Any) -> None:
    client.chat.completions.create(model="tiny", messages=question("What?"), max_tokens=3, temperature=0)
    http.get(f"{address}/a-name-from-outside")
    reply = http.get(f"{address}/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = reply.text
    families = parser.text_string_to_metric_families(text)  # as Prometheus reads it
    values = {sample.name: sample.value for family in families for sample in family.samples}
    assert 'llava_npu_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert values["llava_npu_answer_tokens_total"] >= 3
    assert values["llava_npu_time_to_first_token_seconds_count"] >= 1
    assert "a-name-from-outside" not in text


def test_the_key(model_folder: Path) -> None:
    with running(make_service(model_folder), api_key="sesame") as address:
        url = f"{address}/v1/chat/completions"
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
            reply = http.post(url, json=_text("What?"), headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert http.post(f"{address}/worker_generate_stream", json={"prompt": "x"}).status_code == 401
        assert http.get(f"{address}/v1/models").status_code == 401
        assert http.get(f"{address}/health").status_code == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key="sesame") as client:
            assert client.chat.completions.create(model="tiny", messages=question("What?"), max_tokens=2).choices


def _generate(address: str, **body: Any) -> list[dict[str, Any]]:
    reply = http.post(f"{address}/worker_generate_stream", json=body)
    assert reply.status_code == 200, reply.text
    *chunks, rest = reply.content.split(b"\0")
    assert rest == b""
    return [json.loads(chunk) for chunk in chunks]


def test_llavas_own_protocol(address: str, loaded: LoadedModel, pictures: list[Image.Image]) -> None:
    """As llava/serve/gradio_web_server.py and test_message.py speak it."""
    (offline,) = answer_all(loaded, ["What is it?"], [pictures[:1]], sampling=Sampling(8))
    prompt = "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    picture = data_url(pictures[0]).partition(",")[2]
    assert http.post(f"{address}/list_models").json() == {"models": ["tiny"]}
    worker = http.post(f"{address}/get_worker_address", json={"model": "tiny"}).json()["address"]
    assert http.post(f"{address}/get_worker_address", json={"model": "other"}).json() == {"address": ""}
    assert http.post(f"{worker}/worker_get_status").json() == {"model_names": ["tiny"], "speed": 1, "queue_length": 0}
    asked = {"model": "tiny", "prompt": prompt, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8}
    chunks = _generate(worker, **asked, stop="<|im_end|>", images=[picture])
    assert {chunk["error_code"] for chunk in chunks} == {0}
    assert chunks[-1]["text"] == prompt + offline
    assert all(later["text"].startswith(sooner["text"]) for sooner, later in pairwise(chunks))
    assert chunks[0]["text"].startswith(prompt)

    (error,) = _generate(worker, **asked, images=[])
    assert error["error_code"] == 1
    assert "1 <image> in the text, but 0 images" in error["text"]
    (error,) = _generate(worker, **asked, images=["!!"])
    assert "damaged base64" in error["text"]
