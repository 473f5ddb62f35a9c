"""A report from existing results: comparisons, single trials, runs of `llava-npu train` with their evaluations.

A training run's benchmark scores are those of the `llava-npu eval` folders that are named next to it or are inside it,
and whose model is the run's: its weights' checksum is in every evaluation.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from llava_npu.comparison import measures
from llava_npu.comparison.examples import ExampleQuestion, load_examples
from llava_npu.comparison.folder import TRIAL, read_failure, read_result, read_trial
from llava_npu.comparison.grid import TRIALS, expand
from llava_npu.comparison.report import ComparisonReport, write_report
from llava_npu.comparison.results import BenchmarkResult, Estimate, Result, metric_label
from llava_npu.comparison.run import CONFIGURATION
from llava_npu.comparison.table import TrialRow
from llava_npu.comparison.trial import choose_score
from llava_npu.config import RunConfig, load_as
from llava_npu.config.comparison import BenchmarkConfig, ComparisonConfig
from llava_npu.errors import UserError
from llava_npu.evaluation.fingerprints import fingerprint_model
from llava_npu.evaluation.reports.comparison import REPORT_FILE, FinishedRun, read_runs
from llava_npu.models import load
from llava_npu.training.run_folder import RUN_FILE, is_finished


def report_on(folders: Sequence[Path], output: Path) -> tuple[Path, list[TrialRow]]:
    """Writes the report of everything in `folders`.

    Args:
        folders: comparisons, trials, finished training runs, evaluations of the latter.
        output: where the report goes.

    Returns:
        the page, and the lines of its table.

    Raises:
        UserError: a folder is none of these, or a run is not finished.
    """
    lines: list[TrialRow] = []
    notes: list[str] = []
    titles: list[str] = []
    examples: list[ExampleQuestion] = []
    runs: list[Path] = []
    evaluations: list[FinishedRun] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--report: {folder} is not a folder.")
        if (folder / CONFIGURATION).is_file():
            config = load_as(ComparisonConfig, folder / CONFIGURATION)
            trials = _trials_of(folder, config)
            notes += [config.note] if config.note else []
            titles += [config.title] if config.title else []
        elif (folder / TRIAL).is_file():
            trials = [folder]
        elif (folder / RUN_FILE).is_file():
            runs.append(folder)
            trials = []
        elif (folder / REPORT_FILE).is_file():
            evaluations += read_runs([folder])
            trials = []
        else:
            raise UserError(
                f"--report: {folder} is not a comparison ({CONFIGURATION}), a trial ({TRIAL}), a training run "
                f"({RUN_FILE}) or an evaluation ({REPORT_FILE})."
            )
        for trial in trials:
            lines.append(_line_of(trial))
            examples = examples or _examples_of(trial)
    lines += [TrialRow(r.encoder, r.projector, r.varied, r) for r in (_result_of(run, evaluations) for run in runs)]
    if not lines:
        raise UserError("--report: these folders hold evaluations only; name the runs that they belong to as well.")
    comparison = ComparisonReport(
        title=titles[0] if len(folders) == len(titles) == 1 else output.name,
        note="\n".join(dict.fromkeys(notes)),
        lines=lines,
        examples=examples,
        configuration="",
        command=shlex.join(["llava-npu", *sys.argv[1:]]),
    )
    return write_report(comparison, output), lines


def _trials_of(folder: Path, config: ComparisonConfig) -> list[Path]:
    """The comparison's trials in the order of its grid; where that cannot be told any more, in that of their names."""
    there = sorted(path.parent for path in (folder / TRIALS).glob(f"*/{TRIAL}"))
    try:
        order = [trial.folder.name for trial in expand(config, str(folder / CONFIGURATION))]
    except UserError:
        return there
    known = [path for path in there if path.name in order]  # others belong to an earlier form of the grid
    return sorted(known, key=lambda path: order.index(path.name)) or there


def _line_of(folder: Path) -> TrialRow:
    trial, _ = read_trial(folder)
    return TrialRow(trial.encoder, trial.projector, trial.varied, read_result(folder), read_failure(folder), folder)


def _examples_of(folder: Path) -> list[ExampleQuestion]:
    _, measured = read_trial(folder)
    if not measured.benchmarks or read_result(folder) is None:
        return []
    return load_examples(measured.benchmarks[0][0], measured.examples)


def _result_of(folder: Path, evaluations: Sequence[FinishedRun]) -> Result:
    """A training run as a line of the table."""
    if not is_finished(folder):
        raise UserError(f"--report: {folder} is not finished: it has no model yet. Train it to its end first.")
    run = RunConfig.model_validate(yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8"))["config"])
    inside = [run for path in sorted(folder.rglob(REPORT_FILE)) for run in read_runs([path.parent])]
    model = load(folder, dtype=torch.float32).model
    config = model.config
    known: dict[str, str] = {}

    def is_of_this_model(evaluation: FinishedRun) -> bool:
        provenance = evaluation.report["provenance"]
        dtype = provenance.get("settings.dtype", "float32")
        if dtype not in known:
            known[dtype] = fingerprint_model(load(folder, dtype=getattr(torch, dtype)).model)
        return bool(provenance.get("model") == known[dtype])

    options = ", ".join(f"{key}={value}" for key, value in config.projector_options.items())
    kinds = " + ".join(tower.kind for tower in config.tower.members or (config.tower,))
    towers = " + ".join(Path(tower).name for tower in run.model.vision_towers)
    return Result(
        encoder=towers or f"{kinds} {config.tower.image_size[0]}",
        projector=f"{config.projector_type} ({options})" if options else config.projector_type,
        varied={"run": folder.name},
        seed=run.seed,
        visual_tokens=measures.visual_tokens(model),
        parameters=measures.parameters(model),
        flops=measures.flops_per_image(model),
        stages={run.stage: measures.stage_result(folder, None)},
        held_out_loss=None,
        benchmarks=tuple(_scores(each) for each in [*inside, *evaluations] if is_of_this_model(each)),
        first_token=None,
        inference_memory=None,
        outputs=(),
        device="",
        dtype="",
        versions={},
        runs={run.stage: run.model_dump(mode="json")},
    )


def _scores(evaluation: FinishedRun) -> BenchmarkResult:
    name, images = evaluation.benchmark, evaluation.report["provenance"].get("images", "given")
    score = choose_score(list(evaluation.scores.values()), BenchmarkConfig(name=name, data=str(evaluation.folder)))
    label = name if images == "given" else f"{name}, images {images}"
    errors = evaluation.report["num_errors"]
    return BenchmarkResult(label, metric_label(score), Estimate.of(score), None, str(evaluation.folder), errors)
