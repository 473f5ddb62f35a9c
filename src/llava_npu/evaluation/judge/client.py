"""A judge model behind any endpoint that speaks OpenAI's chat protocol: a cache on disk, and what it cost.

The endpoint and the model are set on the command line or in the environment:

    LLAVA_NPU_JUDGE_URL      such as http://localhost:8000/v1; "/chat/completions" is added
    LLAVA_NPU_JUDGE_MODEL    the model's name there
    LLAVA_NPU_JUDGE_KEY      the API key, if one is needed (OPENAI_API_KEY also works for OpenAI itself). Only from the
                             environment, because command lines are recorded.
    LLAVA_NPU_JUDGE_PRICES   prices per million prompt and completion tokens, such as 2.5,10

Requests, retries with backoff, and timeouts are those of the `openai` library. The key is sent to that address only
(redirects are not followed) and never written anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_npu.errors import UserError
from llava_npu.files.atomic import write_text
from llava_npu.files.cache import cache_root

if TYPE_CHECKING:
    import openai

URL, MODEL, KEY, PRICES = (f"LLAVA_NPU_JUDGE_{name}" for name in ("URL", "MODEL", "KEY", "PRICES"))
_REFUSED_REQUEST = frozenset({400, 413, 422})  # too long, or filtered; other requests may pass
_MAX_CONSECUTIVE_FAILURES = 3  # requests without a reply, each retried: then the judge is considered down
# Newer OpenAI models reject these. The first has another name there; the second they choose themselves.
_SOMETIMES_REFUSED = ("max_tokens", "temperature")
_MIN_COMPLETION_TOKENS = 4096  # `max_completion_tokens` also limits the reasoning of models that want it
_MAX_MESSAGE = 300  # characters of a server's error that are shown

Message = Mapping[str, str]  # role, content


class JudgeError(Exception):
    """The judge gave no reply after all retries."""


class RefusedError(Exception):
    """The judge's endpoint rejects this request; it may accept others."""


@dataclass(frozen=True)
class JudgeSettings:
    """Where a judge is and how it is asked.

    Attributes:
        url: the endpoint's, without "/chat/completions".
        model: its name there.
        key: sent as a bearer token; "" for none.
        prices: per million prompt and completion tokens; None if unknown.
        timeout: seconds for one reply.
        retries: how often a failed request is repeated, waiting longer each time.
        parallel: concurrent requests.
        cache: folder of replies; an identical request costs nothing.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    prices: tuple[float, float] | None = None
    timeout: float = 120.0
    retries: int = 6
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
    """The judge that the arguments, or else the environment, describe; None without a URL.

    Raises:
        UserError: a URL without a model, a URL that is not http(s), or prices that are not two numbers.
    """
    url = url or os.environ.get(URL)
    model = model or os.environ.get(MODEL)
    if not url:
        if model:
            raise UserError(f"a judge model ({model}) is named, but not its endpoint: give --judge-url or set {URL}.")
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
        key = os.environ.get("OPENAI_API_KEY") or ""  # never sent to anybody else
    return JudgeSettings(url, model, key, _prices(prices or os.environ.get(PRICES)), **more)


def _prices(value: str | None) -> tuple[float, float] | None:
    if not value:
        return None
    try:
        prompt, completion = (float(part) for part in value.split(","))
    except ValueError as error:
        raise UserError(f"judge prices {value!r}: two numbers are expected, as 2.5,10 (per million tokens).") from error
    return prompt, completion


@dataclass(frozen=True)
class Reply:
    """The judge's text, its prompt and completion tokens, and whether it came from the cache."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False


