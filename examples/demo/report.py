"""The demo's report: one page with pictures, a table, plots, and the same numbers as Markdown and JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from demo.assets import Asset
from demo.measure import Value
from demo.profiles import Profile
from demo.questions import CONCEPTS, SHAPES
from llava_npu.evaluation.ablations import GIVEN, NONE, SHUFFLED
from llava_npu.files.atomic import write_text
from llava_npu.files.pages import render_page
from llava_npu.training.monitoring.metrics import read_metrics
from llava_npu.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

STATES = ("untrained", "aligned", "tuned")
LOSS = "loss of held-out captions"
CAPTIONING, ANSWERING, BY_LETTER = "choosing the caption of held-out concepts", "answering", "answering by letter"
IMAGES = {GIVEN: "its picture", SHUFFLED: "a wrong picture", NONE: "no picture"}
TOWER_NOTE = (
    "The vision tower is a ResNet-50 trained to classify ImageNet, not CLIP: it has never been shown any text. The "
    "language model has 135 million parameters. Published LLaVA models are fifty times as large and see a thousand "
    "times as much data; what this demo shows is that the whole way works and learns, not how well it can work."
)


@dataclass(frozen=True)
class Example:
    """One question, and what each state of the model made of it.

    Attributes:
        image: the encoded picture.
        question, options, right: as asked; `right` is a letter.
        part: of the benchmark.
        answers: state → letter of the likeliest answer.
        said: state → what the model says is in the picture.
    """

    image: bytes
    question: str
    options: dict[str, str]
    right: str
    part: str
    answers: dict[str, str | None]
    said: dict[str, str]


@dataclass(frozen=True)
class Line:
    """A line of the table: a measure under one kind of pictures, for each state.

    Attributes:
        measure, images: what was measured, with which pictures.
        chance: of guessing, where there is such a thing.
        percent: whether the values are shares.
        values: state → value; None where it was not measured.
    """

    measure: str
    images: str
    chance: float | None
    percent: bool
    values: dict[str, Value | None]

    def cell(self, state: str) -> str:
        value = self.values[state]
        if value is None:
            return "–"
        scale, digits = (100, 1) if self.percent else (1, 2)
        low, middle, high = (f"{scale * number:.{digits}f}" for number in (value.low, value.value, value.high))
        return f"{middle} ({low}–{high})"


@dataclass(frozen=True)
class Findings:
    """Everything that the report shows."""

    profile: Profile
    seed: int
    device: str
    measured: dict[str, Any]
    split: dict[str, Any]
    examples: Sequence[Example]
    losses: dict[str, Path]
    assets: Sequence[Asset]
    lost: dict[str, str]
    seconds: dict[str, float]
    peak_memory: int

    def lines(self) -> list[Line]:
        """The table."""
        lines = [
            Line(LOSS, images, None, False, {state: self._of(state, "caption loss", images) for state in STATES})
            for images in (GIVEN, SHUFFLED)
        ]
        lines += self._choices(CAPTIONING, "captioning", CONCEPTS, (GIVEN, SHUFFLED))
        for part in (CONCEPTS, SHAPES):
            lines += self._choices(f"{ANSWERING} about {part}", "answering", part, (GIVEN, SHUFFLED, NONE))
        if "letters" in self.measured["tuned"]:
            for part in (CONCEPTS, SHAPES):
                lines += self._choices(f"{BY_LETTER} about {part}", "letters", part, (GIVEN, SHUFFLED, NONE))
                lines += self._choices(f"{BY_LETTER} about {part}, circular", "letters", part, (GIVEN,), "circular")
        return lines

    def verdicts(self) -> list[tuple[bool, str]]:
        """Whether each thing that the demo is to show was shown, in words with its numbers."""
        table = {(line.measure, line.images): line for line in self.lines()}
        verdicts = []
        for state in ("aligned", "tuned"):
            right, wrong = (table[LOSS, images].values[state] for images in (GIVEN, SHUFFLED))
            assert right is not None
            assert wrong is not None
            text = f"{right.value:.2f} nats per token with the right picture, {wrong.value:.2f} with a wrong one."
            verdicts.append((right.high < wrong.low, f"{LOSS}, {state}: {text}"))
        for measure, state in (
            (CAPTIONING, "aligned"),
            (f"{ANSWERING} about {CONCEPTS}", "tuned"),
            (f"{ANSWERING} about {SHAPES}", "tuned"),
        ):
            real = table[measure, GIVEN]
            value = real.values[state]
            assert value is not None
            assert real.chance is not None
            rivals = {"chance": real.chance}
            for images in (SHUFFLED, NONE):
                baseline = table[measure, images].values[state] if (measure, images) in table else None
                if baseline is not None:
                    rivals[IMAGES[images]] = baseline.value
            excluded = all(value.low > rival for rival in rivals.values())
            against = ", ".join(f"{name} {100 * rival:.1f}" for name, rival in rivals.items())
            text = f"{real.cell(state)} % with its picture; {against}. The 95 % interval "
            text += "excludes all of these." if excluded else "does not exclude all of these."
            verdicts.append((excluded, f"{measure}, {state}: {text}"))
        return verdicts

    def next_commands(self, output: Path) -> list[tuple[str, str]]:
        """What to try next, as (what, command)."""
        model = output / "finetune" / "model"
        picture = next((output / "data" / "images" / "stamps").rglob("*.png"), None)
        picture = picture or next((output / "data" / "images").rglob("*.png"), Path("picture.png"))
        return [
            ("talk to it", f'llava-npu chat --model {model} --image {picture} --prompt "What is in the picture?"'),
            (
                "see what it was trained on, supervised tokens marked",
                f"llava-npu data inspect {output}/data/finetune.json --tokenizer {model} --template tokenizer",
            ),
            (
                "train longer, from the command line",
                f"llava-npu train {output}/align.yaml max_steps=400 epochs=20 output={output}/align-longer",
            ),
            (
                "another projector",
                f"llava-npu train {output}/align.yaml model.projector=mlp2x_gelu model.projector_options={{}} "
                f"output={output}/align-mlp",
            ),
            (
                "evaluate on your own questions (a .tsv in MMBench's form)",
                f"llava-npu eval multiple_choice --model {model} --data QUESTIONS.tsv --output {output}/my-evaluation",
            ),
        ]

    def as_terminal(self) -> RenderableType:
        """Table and verdicts for a rich console."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("", "with", "chance", *STATES, title="percent, or nats per token; 95 % interval")
        for line in self.lines():
            table.add_row(line.measure, IMAGES[line.images], _chance(line), *(line.cell(state) for state in STATES))
        said = [
            Text(f"{'✓' if shown else '✗'} {text}", style="green" if shown else "red")
            for shown, text in self.verdicts()
        ]
        return Group(table, *said)

    def as_markdown(self, output: Path) -> str:
        """The numbers as a page."""
        rows = [
            [line.measure, IMAGES[line.images], _chance(line), *(line.cell(state) for state in STATES)]
            for line in self.lines()
        ]
        header = ["", "with", "chance", *STATES]
        lines = [
            f"# LLaVA-NPU demo: {self.profile.name}",
            "",
            TOWER_NOTE,
            "",
            *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)),
            "",
            "Percent (or nats per token) with the 95 % interval (bootstrap over questions).",
            "",
            *(f"- {'yes' if shown else 'NO'}: {text}" for shown, text in self.verdicts()),
            "",
            f"Device: {self.device}. Peak host memory: {self.peak_memory / 1e9:.1f} GB. Seed {self.seed}.",
            "",
            *(f"- {name}: {seconds:.0f} s" for name, seconds in self.seconds.items()),
            "",
            "## Sources",
            "",
            *(f"- {asset.name} ({asset.command}): {asset.purpose}. {asset.licence}." for asset in self.assets),
            *(f"- without {name}: {reason}" for name, reason in self.lost.items()),
            "",
            "## What to try next",
            "",
            *(f"- {what}: `{command}`" for what, command in self.next_commands(output)),
            "",
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The numbers for programs."""
        return {
            "version": __version__,
            "profile": asdict(self.profile),
            "seed": self.seed,
            "device": self.device,
            "measured": self.measured,
            "shown": [{"shown": shown, "text": text} for shown, text in self.verdicts()],
            "split": self.split,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "lost": self.lost,
        }

    def _choices(
        self, name: str, measure: str, part: str, kinds: Sequence[str], metric: str = "unrotated"
    ) -> list[Line]:
        # Of circular accuracy there is no one chance: it depends on how rotations of a question hang together.
        chance = {CONCEPTS: 1 / 4, SHAPES: (1 / 4 + 1 / 3) / 2}[part] if metric == "unrotated" else None
        return [
            Line(
                name, images, chance, True, {state: self._of(state, measure, images, part, metric) for state in STATES}
            )
            for images in kinds
        ]

    def _of(self, state: str, *path: str) -> Value | None:
        found = self.measured[state]
        for key in path:
            found = found.get(key)
            if found is None:
                return None
        return Value(**found)


def write_report(findings: Findings, output: Path) -> Path:
    """Writes report.html, results.md, results.json and the plots; returns the page."""
    plots = {"losses": _plot_losses(findings), "accuracy": _plot_accuracy(findings)}
    for name, data in plots.items():
        (output / f"{name}.png").write_bytes(data)
    write_text(output / "results.json", json.dumps(findings.as_json(), indent=1, ensure_ascii=False) + "\n")
    write_text(output / "results.md", findings.as_markdown(output))
    page = output / "report.html"
    write_text(page, _render(findings, plots, output))
    return page


def _render(findings: Findings, plots: dict[str, bytes], output: Path) -> str:
    return render_page(
        Path(__file__).parent,
        "report.html",
        title=f"LLaVA-NPU demo: {findings.profile.name}",
        findings=findings,
        states=STATES,
        images=IMAGES,
        tower_note=TOWER_NOTE,
        plots={name: _data_url("png", data) for name, data in plots.items()},
        as_jpeg=_as_jpeg,
        chance=_chance,
        commands=findings.next_commands(output),
        version=__version__,
    )


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _as_jpeg(encoded: bytes) -> str:
    with Image.open(io.BytesIO(encoded)) as image:
        small = io.BytesIO()
        image.convert("RGB").save(small, "JPEG", quality=85)
    return _data_url("jpeg", small.getvalue())


def _plot_losses(findings: Findings) -> bytes:
    figure, axes = _figure(len(findings.losses))
    for axis, (stage, folder) in zip(axes, findings.losses.items(), strict=True):
        metrics = read_metrics(folder)
        steps, losses = [each["step"] for each in metrics], [each["loss"] for each in metrics]
        axis.plot(steps, losses, alpha=0.35, linewidth=1)
        axis.plot(steps, _smooth(losses), linewidth=2)
        axis.set(title=f"{stage}: training loss", xlabel="step", ylabel="nats per token")
        axis.grid(alpha=0.3)
    return _png(figure)


def _plot_accuracy(findings: Findings) -> bytes:
    table = {(line.measure, line.images): line for line in findings.lines()}
    measures = list(dict.fromkeys(m for m, images in table if images == SHUFFLED))
    figure, axes = _figure(len(measures))
    for axis, measure in zip(axes, measures, strict=True):
        for place, state in enumerate(STATES):
            for shift, (images, label) in enumerate(IMAGES.items()):
                line = table.get((measure, images))
                value = line.values[state] if line else None
                if line is None or value is None:
                    continue
                scale = 100 if line.percent else 1
                errors = [[scale * (value.value - value.low)], [scale * (value.high - value.value)]]
                position = place + (shift - 1) * 0.27
                axis.bar(position, scale * value.value, 0.25, yerr=errors, capsize=3, color=f"C{shift}", label=label)
        line = table[measure, GIVEN]
        if line.chance is not None:
            axis.axhline(100 * line.chance, color="grey", linestyle=":", label="chance")
        labels = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axis.legend(labels.values(), labels.keys(), fontsize=8)
        axis.set_xticks(range(len(STATES)), STATES)
        axis.set_title(measure, fontsize=10)
        axis.set_ylabel("%" if line.percent else "nats per token")
    return _png(figure)


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    smooth, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        smooth.append(total / mass)
    return smooth


def _chance(line: Line) -> str:
    return "–" if line.chance is None else f"{100 * line.chance:.0f}"
