"""What came out of a trial: the numbers that tables, plots and pages show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from llava_npu.evaluation.reports.samples import ScoreName
from llava_npu.evaluation.statistics.accuracy import OVERALL, Score


def model_name(encoder: str, projector: str, varied: Mapping[str, Any]) -> str:
    """What a model is called in tables, plots and messages."""
    return " · ".join([encoder, projector, *(f"{key}={value}" for key, value in varied.items())])


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, of `count` questions, records or repetitions."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, score: Score) -> Estimate:
        return cls(score.value, score.low, score.high, score.count)


@dataclass(frozen=True)
class StageResult:
    """One stage of training.

    Attributes:
        steps: optimizer steps.
        loss: nats per supervised token, the mean over the last tenth of the steps.
        tokens_per_second, samples_per_second: over all steps but the first; images count as the tokens they take.
        peak_memory: bytes, of the device (on a CPU: of the process); None if the stage was not watched to its end.
    """

    steps: int
    loss: float
    tokens_per_second: float
    samples_per_second: float
    peak_memory: int | None


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark's score.

    Attributes:
        label: as tables call it.
        metric: which of its metrics, by which rule of extraction, of which part.
        score: in 0 … 1 (some metrics go beyond), with its interval.
        chance: what guessing would score, where the metric lets one say.
        folder: of the predictions.
        unanswered: questions that got an error in place of an answer, and count as wrong.
    """

    label: str
    metric: str
    score: Estimate
    chance: float | None
    folder: str
    unanswered: int = 0


@dataclass(frozen=True)
class SampleOutput:
    """What the model made of one image: its answer to the benchmark's question, and its own words."""

    question: str
    answer: str
    right: bool | None
    words: str


@dataclass(frozen=True)
class Result:
    """A finished trial.

    Attributes:
        encoder, projector, varied, seed: which trial.
        visual_tokens: tokens that an image takes in the text (with anyres, one of 640×480 pixels).
        parameters: of "vision_tower", "projector" and "language_model".
        flops: of one image through each of these (the language model reads its visual tokens), forward.
        stages: "align" and, if there was one, "finetune".
        held_out_loss: nats per token on held-out captions.
        benchmarks: scores, in the configuration's order.
        first_token: milliseconds from a prepared image and a short question to the first token of the answer:
            median, and the range of the middle half.
        inference_memory: peak bytes while it was measured.
        outputs: of the example images.
        device, dtype, versions: where and with what it was measured.
        runs: the resolved configuration of each stage.
    """

    encoder: str
    projector: str
    varied: Mapping[str, Any]
    seed: int
    visual_tokens: int
    parameters: Mapping[str, int]
    flops: Mapping[str, int]
    stages: Mapping[str, StageResult]
    held_out_loss: Estimate | None
    benchmarks: tuple[BenchmarkResult, ...]
    first_token: Estimate | None
    inference_memory: int | None
    outputs: tuple[SampleOutput, ...]
    device: str
    dtype: str
    versions: Mapping[str, str]
    runs: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return model_name(self.encoder, self.projector, self.varied)

    def benchmark(self, label: str) -> BenchmarkResult | None:
        return next((each for each in self.benchmarks if each.label == label), None)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        return _RESULT.validate_python(values)


_RESULT = TypeAdapter(Result)


def metric_label(score: Score | ScoreName) -> str:
    """Which of a benchmark's scores it is: metric, rule and, but for the overall one, part."""
    return ", ".join([score.metric, score.extraction, *([score.name] if score.level != OVERALL else [])])
