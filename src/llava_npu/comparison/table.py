"""The comparison as a table: for people (Markdown, terminal, page) and for programs (CSV, JSON)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_npu.comparison.folder import Failure
from llava_npu.comparison.results import Estimate, Result, model_name
from llava_npu.evaluation.statistics import bootstrap
from llava_npu.evaluation.statistics.bootstrap import interval_text
from llava_npu.evaluation.statistics.significance import PairedDifference, SeededDifference, p_text
from llava_npu.files.tables import TextTable
from llava_npu.files.untrusted import csv_text, markdown_text

if TYPE_CHECKING:
    from rich.console import RenderableType

NO_VALUE = "–"
HELD_OUT_LOSS = "held-out loss"
_NOT_ON_A_TERMINAL = ("work", "memory", "align memory", "finetune memory", "align speed", "finetune speed")


@dataclass(frozen=True)
class TrialRow:
    """A trial in the table: its result, or why there is none (neither: it has not been run).

    Attributes:
        encoder, projector, varied: which trial.
        result, failure: what came out, or why nothing did.
        folder: of the trial, with its answers; None for a run of another command.
    """

    encoder: str
    projector: str
    varied: Mapping[str, Any]
    result: Result | None
    failure: Failure | None = None
    folder: Path | None = None

    @property
    def name(self) -> str:
        return model_name(self.encoder, self.projector, self.varied)


@dataclass(frozen=True)
class Baseline:
    """A model set against another that answered the same questions (see `pairs`).

    Attributes:
        reference: the other's name.
        differences: the model's value minus the other's, by measure.
    """

    reference: str
    differences: Mapping[str, PairedDifference]


@dataclass(frozen=True)
class MeasureColumn:
    """A column of numbers.

    Attributes:
        title, unit: its head; the unit may be "".
        about: what the number is.
        text: result → what people read.
        number: result → what it sorts by.
        higher_is_better: None where neither is.
    """

    title: str
    unit: str
    about: str
    text: Callable[[Result], str]
    number: Callable[[Result], float | None]
    higher_is_better: bool | None = None


def columns(results: Sequence[Result]) -> list[MeasureColumn]:
    """The columns that these results fill: what a model is worth, then what it costs."""
    found = [
        MeasureColumn(
            "visual tokens", "", "tokens that an image takes in the text; with anyres, one of 640×480 pixels",
            lambda r: f"{r.visual_tokens}", lambda r: r.visual_tokens, higher_is_better=False,
        ),
        *(_benchmark_column(label, results) for label in labels(results)),
        MeasureColumn(
            HELD_OUT_LOSS, "nats per token", "of captions that were not trained on; 95 % interval",
            lambda r: _interval(r.held_out_loss, 1, 2), lambda r: r.held_out_loss.value if r.held_out_loss else None,
            higher_is_better=False,
        ),
        MeasureColumn(
            "first token", "ms", "from a prepared image and a short question to the answer's first token, one at a "
            "time; median and the range of the middle half",
            lambda r: _interval(r.first_token, 1, 0), lambda r: r.first_token.value if r.first_token else None,
            higher_is_better=False,
        ),
        MeasureColumn(
            "projector", "M parameters", "trained in stage 1", lambda r: f"{r.parameters['projector'] / 1e6:.2f}",
            lambda r: r.parameters["projector"],
        ),
        MeasureColumn(
            "work", "GFLOP per image",
            "vision tower, projector, and the language model reading the image's tokens; forward",
            lambda r: f"{sum(r.flops.values()) / 1e9:.1f}", lambda r: sum(r.flops.values()), higher_is_better=False,
        ),
        *(column for stage in ("align", "finetune") for column in _stage_columns(stage)),
        MeasureColumn(
            "memory", "GB", "peak while it answered", lambda r: _bytes(r.inference_memory),
            lambda r: r.inference_memory, higher_is_better=False,
        ),
    ]  # fmt: skip
    return [column for column in found if any(column.number(result) is not None for result in results)]


def labels(results: Sequence[Result]) -> list[str]:
    """The benchmarks, in their order."""
    return list(dict.fromkeys(benchmark.label for result in results for benchmark in result.benchmarks))


def varied_keys(lines: Sequence[TrialRow]) -> list[str]:
    """What varies in addition to encoder and projector."""
    return list(dict.fromkeys(key for line in lines for key in line.varied))


def as_markdown(lines: Sequence[TrialRow]) -> str:
    """The finished trials as a table, and the others as a list."""
    results = [line.result for line in lines if line.result]
    shown, keys = columns(results), varied_keys(lines)
    heads = [f"{column.title}, {column.unit}" if column.unit else column.title for column in shown]
    rows = []
    for line in lines:
        if line.result:
            cells = [column.text(line.result) for column in shown]
            rows.append([line.encoder, line.projector, *(str(line.varied.get(key, "")) for key in keys), *cells])
    header = ["encoder", "projector", *keys, *heads]
    text = TextTable(header, rows, num_names=2 + len(keys)).as_markdown() if results else ""
    others = [f"- {markdown_text(f'{line.name}: {outcome(line)}')}" for line in lines if line.result is None]
    return "\n".join([*([text] if text else []), *([*others, ""] if others else [])])


def differences_as_markdown(lines: Sequence[TrialRow], against: Sequence[Baseline | None]) -> str:
    """Each model's difference to the one that it is compared with; "" if there is none."""
    measures = _compared_measures(against)
    if not measures:
        return ""
    keys = varied_keys(lines)
    rows = []
    for line, other in zip(lines, against, strict=True):
        if other is not None and other.differences:
            names = [line.encoder, line.projector, *(str(line.varied.get(key, "")) for key in keys), other.reference]
            rows.append([*names, *(difference_text(measure, other.differences.get(measure)) for measure in measures)])
    header = ["encoder", "projector", *keys, "compared with", *measures]
    return TextTable(header, rows, num_names=3 + len(keys)).as_markdown()


