"""Load on a server: throughput next to one request at a time and next to `generate`, memory, right answers.

    python benchmarks/serving.py [--model DIR] [--device auto] [--clients 64] [--seconds 60] [--tokens 32]
    python benchmarks/serving.py --kind turns|users [--clients 8] [--images 12] [--questions 4]

Starts `llava-npu serve` on a free port of this machine, with `--model` or a small random model. Then, in turn:

    generate    transformers' `generate` answers the questions one by one, in this process; these are the right answers
    one         one client asks the server, one question after the other
    many        `--clients` clients ask at once; a quarter of their requests is malformed, oversized, not an image, or
                left by its client before the answer's end (`--kind good`: none)

Or requests that share an image, each asked once, with 576 image tokens as LLaVA-1.5 has:

    turns       each conversation is about an image of its own, and later questions bring the earlier turns along
    users       each image is asked about by several clients at the same time

Every whole answer must be `generate`'s, every bad request must get its status, and the server's memory must not grow
between a third of the way and the end. Otherwise the script says what was wrong and leaves with status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

MIB = 2**20
MAX_REQUEST = 1 * MIB
WORDS = ("what", "which", "is", "are", "the", "a", "red", "green", "blue", "square", "colour", "here", "and", "of")


@dataclass(frozen=True)
class Case:
    """A good request and the text that must come."""

    body: dict[str, Any]
    expected: str


@dataclass
class Load:
    """What clients saw."""

    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    cpu: float = 0.0  # seconds of processor time that the server used
    first: list[float] = field(default_factory=list)  # seconds to the first token
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds since the start, bytes of the server

    @property
    def rate(self) -> float:
        """Tokens of whole answers per second."""
        return self.tokens / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Tokens of whole answers per second of the server's processor time: what a busy machine does not change."""
        return self.tokens / self.cpu if self.cpu else 0.0

    @property
    def growth(self) -> int:
        """Bytes by which the server grew from a third of the way to the end; medians, since samples jitter."""
        third = [size for at, size in self.memory if self.seconds / 3 <= at < self.seconds / 2]
        last = [size for at, size in self.memory if at >= self.seconds * 5 / 6]
        return int(statistics.median(last) - statistics.median(third)) if third and last else 0


