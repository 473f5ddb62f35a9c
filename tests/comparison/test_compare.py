"""`llava-npu compare` end to end, on tiny models: the recipe compare-debug with other weights and data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from llava_npu import devices
from llava_npu.comparison import measures
from llava_npu.comparison.folder import Failure, read_failure, read_result
from llava_npu.comparison.grid import expand
from llava_npu.comparison.run import trained_on
from llava_npu.config import validate
from llava_npu.config.comparison import ComparisonConfig
from llava_npu.evaluation.predictions import read_predictions
from llava_npu.models import compose
from llava_npu.models.loaded import LoadedModel
from support import tiny
from support.commands import run_command
from support.comparison_samples import QUESTIONS, values

DEBUG = Path(__file__).parents[2] / "src/llava_npu/recipes/compare-debug.yaml"


class Command:
    """`llava-npu compare` on the debug configuration, with a cache of its own."""

    def __init__(self, material: Path, folder: Path, device: torch.device):
        self.output = folder / "out"
        self._environment = {"LLAVA_NPU_CACHE": str(folder / "cache"), "COLUMNS": "200"}
        self.cache = folder / "cache"
        questions = f"{{name: multiple_choice, data: {material}/questions.tsv, answer: likelihood, batch_size: 6}}"
        self.arguments = [
            str(DEBUG),
            f"output={self.output}",
            f"language_model={material}/lm",
            f"encoders=[{{name: CLIP, vision_tower: {material}/clip}}]",
            f"align.data.path={material}/captions.json",
            f"benchmarks=[{questions}]",
            f"held_out={material}/captions.json",
            "examples=2",
        ]
        kind = device.type
        self.devices = [f"--device={kind}:0", f"--device={kind}:1"] if kind == "npu" else [f"--device={kind}"]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "llava_npu", "compare", *arguments]
        environment = {**os.environ, **self._environment}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def run(self, *arguments: str) -> tuple[int, str]:
        arguments = arguments or (*self.arguments, *self.devices)
        result = run_command("compare", *arguments, environment=self._environment)
        assert "Traceback" not in result.stderr, result.stderr
        return result.returncode, result.stdout + result.stderr


@pytest.mark.slow
def test_a_comparison_runs_goes_on_and_is_reported(material: Path, tmp_path: Path, device: torch.device) -> None:
    command = Command(material, tmp_path, device)
    status, said = command.run()
    assert status == 0, said  # an impossible trial is no failure
    assert "3 trials: 0 finished, 3 to run" in said
    assert "of its 24 captions 24 in align are trained on" in said
    trials = {path.name.rpartition("-")[0]: path for path in (command.output / "trials").iterdir()}
    assert sorted(trials) == ["clip-adaptive-pool-num-queries-4", "clip-mlp2x-gelu", "clip-tokenpacker"]

    # What could not be built says why; the others are trained, and measured on every question.
    failure = read_failure(trials["clip-tokenpacker"])
    assert failure is not None
    assert failure.kind == "impossible"
    assert "3 layers" in failure.reason
    mlp, pool = read_result(trials["clip-mlp2x-gelu"]), read_result(trials["clip-adaptive-pool-num-queries-4"])
    assert mlp is not None
    assert pool is not None
    assert (mlp.visual_tokens, pool.visual_tokens) == (16, 4)
    assert mlp.parameters["projector"] == 32 * 48 + 48 + 48 * 48 + 48
    assert mlp.flops["projector"] == 2 * 16 * (32 * 48 + 48 * 48)
    assert pool.flops["language_model"] < mlp.flops["language_model"] / 3.9
    assert mlp.stages["align"].steps == 2
    assert mlp.held_out_loss is not None
    assert mlp.held_out_loss.count == 24
    for result in (mlp, pool):
        (score,) = result.benchmarks
        predictions, _ = read_predictions(Path(score.folder) / "predictions.jsonl")
        asked = json.loads((Path(score.folder) / "run.json").read_text())["identity"]
        assert asked["settings.template"] == "plain"  # as it was trained
        assert len(predictions) == score.score.count == QUESTIONS
        right = sum(prediction.parsed["strict"] == prediction.truth for prediction in predictions)
        assert score.score.value == pytest.approx(right / QUESTIONS)
        assert score.chance == pytest.approx(1 / 3)
        assert len(result.outputs) == 2
        assert result.first_token is not None
        assert result.first_token.value > 0
        assert (result.stages["align"].peak_memory or 0) > 0

    # One tower's features are shared by both: each image was encoded once, those of the benchmark included.
    (features,) = (command.cache / "features").iterdir()
    assert len(list(features.rglob("*.safetensors"))) == 24

    page = (command.output / "index.html").read_text(encoding="utf-8")
    assert "adaptive_pool (num_queries=4)" in page
    assert "3 layers" in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert "| CLIP | mlp2x_gelu | 16 |" in (command.output / "comparison.md").read_text(encoding="utf-8")

    # Again: nothing is done over. Another projector: only that one is run.
    written = {
        path: (path / "result.json").stat().st_mtime_ns for path in trials.values() if (path / "result.json").exists()
    }
    status, said = command.run(*command.arguments, "projectors=[mlp2x_gelu, {type: adaptive_pool, num_queries: 4}]")
    assert status == 0, said
    assert "2 trials: 2 finished, 0 to run" in said
    assert written == {path: (path / "result.json").stat().st_mtime_ns for path in written}

    # With a second seed only that one is trained, and the report has a row over both.
    status, said = command.run(*command.arguments, "projectors=[mlp2x_gelu]", "seeds=2")
    assert status == 0, said
    assert "2 trials: 1 finished, 1 to run" in said
    (over_seeds,) = json.loads((command.output / "comparison.json").read_text())["over_seeds"]
    assert over_seeds["seeds"] == [0, 1]
    assert "& 2 &" in (command.output / "comparison.tex").read_text()

    # A report of what is there: of a training run and an evaluation, which are told to belong together;
    trial = trials["clip-mlp2x-gelu"]
    report = tmp_path / "runs"
    status, said = command.run(
        "--report", str(trial / "align"), str(trial / "evaluation/0-multiple_choice"), "--output", str(report)
    )
    assert status == 0, said
    (found,) = json.loads((report / "comparison.json").read_text())["trials"]
    assert found["projector"] == "mlp2x_gelu"
    assert found["result"]["visual_tokens"] == 16
    assert found["result"]["benchmarks"][0]["score"] == vars(mlp.benchmarks[0].score)

    # and of single trials.
    report = tmp_path / "report"
    status, said = command.run("--report", *(str(path) for path in written), "--output", str(report))
    assert status == 0, said
    assert [trial["projector"] for trial in json.loads((report / "comparison.json").read_text())["trials"]] == [
        json.loads((path / "trial.json").read_text())["projector"] for path in written
    ]


def test_held_out_captions_that_are_trained_on_are_named(tmp_path: Path) -> None:
    captions = json.loads(tiny.write_captions(tmp_path).read_text())
    (tmp_path / "train.json").write_text(json.dumps(captions[2:]))
    held_out = tmp_path / "captions.json"
    settings = values(tmp_path, tmp_path / "out", align={"data": {"path": str(tmp_path / "train.json")}})
    trials = expand(validate(ComparisonConfig, settings, "comparison.yaml"), "comparison.yaml")
    assert trained_on(str(held_out), trials).startswith(
        f"held_out: of its {len(captions)} captions {len(captions) - 2} in align are trained on."
    )
    held_out.write_text(json.dumps(captions[:2]))
    assert trained_on(str(held_out), trials) == ""


@pytest.mark.slow
def test_a_trial_that_fails_is_reported_and_skipped(material: Path, tmp_path: Path) -> None:
    command = Command(material, tmp_path, torch.device("cpu"))
    arguments = [*command.arguments, "projectors=[linear]", "vary={align.data.max_length: [8, 2048]}"]
    status, said = command.run(*arguments, *command.devices)
    assert status == 1
    assert "max_length=8: not finished" in said
    outcomes = {path: read_failure(path) for path in (command.output / "trials").iterdir()}
    assert [failure.kind for failure in outcomes.values() if failure] == ["failed"]
    assert sum(read_result(path) is not None for path in outcomes) == 1

    status, said = command.run(*arguments, *command.devices)
    assert "1 finished, 0 to run on cpu, 1 that failed before" in said
    assert status == 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_comparison_by_name_through_both_stages_at_debug_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = Command(tmp_path, tmp_path, torch.device("cpu"))
    status, said = command.run("compare-llava-v1.5-7b", "projectors=[tokenpacker]", "--debug-size", "--device=cpu")
    assert status == 0, said
    (trial,) = tmp_path.glob("runs/debug-size/compare-llava-v1.5-7b/trials/*")
    result = read_result(trial)
    assert result is not None
    assert list(result.stages) == ["align", "finetune"]
    assert result.visual_tokens == 36
    assert result.runs["finetune"]["model"]["checkpoint"] == str(trial.relative_to(tmp_path) / "align")
    assert result.benchmarks[0].score.count == 16


@pytest.mark.slow
def test_numbers_of_an_image_are_those_of_a_whole_picture_with_anyres(material: Path) -> None:
    """Not of one tile: 640×480 pixels are scaled into 56×56, two tiles by two, beside the whole image."""
    parts = (str(material / "clip"), str(material / "lm"), "linear")
    squares, _ = compose(*parts)
    tiles, processor = compose(*parts, image_aspect_ratio="anyres")
    assert measures.visual_tokens(squares) == 16
    assert measures.visual_tokens(tiles) == processor.count_image_tokens((480, 640)) == 16 + 6 * (8 + 1)
    one, whole = measures.flops_per_image(squares), measures.flops_per_image(tiles)
    assert whole["vision_tower"] == 5 * one["vision_tower"]
    assert whole["projector"] == 5 * one["projector"]
    assert whole["language_model"] > 70 / 16 * one["language_model"]
    assert measures.first_token(LoadedModel(tiles.eval(), processor), devices.select("cpu")).value > 0


@pytest.mark.slow
def test_two_processes_train_a_trial_together(material: Path, tmp_path: Path) -> None:
    """A model with two towers, whose features are cached."""
    command = Command(material, tmp_path, torch.device("cpu"))
    encoder = f"encoders=[{{name: both, vision_tower: [{material}/clip, {material}/siglip]}}]"
    options = (encoder, "projectors=[linear]", "devices_per_trial=2", "--device=cpu")
    status, said = command.run(*command.arguments, *options)
    assert status == 0, said
    assert "1 to run on 2 × cpu" in said
    (trial,) = (command.output / "trials").iterdir()
    assert "on 2 × " in (trial / "trial.log").read_text()
    result = read_result(trial)
    assert result is not None
    assert result.encoder == "both"
    assert result.benchmarks[0].score.count == QUESTIONS
    (features,) = (command.cache / "features").iterdir()
    assert len(list(features.rglob("*.safetensors"))) == 24


@pytest.mark.slow
def test_stopped_in_the_middle_it_leaves_nothing_running_and_goes_on(material: Path, tmp_path: Path) -> None:
    command = Command(material, tmp_path, torch.device("cpu"))
    arguments = [
        *command.arguments,
        "projectors=[linear]",
        "align.max_steps=400",
        "align.epochs=200",
        "align.save_every=1",
    ]
    process = command.start(*arguments, *command.devices)
    try:
        deadline = time.monotonic() + 600
        while not list(command.output.glob("trials/*/align/checkpoint-*")):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    (trial,) = command.output.glob("trials/*")
    assert read_failure(trial) is None
    assert not [line for line in _processes() if str(trial) in line]
    assert list(trial.glob("align/checkpoint-*"))


def _processes() -> list[str]:
    """The command lines of all processes; what ends meanwhile has none."""
    return [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]


def test_failures_are_read_as_they_were_written(tmp_path: Path) -> None:
    from llava_npu.comparison.folder import write_failure

    assert read_failure(tmp_path) is None
    write_failure(tmp_path, Failure("failed", "because"))
    assert read_failure(tmp_path) == Failure("failed", "because")
