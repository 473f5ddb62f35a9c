"""A judge model behind any endpoint that speaks OpenAI's chat protocol: retries, a cache on disk, and what it cost.

Where it is and which model is configured by the command line or the environment:

    LLAVA_NPU_JUDGE_URL      such as http://localhost:8000/v1; "/chat/completions" is added
    LLAVA_NPU_JUDGE_MODEL    its name there
    LLAVA_NPU_JUDGE_KEY      the key, if it wants one (for OpenAI itself OPENAI_API_KEY, too). Only here: a command line
                             is recorded.
    LLAVA_NPU_JUDGE_PRICES   money for a million tokens read and a million written, as 2.5,10

The key is sent to that address alone (redirections are not followed) and never written anywhere.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.files.atomic import write_text
from llava_npu.files.cache import cache_root

URL, MODEL, KEY, PRICES = (f"LLAVA_NPU_JUDGE_{name}" for name in ("URL", "MODEL", "KEY", "PRICES"))
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_OF_THIS_REQUEST = frozenset({400, 413, 422})  # too long, or against the rules of the house; another may pass
_MOST_FAILURES = 3  # requests in a row without a reply, each repeated: then the judge is down
# What newer models of OpenAI refuse. For the first they have another name; the second they choose themselves.
_SOMETIMES_REFUSED = ("max_tokens", "temperature")
_ROOM_TO_THINK = 4096  # tokens at least: for models that want `max_completion_tokens` it bounds their thinking, too
_LONGEST_WAIT = 60.0  # seconds
_LARGEST_REPLY = 16 * 2**20  # bytes
_LONGEST_MESSAGE = 300  # characters of a server's error shown

Message = Mapping[str, str]  # role, content


class JudgeError(Exception):
    """The judge gave no reply, however often it was asked."""


class RefusedError(Exception):
    """The judge's endpoint does not take this request; others it may."""