def main() -> None:
    options = parse_arguments()
    if options.kind in ("turns", "users"):
        share_images(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(write_model(Path(folder) / "model"))
        cases, generate_rate = make_cases(model, options)
        print(f"generate, one by one:        {generate_rate:8.1f} tokens/s", flush=True)
        with serving(model, options) as (address, process):
            memory = psutil.Process(process.pid)
            one = asyncio.run(put_load(address, cases, clients=1, seconds=options.seconds / 4, memory=memory))
            report("server, one client", one)
            mixed = options.kind == "mixed"
            many = asyncio.run(
                put_load(address, cases, options.clients, options.seconds, bad=0.25 if mixed else 0, memory=memory)
            )
            report(f"server, {options.clients} clients", many)
            healthy = httpx.get(f"{address}/health").status_code == 200 and process.poll() is None
    print(
        f"{options.clients} clients against one: {many.rate / one.rate:.1f}× (by processor time "
        f"{many.cpu_rate / max(one.cpu_rate, 1e-9):.1f}×); against generate: "
        f"{many.rate / generate_rate:.1f}×; server memory {many.memory[-1][1] / MIB:.0f} MiB, "
        f"{many.growth / MIB:+.1f} MiB from a third of the way to the end"
    )
    problems = [*one.wrong, *many.wrong]
    if not healthy:
        problems.append("the server is not healthy any more")
    if many.growth > 32 * MIB:
        problems.append(f"the server's memory grew by {many.growth / MIB:.0f} MiB")
    if problems:
        sys.exit("\n".join(["PROBLEMS", *problems[:20]]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; by default a small random model is made")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="in 16 bits near ties fall either way: answers differ")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, default=24, help="different questions")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--kind", choices=("mixed", "good", "turns", "users"), default="mixed")
    parser.add_argument("--source", help="serve with the code of another checkout, whose src folder this is")
    parser.add_argument("--images", type=int, default=12, help="different images, where requests share them")
    parser.add_argument("--questions", type=int, default=4, help="questions about each of them")
    return parser.parse_args()


def share_images(options: argparse.Namespace) -> None:
    """Measures requests that share images."""
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(write_model(Path(folder) / "model", image_size=336))
        conversations = make_conversations(model, options)
        if options.kind == "users":  # neighbours ask about the same image, each question for itself
            conversations = [[case] for conversation in conversations for case in conversation]
        with serving(model, options) as (address, process):
            memory = psutil.Process(process.pid)
            load = asyncio.run(put_conversations(address, conversations, options.clients, memory))
    report(f"{options.kind}, {options.clients} clients", load)
    asked = sum(load.outcomes.values())
    rate, cpu_rate = asked / load.seconds, asked / load.cpu
    print(
        f"{asked} questions in {load.seconds:.2f} s: {rate:.2f} per second, {cpu_rate:.2f} per second of processor time"
    )
    if load.wrong:
        sys.exit("\n".join(["PROBLEMS", *load.wrong[:20]]))


def report(name: str, load: Load) -> None:
    first = sorted(load.first) or [0.0]
    median, late = first[len(first) // 2], first[int(len(first) * 0.95)]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(load.outcomes.items()))
    print(
        f"{name + ':':28} {load.rate:8.1f} tokens/s, {load.cpu_rate:.1f} per second of the server's processor time; "
        f"first token after {median:.2f} s (median), {late:.2f} s (95 %); {counts}",
        flush=True,
    )


def write_model(folder: Path, image_size: int = 56) -> Path:
    """A model of 8 layers with random weights, large enough that different questions get different answers."""
    from small_models import write_llava  # what needs torch is imported where it is used

    tower = {"width": 64, "inner": 128, "layers": 4, "side": image_size}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return write_llava(folder, 256, 8, tower=tower, intermediate_size=512, initializer_range=0.1, **heads)


class Reference:
    """`generate` of transformers, whose answers are the right ones."""

    def __init__(self, model: str, options: argparse.Namespace):
        from llava_npu.cli.options import load_model
        from llava_npu.inference.detokenize import stop_string, stopping_arguments

        (self._model, self._processor), _ = load_model(model, options.device, options.dtype, bits=16)
        template = self._processor.template
        self._stops = [stop_string(template)]
        self._stopping = stopping_arguments(self._model, self._processor.tokenizer, template)
        self.tokens, self.seconds = 0, 0.0

    def answer(self, turns: list[dict[str, str]], images: list[Any], limit: int) -> str:
        from llava_npu.inference.detokenize import finished_text

        inputs = self._processor.encode_prompts([turns], [images]).to(self._model.device)
        start = time.perf_counter()
        output = self._model.generate(**inputs, **self._stopping, max_new_tokens=limit, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        self.seconds += time.perf_counter() - start
        self.tokens += len(new)
        decoded = self._processor.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return finished_text(decoded, self._stops)


def make_cases(model: str, options: argparse.Namespace) -> tuple[list[Case], float]:
    """Good requests with the answers of `generate`, and how many tokens per second it gave."""
    reference = Reference(model, options)
    chance = random.Random(0)
    cases = []
    for number in range(options.cases):
        text = _question(chance, number)
        images = [_image(chance) for _ in range(chance.choice([0, 1, 1, 2]))]
        limit = chance.randint(options.tokens // 2, options.tokens)
        turns = [{"from": "human", "value": "<image>\n" * len(images) + text}]
        message = {"role": "user", "content": [*map(_image_part, images), {"type": "text", "text": text}]}
        body = {"messages": [message], "max_tokens": limit, "temperature": 0}
        cases.append(Case(body, reference.answer(turns, images, limit)))
    return cases, reference.tokens / reference.seconds


def make_conversations(model: str, options: argparse.Namespace) -> list[list[Case]]:
    """For each image some questions; as turns, with the earlier ones and their answers."""
    reference = Reference(model, options)
    chance = random.Random(0)
    conversations = []
    for number in range(options.images):
        image = _image(chance)
        turns: list[dict[str, str]] = []
        messages: list[dict[str, Any]] = []
        cases = []
        for _ in range(options.questions):
            text = _question(chance, number)
            if options.kind == "users" or not turns:
                turns = [{"from": "human", "value": f"<image>\n{text}"}]
                messages = [{"role": "user", "content": [_image_part(image), {"type": "text", "text": text}]}]
            else:
                turns = [*turns, {"from": "human", "value": text}]
                messages = [*messages, {"role": "user", "content": text}]
            answer = reference.answer(turns, [image], options.tokens)
            cases.append(Case({"messages": messages, "max_tokens": options.tokens, "temperature": 0}, answer))
            turns = [*turns, {"from": "gpt", "value": answer}]
            messages = [*messages, {"role": "assistant", "content": answer}]
        conversations.append(cases)
    return conversations


def _question(chance: random.Random, number: int) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(2, 20))) + f" {number}?"


def _image(chance: random.Random) -> Any:
    from PIL import Image

    colour = tuple(chance.choices(range(256), k=3))
    return Image.new("RGB", (chance.randint(20, 90), 40), colour)


def _image_part(image: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": _data_url(image)}}


def _data_url(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@contextmanager
def serving(model: str, options: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own."""
    command = [sys.executable, "-m", "llava_npu", "serve", "--model", model, "--device", options.device, "--port", "0"]
    limits = ["--max-batch", str(options.max_batch), "--max-waiting", str(2 * options.clients)]
    command += [*limits, "--dtype", options.dtype, "--max-request-mib", str(MAX_REQUEST / MIB)]
    environment = {**os.environ, **({"PYTHONPATH": options.source} if options.source else {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if "/v1" in line), "")
            if not line:
                sys.exit("the server does not start")
            yield next(word for word in line.split() if word.startswith("http://")).removesuffix("/v1"), process
        finally:
            process.terminate()
            process.wait(30)


async def put_load(
    address: str,
    cases: list[Case],
    clients: int,
    seconds: float,
    *,
    bad: float = 0.0,
    memory: psutil.Process | None = None,
) -> Load:
    """Clients that ask one thing after the other until the time is over.

    Args:
        bad: the share of requests that are bad in some way.
        memory: the server's process, whose memory and processor time are watched.
    """
    load = Load()
    start = time.monotonic()
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        before = _cpu_seconds(memory) if memory else 0.0
        watching = asyncio.ensure_future(_watch(memory, load, start)) if memory else None
        await asyncio.gather(*(_client(client, number, cases, load, start + seconds, bad) for number in range(clients)))
        load.seconds = time.monotonic() - start
        if memory and watching:
            watching.cancel()
            load.cpu = _cpu_seconds(memory) - before
    return load


async def put_conversations(
    address: str, conversations: list[list[Case]], clients: int, memory: psutil.Process
) -> Load:
    """Clients that ask each conversation's questions one after the other, until every one was had by one of them."""
    load = Load()
    todo = iter(conversations)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def work(client: httpx.AsyncClient) -> None:
        for conversation in todo:
            for case in conversation:
                if outcome := await _whole(client, case, load):
                    load.wrong.append(outcome)
                load.outcomes["whole"] += 1

    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
        before, start = _cpu_seconds(memory), time.monotonic()
        await asyncio.gather(*(work(client) for _ in range(clients)))
        load.seconds, load.cpu = time.monotonic() - start, _cpu_seconds(memory) - before
    return load


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _watch(process: psutil.Process, load: Load, start: float) -> None:
    while True:
        load.memory.append((time.monotonic() - start, process.memory_info().rss))
        await asyncio.sleep(0.1)


async def _client(
    client: httpx.AsyncClient, number: int, cases: list[Case], load: Load, end: float, bad: float
) -> None:
    chance = random.Random(number)
    questions = itertools.cycle(random.Random(number).sample(cases, len(cases)))
    while time.monotonic() < end:
        case = next(questions)
        if chance.random() < bad:
            name = chance.choice(list(_BAD))
            outcome = await _BAD[name](client, case)
        elif chance.random() < 0.5:
            name, outcome = "streamed", await _stream(client, case, load)
        else:
            name, outcome = "whole", await _whole(client, case, load)
        load.outcomes[name] += 1
        if outcome:
            load.wrong.append(f"{name}: {outcome}")


async def _whole(client: httpx.AsyncClient, case: Case, load: Load) -> str:
    reply = await client.post("/v1/chat/completions", json=case.body)
    if reply.status_code != 200:
        return f"status {reply.status_code}: {reply.text[:200]}"
    value = reply.json()
    load.tokens += value["usage"]["completion_tokens"]
    return _compare(value["choices"][0]["message"]["content"], case)


async def _stream(client: httpx.AsyncClient, case: Case, load: Load) -> str:
    body = {**case.body, "stream": True, "stream_options": {"include_usage": True}}
    start = time.monotonic()
    text, done = "", False
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            return f"status {reply.status_code}: {(await reply.aread())[:200]!r}"
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                continue
            value = json.loads(line[6:])
            if value.get("usage"):
                load.tokens += value["usage"]["completion_tokens"]
            for choice in value["choices"]:
                if choice["delta"].get("role"):
                    load.first.append(time.monotonic() - start)
                text += choice["delta"].get("content") or ""
    return _compare(text, case) if done else "the stream has no end"


def _compare(text: str, case: Case) -> str:
    # The server keeps white space around an answer, as OpenAI's does.
    return "" if text.strip() == case.expected else f"{text!r} instead of {case.expected!r}"


async def _malformed(client: httpx.AsyncClient, case: Case) -> str:
    reply = await client.post("/v1/chat/completions", content=b'{"messages": [', headers=_JSON)
    return "" if reply.status_code == 400 else f"status {reply.status_code}"


async def _not_an_image(client: httpx.AsyncClient, case: Case) -> str:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    reply = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
    return "" if reply.status_code == 400 else f"status {reply.status_code}"


async def _oversized(client: httpx.AsyncClient, case: Case) -> str:
    try:
        reply = await client.post("/v1/chat/completions", content=b" " * (MAX_REQUEST + 1), headers=_JSON)
    except httpx.TransportError:
        return ""  # refused by its length, and closed while it was still being sent
    return "" if reply.status_code == 413 else f"status {reply.status_code}"


async def _too_long(client: httpx.AsyncClient, case: Case) -> str:
    reply = await client.post("/v1/chat/completions", json={**case.body, "max_tokens": 10**6})
    return "" if reply.status_code == 400 else f"status {reply.status_code}"


async def _left(client: httpx.AsyncClient, case: Case) -> str:
    """The client leaves after the first bytes of the answer."""
    async with client.stream("POST", "/v1/chat/completions", json={**case.body, "stream": True}) as reply:
        async for _ in reply.aiter_bytes():
            return "" if reply.status_code == 200 else f"status {reply.status_code}"
    return ""


_JSON = {"Content-Type": "application/json"}
_BAD = {
    "malformed": _malformed,
    "not an image": _not_an_image,
    "oversized": _oversized,
    "too many tokens": _too_long,
    "left": _left,
}

if __name__ == "__main__":
    main()