def difference_text(measure: str, difference: PairedDifference | SeededDifference | None) -> str:
    """A difference with its interval and p, in the unit of the measure's column."""
    if difference is None:
        return NO_VALUE
    p = p_text(difference.p)
    text = bootstrap.difference_text(difference, *scale_and_digits(measure))
    return f"{text}, p {p if p.startswith('<') else '= ' + p}"


def scale_and_digits(measure: str) -> tuple[int, int]:
    """By what a difference in this measure is multiplied where it is shown, and with how many decimals."""
    return (1, 2) if measure == HELD_OUT_LOSS else (100, 1)


def _compared_measures(against: Sequence[Baseline | None]) -> list[str]:
    return list(dict.fromkeys(measure for other in against if other for measure in other.differences))


def as_terminal(lines: Sequence[TrialRow]) -> RenderableType:
    """The numbers that fit a terminal, and why the others are missing."""
    from rich.console import Group
    from rich.text import Text

    results = [line.result for line in lines if line.result]
    shown = [column for column in columns(results) if column.title not in _NOT_ON_A_TERMINAL] if results else []
    several_encoders = len({line.encoder for line in lines}) > 1
    keys = varied_keys(lines)
    heads = ["projector", *(["encoder"] if several_encoders else []), *keys]
    rows = []
    for line in lines:
        if line.result:
            names = [line.projector, *([line.encoder] if several_encoders else [])]
            names += [str(line.varied.get(key, "")) for key in keys]
            rows.append([*names, *(column.text(line.result).replace(" ", "\n") for column in shown)])
    table = TextTable([*heads, *(f"{column.title}\n{column.unit}" for column in shown)], rows, num_names=len(heads))
    others = [Text(f"{line.name}: {outcome(line)}", style="yellow") for line in lines if line.result is None]
    return Group(*([table.as_terminal()] if results else []), *others)


def outcome(line: TrialRow) -> str:
    """Why a line has no numbers."""
    if line.failure is None:
        return "not run yet"
    return f"{line.failure.kind}: {line.failure.reason}"


def as_csv(lines: Sequence[TrialRow], against: Sequence[Baseline | None]) -> str:
    """One row a trial, in plain units: parameters, FLOP, nats, milliseconds, bytes; scores as in 0 … 1."""
    keys = varied_keys(lines)
    records = [_record(line, keys) | _compared(other) for line, other in zip(lines, against, strict=True)]
    heads = list(dict.fromkeys(key for record in records for key in record))
    return csv_text(heads, ([record.get(head, "") for head in heads] for record in records))