@dataclass(frozen=True)
class JudgeSettings:
    """Where a judge is and how it is asked.

    Attributes:
        url: of the endpoint, without "/chat/completions".
        model: its name there.
        key: sent as a bearer token; "" for none.
        prices: money for a million tokens read and written; None if unknown.
        timeout: seconds for one reply.
        retries: how often a failed request is repeated.
        backoff: seconds before the first repetition; they double each time, with a random share added.
        parallel: requests at once.
        cache: folder of replies; asking the same again costs nothing.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    prices: tuple[float, float] | None = None
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    parallel: int = 4
    cache: Path = field(default_factory=lambda: cache_root() / "judge")

    @property
    def address(self) -> str:
        """The URL as it may be recorded: without user, password and query."""
        parts = urllib.parse.urlsplit(self.url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"


def judge_settings(
    url: str | None = None, model: str | None = None, prices: str | None = None, **more: Any
) -> JudgeSettings | None:
    """The judge that the arguments or else the environment describe; None if there is no URL.

    Raises:
        UserError: a URL without a model, a URL of another kind than http, or prices that are no two numbers.
    """
    url = url or os.environ.get(URL)
    model = model or os.environ.get(MODEL)
    if not url:
        if model:
            raise UserError(f"a judge model ({model}) is named, but not where it is: give --judge-url or set {URL}.")
        return None
    if not model:
        raise UserError(f"a judge's URL is given, but not its model: give --judge-model or set {MODEL}.")
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"judge URL {url!r}: expected something like http://localhost:8000/v1 or https://host/v1.")
    key = os.environ.get(KEY) or ""
    if not key and parts.scheme == "https" and f".{parts.hostname}".endswith(".openai.com"):
        key = os.environ.get("OPENAI_API_KEY") or ""  # nobody else's business
    return JudgeSettings(url, model, key, _prices(prices or os.environ.get(PRICES)), **more)


def _prices(value: str | None) -> tuple[float, float] | None:
    if not value:
        return None
    try:
        read, written = (float(part) for part in value.split(","))
    except ValueError as error:
        raise UserError(f"judge prices {value!r}: two numbers are expected, as 2.5,10 (per million tokens).") from error
    return read, written


@dataclass(frozen=True)
class Reply:
    """What the judge said, what it read and wrote in tokens, and whether it was asked at all this time."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        """Follows nothing: the key must not go elsewhere."""


class JudgeClient:
    """Asks a judge. May be used by several threads at once.

    One that gave no reply a few times in a row, each time however often it was asked, is down and not asked any more.
    """

    def __init__(self, settings: JudgeSettings, sleep: Callable[[float], None] = time.sleep):
        """
        Args:
            settings: the judge.
            sleep: waits between repetitions.
        """
        self.settings = settings
        self._sleep = sleep
        self._failures = _Failures()
        self.refused_parameters: set[str] = set()
        self._opener = urllib.request.build_opener(_NoRedirection)
        base = settings.url.rstrip("/")
        self._url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def ask(self, messages: Sequence[Message], *, temperature: float, max_tokens: int, attempt: int = 0) -> Reply:
        """The judge's reply, from the cache if it was given before.

        Args:
            messages: the conversation.
            temperature, max_tokens: of the request.
            attempt: a different number asks anew for the same.

        Raises:
            UserError: the endpoint refuses to be asked at all (no such model, wrong key, …).
            RefusedError: it refuses this one request.
            JudgeError: no usable reply after all repetitions.
        """
        request = {
            "model": self.settings.model,
            "messages": [dict(message) for message in messages],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        identity = json.dumps([self.settings.address, request, attempt], sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        path = self.settings.cache / digest[:2] / f"{digest}.json"
        cached = _read_cached(path)
        if cached is not None:
            return cached
        reply = self._failures.watch(lambda: self._ask_repeatedly(request))
        kept = {name: value for name, value in asdict(reply).items() if name != "cached"}
        write_text(path, json.dumps(kept, ensure_ascii=False) + "\n")
        return reply

    def _ask_repeatedly(self, request: Mapping[str, Any]) -> Reply:
        for repetition in range(self.settings.retries + 1):
            try:
                return self._ask_understood(request)
            except _TransientError as error:
                if repetition == self.settings.retries:
                    raise JudgeError(f"{error} (asked {repetition + 1} times)") from error
                wait = self.settings.backoff * 2**repetition * random.uniform(1.0, 1.5)
                self._sleep(min(max(wait, error.wait), _LONGEST_WAIT))
        raise AssertionError("unreachable")

    def _ask_understood(self, request: Mapping[str, Any]) -> Reply:
        """Asks again without parameters that this model does not take, and remembers them."""
        while True:
            body = self._in_its_words(request)
            try:
                return self._ask_once(json.dumps(body).encode())
            except RefusedError as error:
                said = str(error)
                refused = {name for name in _SOMETIMES_REFUSED if name in body and f"'{name}'" in said}
                if not refused or "unsupported" not in said.lower():
                    raise
                self.refused_parameters |= refused

    def _in_its_words(self, request: Mapping[str, Any]) -> dict[str, Any]:
        body = {name: value for name, value in request.items() if name not in self.refused_parameters}
        if "max_tokens" in self.refused_parameters:
            body["max_completion_tokens"] = max(request["max_tokens"], _ROOM_TO_THINK)
        return body

    def _ask_once(self, body: bytes) -> Reply:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "llava-npu"}
        if self.settings.key:
            headers["Authorization"] = f"Bearer {self.settings.key}"
        request = urllib.request.Request(self._url, body, headers, method="POST")  # http or https: checked above
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as response:
                return _parse(response.read(_LARGEST_REPLY))
        except urllib.error.HTTPError as error:
            message = _server_message(error)
            if error.code in _TRANSIENT:
                raise _TransientError(f"status {error.code}: {message}", _retry_after(error)) from error
            if error.code in _OF_THIS_REQUEST:
                raise RefusedError(f"refused with status {error.code}: {message}") from error
            raise UserError(
                f"judge {self.settings.model} at {self.settings.address} refuses: status {error.code}: {message}"
            ) from error
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise _TransientError(f"no connection to {self.settings.address}: {error}") from error


class _Failures:
    """Requests in a row that got no reply, whichever thread made them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_a_row = 0

    def watch(self, request: Callable[[], Reply]) -> Reply:
        """What the request gives. Raises `JudgeError` without making it once too many have failed."""
        if self._in_a_row >= _MOST_FAILURES:
            raise JudgeError(f"not asked any more after {_MOST_FAILURES} requests in a row without a reply")
        try:
            reply = request()
        except JudgeError:
            with self._lock:
                self._in_a_row += 1
            raise
        with self._lock:
            self._in_a_row = 0
        return reply


class _TransientError(Exception):
    """May pass if asked again, after `wait` seconds."""

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


def _parse(content: bytes) -> Reply:
    try:
        value = json.loads(content)
        text = value["choices"][0]["message"]["content"]
        usage = value.get("usage") or {}
        tokens = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _TransientError(f"not a chat completion: {content[:_LONGEST_MESSAGE]!r}") from error
    if not isinstance(text, str) or not text.strip():
        raise _TransientError("an empty reply")
    return Reply(text, *tokens)


def _read_cached(path: Path) -> Reply | None:
    try:
        return Reply(**json.loads(path.read_text(encoding="utf-8")), cached=True)
    except (FileNotFoundError, ValueError, TypeError):
        return None  # absent or damaged: it is asked again and written anew


def _server_message(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(4096).decode("utf-8", errors="replace").strip()[:_LONGEST_MESSAGE] or str(error.reason)
    except OSError:
        return str(error.reason)


def _retry_after(error: urllib.error.HTTPError) -> float:
    value = error.headers.get("Retry-After", "") if error.headers else ""
    return float(value) if value.strip().isdigit() else 0.0
