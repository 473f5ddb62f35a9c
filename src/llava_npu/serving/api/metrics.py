"""What the server counts, in Prometheus's form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llava_npu.inference.engine import InferenceEngine

_KNOWN_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/models",
        "/health",
        "/metrics",
        "/worker_generate_stream",
        "/worker_get_status",
        "/list_models",
        "/get_worker_address",
        "/refresh_all_workers",
    }
)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "llava_npu_requests", "Requests by path and status", ["path", "status"], registry=self._registry
        )
        self._answers = Counter(
            "llava_npu_answers", "Answers by the reason of their end", ["reason"], registry=self._registry
        )
        self._prompt_tokens = Counter("llava_npu_prompt_tokens", "Tokens read", registry=self._registry)
        self._answer_tokens = Counter("llava_npu_answer_tokens", "Tokens written", registry=self._registry)
        self._running = Gauge("llava_npu_answers_running", "Answers in the making", registry=self._registry)
        self._waiting = Gauge("llava_npu_answers_waiting", "Answers that wait", registry=self._registry)
        self._batch = Histogram(
            "llava_npu_step_answers",
            "Answers that shared a step",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self._registry,
        )
        self._first = Histogram(
            "llava_npu_time_to_first_token_seconds",
            "From arrival to the first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._whole = Histogram(
            "llava_npu_answer_seconds", "From arrival to the end", buckets=_SECONDS, registry=self._registry
        )

    def count_request(self, path: str, status: int) -> None:
        # Paths that nobody serves are counted as one: names come from outside, and each would stay for ever.
        self._requests.labels(path if path in _KNOWN_PATHS else "other", str(status)).inc()

    def observe_step(self, engine: InferenceEngine) -> None:
        self._running.set(engine.num_running)
        self._waiting.set(engine.num_waiting)
        if engine.num_running:
            self._batch.observe(engine.num_running)

    def observe_first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def observe_answer(self, reason: str, prompt_tokens: int, answer_tokens: int, seconds: float) -> None:
        self._answers.labels(reason).inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._answer_tokens.inc(answer_tokens)
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """All of them, in Prometheus's text form."""
        return generate_latest(self._registry)
