"""What a model of the demo is asked before and after each stage, and the numbers that come out.

caption loss    mean loss of the held-out captions (template `plain`), with the right picture and with a wrong one.
captioning      multiple choice: the likeliest option as the picture's caption (template `plain`). It asks for no
                obedience, so it shows what the projector has learned.
answering       multiple choice: the likeliest option as the assistant's answer to the question, in conversation.
letters         multiple choice as published benchmarks are run: the prompt shows the options, the model writes, its
                answer's letter is read. Only where training had such questions.
Baselines: a wrong picture, and no picture at all (where a template allows it).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demo.data import DemoData
from demo.questions import CONCEPTS, SHAPES, WHAT
from llava_npu.data.records import load_records
from llava_npu.devices import Device
from llava_npu.evaluation import run as runner
from llava_npu.evaluation.ablations import GIVEN, SHUFFLED
from llava_npu.evaluation.answering import ChooseLikeliest, GenerateText, ModelAnswerer
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.caption_loss import caption_loss
from llava_npu.evaluation.predictions import read_predictions
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.run_folder import PREDICTIONS_FILE
from llava_npu.evaluation.statistics.accuracy import CIRCULAR, EVERY_ROTATION, VANILLA, Score
from llava_npu.files.atomic import write_text
from llava_npu.inference.features import FeatureCache
from llava_npu.models.loaded import LoadedModel

BENCHMARK = "mmbench"
METRICS = {"unrotated": VANILLA, "every rotation": EVERY_ROTATION, "circular": CIRCULAR}
_LONGEST_ANSWER = 8  # tokens of an answer to a multiple-choice question
_LONGEST_CAPTION = 16
_BATCH = 16  # questions at once


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval, of `count` questions or records."""

    value: float
    low: float
    high: float
    count: int


def measure(
    loaded: LoadedModel,
    data: DemoData,
    output: Path,
    wanted: Mapping[str, Sequence[str]],
    device: Device,
    features: FeatureCache,
    on_progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Measures one model; what an interrupted run has measured already is not measured again.

    Args:
        loaded: the model, as `llava_npu.load` returns it.
        data: the demo's data folder.
        output: folder of this model's predictions and `measured.json`.
        wanted: measure → kinds of pictures ("given", "shuffled", "none"); the caption loss needs no naming.
        device: where the model is.
        features: of the pictures; the tower is frozen, so all stages share them.
        on_progress: told what is measured, how much is done, of how much.

    Returns:
        what `measured.json` holds: measure → kind of pictures → value, or (multiple choice) part → metric → value.
    """
    found = output / "measured.json"
    if found.is_file():
        return dict(json.loads(found.read_text(encoding="utf-8")))
    captioner = loaded.with_template("plain")

    def ask(
        measure: str, speaker: LoadedModel, method: ChooseLikeliest | GenerateText, images: str, file: Path
    ) -> dict[str, dict[str, Any]]:
        name = f"{measure}, {images}"
        report = runner.evaluate(
            BENCHMARK,
            file,
            ModelAnswerer(speaker, method, device.name, features),
            output / f"{measure}-{images}",
            runner.EvaluationOptions(
                images=images,
                batch_size=_BATCH,
                page=False,  # the demo has a report of its own
                on_progress=lambda progress: on_progress(name, progress.done, progress.total),
            ),
        )
        return _by_part(report.scores)

    measured: dict[str, Any] = {"caption loss": {}}
    records = load_records(data.held_out_captions)
    for number, images in enumerate((GIVEN, SHUFFLED), start=1):
        loss = caption_loss(captioner, records, images, batch_size=_BATCH, features=features)
        measured["caption loss"][images] = asdict(Value(loss.value, loss.low, loss.high, loss.num_records))
        on_progress("caption loss", number, 2)
    likeliest, written = ChooseLikeliest("text"), GenerateText(_LONGEST_ANSWER)
    ways: dict[str, tuple[LoadedModel, ChooseLikeliest | GenerateText]] = {
        "captioning": (captioner, likeliest),
        "answering": (loaded, likeliest),
        "letters": (loaded, written),
    }
    for measure, kinds in wanted.items():
        # A written letter depends on the options' order: with its picture, every rotation is asked.
        files = {
            images: data.benchmark if (measure, images) == ("letters", GIVEN) else data.unrotated for images in kinds
        }
        measured[measure] = {images: ask(measure, *ways[measure], images, file) for images, file in files.items()}
    write_text(found, json.dumps(measured, indent=1) + "\n")
    return measured


def chosen(output: Path, measure: str) -> dict[str, str | None]:
    """Which letter each question was answered with, its picture given: question id → letter."""
    predictions, _ = read_predictions(output / f"{measure}-{GIVEN}" / PREDICTIONS_FILE)
    return {each.id: each.parsed.get("strict") for each in predictions}


def describe(
    loaded: LoadedModel, questions: Sequence[Question], features: FeatureCache, template: str | None = None
) -> list[str]:
    """What the model says is in the pictures of these questions, in its own words.

    Args:
        template: None asks in conversation; "plain" lets it write a caption.
    """
    speaker = loaded.with_template(template)
    open_questions = [Question(id=each.id, text=WHAT, prompt=WHAT, images=each.images) for each in questions]
    answers = ModelAnswerer(speaker, GenerateText(_LONGEST_CAPTION), features=features).answer(open_questions)
    return [answer.text for answer in answers]


def questions_of(data: DemoData) -> list[Question]:
    """The benchmark's questions, unrotated."""
    return list(get(BENCHMARK).read(data.unrotated).questions)


def _by_part(scores: tuple[Score, ...]) -> dict[str, dict[str, Any]]:
    """Part of the benchmark → metric → value, by the strict rule."""
    parts: dict[str, dict[str, Any]] = {}
    for score in scores:
        if score.extraction == "strict" and score.level == "l2-category" and score.name in (CONCEPTS, SHAPES):
            name = next((ours for ours, theirs in METRICS.items() if theirs == score.metric), None)
            if name is not None:
                value = Value(score.value, score.low, score.high, score.count)
                parts.setdefault(score.name, {})[name] = asdict(value)
    return parts
