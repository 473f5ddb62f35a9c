"""One trial, in a process of its own: trained, measured, its result written. Run again, it resumes where it stopped.

A process for each trial: memory is counted from zero, and a trial that dies takes no other with it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llava_npu import devices
from llava_npu.comparison import measures
from llava_npu.comparison.examples import example_questions
from llava_npu.comparison.folder import (
    DELETE,
    EVALUATION,
    HELD_OUT,
    PARTS,
    Failure,
    Measured,
    read_result,
    read_trial,
    write_failure,
    write_result,
)
from llava_npu.comparison.grid import Trial
from llava_npu.comparison.measures import StoredFeatures
from llava_npu.comparison.results import BenchmarkResult, Estimate, Result, SampleOutput, metric_label
from llava_npu.config import RunConfig
from llava_npu.config.comparison import BenchmarkConfig
from llava_npu.config.parts import StageName
from llava_npu.data.records import load_records
from llava_npu.devices import Device
from llava_npu.distributed import launched
from llava_npu.distributed.interruption import EXIT_STATUS, RunStopped
from llava_npu.errors import UserError, nearest
from llava_npu.evaluation import run as runner
from llava_npu.evaluation.answering import GenerateText, ModelAnswerer, build_answerer
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.caption_loss import caption_loss
from llava_npu.evaluation.formats.datasets import read_dataset
from llava_npu.evaluation.predictions import read_predictions
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.reports.samples import write_samples
from llava_npu.evaluation.run_folder import PREDICTIONS_FILE, versions
from llava_npu.evaluation.statistics.accuracy import EVERY_ROTATION, OVERALL, VANILLA, Score
from llava_npu.files.atomic import write_text
from llava_npu.files.console import SafeConsole
from llava_npu.files.json_objects import read_json
from llava_npu.inference.features import FeatureCache
from llava_npu.models import load
from llava_npu.models.loaded import LoadedModel
from llava_npu.planning.check import choose_recomputation, refuse_what_cannot_fit
from llava_npu.training import train
from llava_npu.training.parts import STAGE_TEMPLATES
from llava_npu.training.resolve import ResolvedRun
from llava_npu.training.trainer import build_model

_LONGEST_DESCRIPTION = 20  # tokens
_BATCH = 16
CAPTIONS = "plain"  # the template under which captions are scored, whatever the last stage was trained with


def main() -> int:
    """The worker: `python -m llava_npu.comparison.trial FOLDER --device npu:1`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    try:
        run_trial(arguments.folder, arguments.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        write_failure(
            arguments.folder, Failure("impossible" if _is_impossible(arguments.folder) else "failed", str(error))
        )
        return 2
    except RunStopped as stopped:  # not a failure: the trial resumes with the comparison
        print(stopped, file=sys.stderr)
        return EXIT_STATUS
    except Exception as error:  # noqa: BLE001  one trial's accident is reported, the others continue
        traceback.print_exc()
        write_failure(arguments.folder, Failure("failed", f"{type(error).__name__}: {error}"))
        return 1
    return 0


def run_trial(folder: Path, device_name: str) -> Result | None:
    """Trains and measures the trial in `folder`; what is there already is not done again.

    Of several processes that train it together, the first one measures it, alone; the others return None.
    """
    trial, measured = read_trial(folder)
    device = devices.select(device_name)
    console = SafeConsole(file=sys.stderr, width=160)
    peaks = {run.stage: _train(run, device_name, device, trial.folder, console) for run in _runs(trial)}

    if launched.rank() != 0:
        # A process that left now would close connections that others may still be reading from. If the first one fails,
        # the launcher ends this one.
        while read_result(folder, measured) is None:
            time.sleep(1)
        return None

    result = _measure(folder, device, peaks, console)
    write_result(folder, result, measured)
    return result


def _measure(folder: Path, device: Device, peaks: Mapping[StageName, int], console: Console) -> Result:
    """What is to be known of the trained model; `peaks`: bytes, of each stage."""
    trial, measured = read_trial(folder)
    dtype = device.autocast_dtype or torch.float32
    device.reset_peak_memory()
    loaded = load(trial.last.output, device.torch_device, dtype)
    trained_with = trial.last.data.template or STAGE_TEMPLATES[trial.last.stage]
    prompted = loaded.with_template(trained_with)
    features = StoredFeatures(loaded) if measured.share_features else FeatureCache(loaded)
    benchmarks = []
    for number, (benchmark, _) in enumerate(measured.benchmarks):
        console.print(f"measuring {benchmark.label or benchmark.name}")
        output = folder / EVALUATION / f"{number}-{benchmark.name}"
        benchmarks.append(_evaluate(benchmark, prompted, features, device, output))
    loss = None
    if measured.held_out is not None:
        held_out, captioning = measured.held_out, loaded.with_template(CAPTIONS)
        loss = _once(
            folder / PARTS / "held_out.json",
            list(held_out),
            lambda: _held_out(*held_out, folder / HELD_OUT, captioning, features),
        )
    console.print("measuring examples, latency")
    outputs = _once(
        folder / PARTS / "outputs.json",
        measured.identity(),
        lambda: _describe(measured, benchmarks, prompted, features),
    )
    latency = _once(folder / PARTS / "first_token.json", None, lambda: vars(measures.first_token(loaded, device)))
    return Result(
        encoder=trial.encoder,
        projector=trial.projector,
        varied=trial.varied,
        seed=trial.align.seed,
        visual_tokens=measures.visual_tokens(loaded.model),
        parameters=measures.parameters(loaded.model),
        flops=measures.flops_per_image(loaded.model),
        stages={run.stage: measures.stage_result(run.output_path, peaks[run.stage]) for run in _runs(trial)},
        held_out_loss=Estimate(**loss) if loss else None,
        benchmarks=tuple(benchmarks),
        first_token=Estimate(**latency),
        inference_memory=device.memory().peak,
        outputs=tuple(SampleOutput(**each) for each in outputs),
        device=device.name,
        dtype=str(dtype).removeprefix("torch."),
        versions=versions(),
        runs={run.stage: run.model_dump(mode="json") for run in _runs(trial)},
    )


def _is_impossible(folder: Path) -> bool:
    """Whether the trial's parts do not fit each other, so that no model can be trained: asked once it has failed."""
    try:
        build_model(read_trial(folder)[0].align)
    except UserError:
        return True
    return False


def _runs(trial: Trial) -> list[RunConfig]:
    return [run for run in (trial.align, trial.finetune) if run is not None]


def _train(run: RunConfig, device_name: str, device: Device, folder: Path, console: Console) -> int:
    """Trains one stage; returns its peak memory."""
    part = folder / PARTS / f"{run.stage}.json"
    if part.is_file():
        return int(read_json(part, advice=DELETE)["peak_memory"])
    device.reset_peak_memory()
    resolved = choose_recomputation(ResolvedRun(run.model_copy(update={"device": device_name})), launched.world_size())
    if (outcome := refuse_what_cannot_fit(resolved, launched.world_size())) is not None:
        console.print(outcome)
    train(resolved, console=console)
    peak = device.memory().peak
    device.empty_cache()
    if launched.rank() == 0:
        write_text(part, json.dumps({"peak_memory": peak}) + "\n")
    return peak


def _evaluate(
    benchmark: BenchmarkConfig, loaded: LoadedModel, features: FeatureCache, device: Device, output: Path
) -> BenchmarkResult:
    known = get(benchmark.name)
    answerer = build_answerer(
        benchmark.answer,
        loaded.with_template(benchmark.template),
        max_new_tokens=benchmark.max_new_tokens or known.max_new_tokens,
        device=device.name,
        features=features,
    )
    report = runner.evaluate(
        known,
        benchmark.data,
        answerer,
        output,
        runner.EvaluationOptions(images=benchmark.images, batch_size=benchmark.batch_size),
    )
    if report.num_errors == report.num_questions:  # a score of 0 would say something about the model
        raise UserError(
            f"benchmarks: {benchmark.name}: none of the questions could be answered; see {output}/report.md."
        )
    score = choose_score(report.scores, benchmark)
    label, chance = benchmark.label or benchmark.name, chance_of(benchmark, score.metric)
    return BenchmarkResult(label, metric_label(score), Estimate.of(score), chance, str(output), report.num_errors)


def chance_of(benchmark: BenchmarkConfig, metric: str) -> float | None:
    """What guessing scores among the options shown; None where that depends on more than the options."""
    if metric not in (VANILLA, EVERY_ROTATION):
        return None
    questions = read_dataset(get(benchmark.name), Path(benchmark.data)).questions
    shown = [
        question
        for question in questions
        if question.options
        and (metric == EVERY_ROTATION or not question.rotation)
        and benchmark.part in (None, question.category, question.l2_category)
    ]
    return sum(1 / len(question.options) for question in shown) / len(shown) if shown else None


def choose_score(scores: Sequence[Score], benchmark: BenchmarkConfig) -> Score:
    """The score that the table shows.

    Raises:
        UserError: nothing was scored here, or the benchmark has no such metric, rule or part; it says which there are.
    """
    if not scores:
        raise UserError(f"benchmarks: {benchmark.name} is not scored here (a judge or its server does); leave it out.")
    chosen = list(scores)
    wanted = {"metric": benchmark.metric, "extraction": benchmark.extraction, "name": benchmark.part or OVERALL}
    for attribute, value in wanted.items():
        there = list(dict.fromkeys(str(getattr(score, attribute)) for score in chosen))
        value = value or there[0]
        if value not in there:
            key = "part" if attribute == "name" else attribute
            raise UserError(
                f"benchmarks: {benchmark.name} has no {key} {value!r}.{nearest(value, there)}"
                f" It has {', '.join(there)}."
            )
        chosen = [score for score in chosen if str(getattr(score, attribute)) == value]
    return chosen[0]


def _held_out(path: str, sha256: str, folder: Path, loaded: LoadedModel, features: FeatureCache) -> dict[str, Any]:
    """The loss. Each record's is kept in `folder`, under the data's checksum, so that models can be paired."""
    loss = caption_loss(loaded, load_records(path), batch_size=_BATCH, features=features)
    value = Estimate(loss.value, loss.low, loss.high, loss.num_records)
    score = Score("held-out loss", CAPTIONS, sha256, OVERALL, OVERALL, **vars(value), sample=loss.sample)
    folder.mkdir(parents=True, exist_ok=True)
    write_samples([score], folder)
    return vars(value)


def _describe(
    measured: Measured, results: Sequence[BenchmarkResult], loaded: LoadedModel, features: FeatureCache
) -> list[dict[str, Any]]:
    """What the model answered to the example questions of the first benchmark, and what it says is in the images."""
    if not measured.benchmarks or not measured.examples:
        return []
    benchmark = measured.benchmarks[0][0]
    questions = example_questions(benchmark, measured.examples)
    open_questions = [Question(id=each.id, text=each.text, prompt=each.text, images=each.images) for each in questions]
    answerer = ModelAnswerer(loaded, GenerateText(_LONGEST_DESCRIPTION), features=features)
    words = answerer.answer(open_questions)
    predictions, _ = read_predictions(Path(results[0].folder) / PREDICTIONS_FILE)
    answered = {prediction.id: prediction for prediction in predictions}
    outputs = []
    for question, free in zip(questions, words, strict=True):
        prediction = answered[question.id]
        read = next(iter(prediction.parsed.values()), None)
        answer = question.options.get(read, read) if read is not None else prediction.answer
        right = None if question.answer is None else read == question.answer
        outputs.append(vars(SampleOutput(question.id, str(answer), right, free.text)))
    return outputs


def _once(path: Path, depends_on: Any, compute: Callable[[], Any]) -> Any:
    """What `compute` gave, now or in an earlier process, if it depended on the same."""
    if path.is_file():
        stored = read_json(path, advice=DELETE)
        if stored["of"] == json.loads(json.dumps(depends_on)):
            return stored["value"]
    value = compute()
    write_text(path, json.dumps({"of": depends_on, "value": value}, ensure_ascii=False) + "\n")
    return json.loads(json.dumps(value))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main())