def _record(line: TrialRow, keys: Sequence[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"encoder": line.encoder, "projector": line.projector}
    record |= {key: line.varied.get(key, "") for key in keys}
    record["outcome"] = "finished" if line.result else outcome(line)
    if line.result is None:
        return record
    result = line.result
    record |= {"seed": result.seed, "visual_tokens": result.visual_tokens}
    record |= {f"{part}_parameters": count for part, count in result.parameters.items()}
    record |= {f"{part}_flops_per_image": count for part, count in result.flops.items()}
    for name, stage in result.stages.items():
        record |= {f"{name}_{key}": value for key, value in vars(stage).items()}
    record |= _columns_of("held_out_loss", result.held_out_loss)
    for benchmark in result.benchmarks:
        record |= {**_columns_of(benchmark.label, benchmark.score), f"{benchmark.label}_metric": benchmark.metric}
    record |= _columns_of("first_token_ms", result.first_token)
    return record | {"inference_memory": result.inference_memory, "device": result.device, "dtype": result.dtype}


def _compared(against: Baseline | None) -> dict[str, Any]:
    if against is None:
        return {}
    record: dict[str, Any] = {"compared_with": against.reference}
    for measure, each in against.differences.items():
        name = "held_out_loss" if measure == HELD_OUT_LOSS else measure
        numbers = {"": each.value, "_low": each.low, "_high": each.high, "_p": each.p}
        record |= {f"{name}_difference{end}": number for end, number in numbers.items()}
    return record


def _columns_of(name: str, value: Estimate | None) -> dict[str, Any]:
    if value is None:
        return {}
    return {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high, f"{name}_count": value.count}


def _stage_columns(stage: str) -> list[MeasureColumn]:
    def of(result: Result, attribute: str) -> float | None:
        found = result.stages.get(stage)
        value: float | None = getattr(found, attribute) if found else None
        return value

    return [
        MeasureColumn(
            f"{stage} speed", "tokens/s", "median over the steps; images count as the tokens they take",
            lambda r: _number(of(r, "tokens_per_second"), 0), lambda r: of(r, "tokens_per_second"),
            higher_is_better=True,
        ),
        MeasureColumn(
            f"{stage} speed", "samples/s", "the same in conversations",
            lambda r: _number(of(r, "samples_per_second"), 1), lambda r: of(r, "samples_per_second"),
            higher_is_better=True,
        ),
        MeasureColumn(
            f"{stage} loss", "nats per token", "mean over the last tenth of the steps",
            lambda r: _number(of(r, "loss"), 2), lambda r: of(r, "loss"), higher_is_better=False,
        ),
        MeasureColumn(
            f"{stage} memory", "GB", "peak while training", lambda r: _bytes(of(r, "peak_memory")),
            lambda r: of(r, "peak_memory"), higher_is_better=False,
        ),
    ]  # fmt: skip


def _benchmark_column(label: str, results: Sequence[Result]) -> MeasureColumn:
    def score(result: Result) -> Estimate | None:
        benchmark = result.benchmark(label)
        return benchmark.score if benchmark else None

    metrics = dict.fromkeys(b.metric for r in results if (b := r.benchmark(label)))
    chances = {b.chance for r in results if (b := r.benchmark(label)) and b.chance is not None}
    guess = f"; guessing: {100 * min(chances):.1f} %" if chances else ""
    most = max((b.unanswered for r in results if (b := r.benchmark(label))), default=0)
    lost = f"; questions without an answer, for an error, count as wrong: up to {most} in a model" if most else ""
    return MeasureColumn(
        label, "%", f"{' / '.join(metrics)}; 95 % interval{guess}{lost}",
        lambda r: _interval(score(r), 100, 1), lambda r: value.value if (value := score(r)) else None,
        higher_is_better=True,
    )  # fmt: skip


def _interval(value: Estimate | None, scale: float, digits: int) -> str:
    return NO_VALUE if value is None else interval_text(value, scale, digits)


def _number(value: float | None, digits: int) -> str:
    return NO_VALUE if value is None else f"{value:,.{digits}f}"


def _bytes(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value / 1e9:.1f}"