class JudgeClient:
    """Asks a judge. May be used by several threads at once.

    A judge that gave no reply several times in a row, each time after all retries, is down and is not asked again.
    """

    def __init__(self, settings: JudgeSettings):
        """
        Raises:
            UserError: the `openai` library is not installed.
        """
        self.settings = settings
        self.refused_parameters: set[str] = set()
        self._failures = _Failures()
        self._client, self._headers = _connect(settings)

    def ask(self, messages: Sequence[Message], *, temperature: float, max_tokens: int, attempt: int = 0) -> Reply:
        """The judge's reply, from the cache if the same was asked before.

        Args:
            messages: the conversation.
            temperature, max_tokens: of the request.
            attempt: another number asks again for the same.

        Raises:
            UserError: the endpoint refuses to be asked at all (no such model, wrong key, …).
            RefusedError: it rejects this one request.
            JudgeError: no usable reply after all retries.
        """
        request = {
            "model": self.settings.model,
            "messages": [dict(message) for message in messages],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        identity = json.dumps([self.settings.address, request, attempt], sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(identity.encode("utf-8", "backslashreplace")).hexdigest()
        path = self.settings.cache / digest[:2] / f"{digest}.json"
        cached = _read_cached(path)
        if cached is not None:
            return cached
        reply = self._failures.watch(lambda: self._ask_accepted(request))
        kept = {name: value for name, value in asdict(reply).items() if name != "cached"}
        write_text(path, json.dumps(kept) + "\n")
        return reply

    def _ask_accepted(self, request: Mapping[str, Any]) -> Reply:
        """Asks again without the parameters that this model rejects, and remembers them."""
        while True:
            body = self._accepted(request)
            try:
                return self._ask_until_readable(body)
            except RefusedError as error:
                message = str(error)
                refused = {name for name in _SOMETIMES_REFUSED if name in body and f"'{name}'" in message}
                if not refused or "unsupported" not in message.lower():
                    raise
                self.refused_parameters |= refused

    def _accepted(self, request: Mapping[str, Any]) -> dict[str, Any]:
        body = {name: value for name, value in request.items() if name not in self.refused_parameters}
        if "max_tokens" in self.refused_parameters:
            body["max_completion_tokens"] = max(request["max_tokens"], _MIN_COMPLETION_TOKENS)
        return body

    def _ask_until_readable(self, body: Mapping[str, Any]) -> Reply:
        # The library repeats what failed; a proxy's HTML page or an empty reply is a success to it.
        asked = self.settings.retries + 1
        problem = ""
        for _ in range(asked):
            completion = self._ask_once(body)
            try:
                text = completion.choices[0].message.content
                usage = completion.usage
                tokens = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
            except (AttributeError, IndexError, TypeError):
                problem = f"not a chat completion: {str(completion)[:_MAX_MESSAGE]!r}"
                continue
            if isinstance(text, str) and text.strip():
                return Reply(text, *tokens)
            problem = "an empty reply"
        raise JudgeError(f"{problem} (asked {asked} times)")

    def _ask_once(self, body: Mapping[str, Any]) -> Any:
        import openai

        where = f"judge {self.settings.model} at {self.settings.address}"
        asked = f"(asked {self.settings.retries + 1} times)"
        try:
            return self._client.chat.completions.create(**body, extra_headers=self._headers)
        except openai.APIStatusError as error:
            status = error.status_code
            message = f"status {status}: {_server_message(error)}"
            if status in _REFUSED_REQUEST:
                raise RefusedError(f"refused with {message}") from error
            if status >= 500 or status in (408, 409, 425, 429):
                raise JudgeError(f"{message} {asked}") from error
            raise UserError(f"{where} refuses: {message}") from error
        except openai.APIConnectionError as error:  # timeouts are of this kind
            reason = error.__cause__ or error
            raise JudgeError(f"no connection to {self.settings.address}: {reason} {asked}") from error
        except (openai.OpenAIError, ValueError) as error:  # a body that claims to be JSON and is not
            raise JudgeError(f"{where}: {error}") from error


class _Failures:
    """Consecutive requests that got no reply, from all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_a_row = 0

    def watch(self, request: Callable[[], Reply]) -> Reply:
        """The request's result. Raises `JudgeError` without making it once too many have failed."""
        if self._in_a_row >= _MAX_CONSECUTIVE_FAILURES:
            raise JudgeError(f"not asked any more after {_MAX_CONSECUTIVE_FAILURES} requests in a row without a reply")
        try:
            reply = request()
        except JudgeError:
            with self._lock:
                self._in_a_row += 1
            raise
        with self._lock:
            self._in_a_row = 0
        return reply


def _connect(settings: JudgeSettings) -> tuple[openai.OpenAI, dict[str, Any]]:
    """The client, and the headers that it leaves out of every request."""
    try:
        import openai
    except ModuleNotFoundError as error:
        raise UserError("a judge needs the openai library: pip install 'llava-npu[eval]'.") from error
    parts = urllib.parse.urlsplit(settings.url)
    base = parts._replace(path=parts.path.rstrip("/").removesuffix("/chat/completions"), query="", fragment="")
    # The environment's key, organisation and project are OpenAI's business: nothing of them goes to another host.
    omitted = ["OpenAI-Organization", "OpenAI-Project", *([] if settings.key else ["Authorization"])]
    client = openai.OpenAI(
        base_url=base.geturl(),
        api_key=settings.key or "none",
        default_query=dict(urllib.parse.parse_qsl(parts.query)),
        timeout=settings.timeout,
        max_retries=settings.retries,
        http_client=openai.DefaultHttpxClient(follow_redirects=False),
    )
    return client, {name: openai.Omit() for name in omitted}


def _read_cached(path: Path) -> Reply | None:
    try:
        return Reply(**json.loads(path.read_text(encoding="utf-8")), cached=True)
    except (FileNotFoundError, ValueError, TypeError):
        return None  # absent or damaged: asked again and rewritten


def _server_message(error: openai.APIStatusError) -> str:
    return error.response.text.strip()[:_MAX_MESSAGE] or error.response.reason_phrase
