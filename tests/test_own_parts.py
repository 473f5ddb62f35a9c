"""A projector, an engine and a benchmark that this file defines go the whole way: planned, trained, saved, evaluated.

Nothing of the package is touched: docs/architecture.md, "Adding things".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from llava_npu import load
from llava_npu.config.section import Section
from llava_npu.data.image_sources import ImageFile
from llava_npu.evaluation import benchmarks
from llava_npu.evaluation.answering import build_answerer
from llava_npu.evaluation.benchmarks import LOCALLY, Benchmark, Description, Parsed
from llava_npu.evaluation.formats.json_files import read_json_list
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.run import evaluate
from llava_npu.evaluation.statistics.accuracy import Score, hit, tabulate
from llava_npu.models.projectors import registry as projectors
from llava_npu.models.projectors.base import Projector, ProjectorOptions
from llava_npu.models.projectors.grid import Grid, as_grid
from llava_npu.planning.plan import plan_run
from llava_npu.planning.target import Target
from llava_npu.training import engines, train
from llava_npu.training.engines import Engine, EngineMemory, ModelSizes
from llava_npu.training.engines import registry as engine_registry
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.resolve import ResolvedRun
from support import tiny
from support.small_run import small_run, write_material


@dataclass(frozen=True)
class RowOptions(ProjectorOptions):
    """Options of `rows`."""

    scale: float = 1.0

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        return self.patches_only(grid, special_tokens)[0]

    def token_grid(self, grid: Grid) -> Grid | None:
        return as_grid(grid)[0], 1


class RowProjector(Projector):
    """One token for each row of patches: their mean, projected."""

    options: RowOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: RowOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        self.project = nn.Linear(vision_hidden_size, text_hidden_size)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        height, width = self.resolve_grid(features, grid)
        rows = features.unflatten(1, (height, width)).mean(dim=2)  # (images, height, channels)
        return self.options.scale * self.project(rows)


class PlainOptions(Section):
    """`engine: plain` has none."""


class PlainEngine(Engine):
    """One process trains the bare model."""

    options_class = PlainOptions
    alternatives = ({},)
    keeps_whole_layers = True
    shards_weights = False

    @classmethod
    def memory(cls, options: Section, model: ModelSizes, devices: int) -> EngineMemory:
        return EngineMemory(weights=12345, gradients=0, optimizer=0)

    def prepare(self, objective: SupervisedLoss, make_optimizer: Callable[[], torch.optim.Optimizer]) -> None:
        self.objective = objective.to(self.accelerator.device)
        self._model = objective.model
        self.optimizer = make_optimizer()

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, part: torch.Tensor) -> None:
        part.backward()

    def step(self, max_grad_norm: float) -> torch.Tensor:
        return self._clip_and_step(max_grad_norm)


def read_colours(path: Path) -> Dataset:
    records, digest = read_json_list(path)
    questions = [
        Question(
            id=record.need("id"),
            text="What is it?",
            prompt="What is it?",
            images=(ImageFile(path.parent / record.need("image"), path.name),),
            answer=record.need("answer"),
            group=record.need("id"),
        )
        for record in records
    ]
    return Dataset(path, digest, tuple(questions))


def read_answer(question: Question, answer: str) -> Parsed:
    return {"contains": next((colour for colour in tiny.COLOURS if colour in answer), None)}


def score_colours(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    right = [hit(question, parsed[question.id]["contains"] == question.answer) for question in questions]
    return tabulate(right, "accuracy", "contains")


COLOURS = Benchmark(
    name="colours",
    title="Colours (toy)",
    description=Description("made up", ".json: id, image, answer", "CC0", "the question", "accuracy", (LOCALLY,)),
    files=("colours.json",),
    read=read_colours,
    parse=read_answer,
    score=score_colours,
    rules={"contains": "the first colour that is named"},
    max_new_tokens=6,
)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests do not see these."""
    monkeypatch.setattr(projectors, "_REGISTRY", dict(projectors._REGISTRY))
    monkeypatch.setattr(engine_registry, "_REGISTRY", dict(engine_registry._REGISTRY))
    monkeypatch.setattr(benchmarks, "_REGISTRY", dict(benchmarks.available()))
    projectors.register("rows", RowOptions)(RowProjector)
    engines.register("plain")(PlainEngine)
    benchmarks.register(COLOURS)


@pytest.mark.usefixtures("registered")
def test_own_projector_engine_and_benchmark_go_the_whole_way(tmp_path: Path) -> None:
    material = write_material(tmp_path / "material")
    run = small_run(
        material,
        tmp_path / "run",
        "cpu",
        engine="plain",
        max_steps=2,
        model={"projector": "rows", "projector_options": {"scale": 2.0}},
    )
    plan = plan_run(ResolvedRun(run), Target("a device", "cpu", 1, 1, 2**30, 1e12, "this test", None), 0.4)
    assert plan.configured.engine.name == "plain"
    assert plan.configured.at_configured.device.weights == 12345
    train(run)

    loaded = load(run.output_path)
    assert isinstance(loaded.model.model.multi_modal_projector, RowProjector)
    assert loaded.model.config.projector_options == {"scale": 2.0}
    assert loaded.processor.num_image_tokens == 4  # of a grid of 4 × 4 patches

    colours = list(tiny.COLOURS)
    entries = [{"id": str(n), "image": f"images/{n}.png", "answer": colours[n % 3]} for n in range(6)]
    (material / "colours.json").write_text(json.dumps(entries))
    report = evaluate("colours", material, build_answerer("generate", loaded, max_new_tokens=6), tmp_path / "out")
    assert (report.title, report.num_questions, report.num_errors) == ("Colours (toy)", 6, 0)
    (score,) = report.scores
    assert score.count == 6
