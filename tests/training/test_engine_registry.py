"""An engine is a class and its registration; options and requests that an engine cannot meet are refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from llava_npu import UserError
from llava_npu.config import RunConfig
from llava_npu.config.section import Section
from llava_npu.planning.plan import plan_run
from llava_npu.planning.target import Target
from llava_npu.training import train
from llava_npu.training.engines import Engine, EngineMemory, ModelSizes, register, registry
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.monitoring.metrics import read_metrics
from llava_npu.training.resolve import ResolvedRun

MakeRun = Callable[..., RunConfig]


class ToyOptions(Section):
    """Options of `engine: toy`."""

    half: bool = False


class ToyEngine(Engine):
    """One process trains the bare model."""

    options_class = ToyOptions
    alternatives = ({}, {"half": True})
    keeps_whole_layers = True
    shards_weights = False

    @classmethod
    def memory(cls, options: ToyOptions, model: ModelSizes, devices: int) -> EngineMemory:
        return EngineMemory(weights=12345 if options.half else 24690, gradients=0, optimizer=0)

    def prepare(self, objective: SupervisedLoss, make_optimizer: Callable[[], torch.optim.Optimizer]) -> None:
        self.objective = objective.to(self.accelerator.device)
        self._model = objective.model
        self.optimizer = make_optimizer()

    def micro_step(self, last: bool) -> Any:
        return nullcontext()

    def backward(self, part: torch.Tensor) -> None:
        part.backward()

    def step(self, max_grad_norm: float) -> torch.Tensor:
        return self._clip_and_step(max_grad_norm)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    register("toy")(ToyEngine)


@pytest.mark.usefixtures("toy")
def test_a_new_engine_trains_and_is_planned(make_run: MakeRun) -> None:
    losses = {}
    for name in ("ddp", "toy"):
        run = make_run(name, engine=name, max_steps=2)
        train(run)
        losses[name] = [line["loss"] for line in read_metrics(run.output_path)]
    assert losses["toy"] == losses["ddp"]
    run = make_run(engine="toy", engine_options={"half": True})
    plan = plan_run(ResolvedRun(run), Target("a device", "cpu", 1, 1, 2**30, 1e12, "this test", None), 0.4)
    kept = {str(option.engine.settings): option.at_configured.device.weights for option in plan.options}
    assert kept["{'engine': 'toy'}"] == 24690
    assert kept["{'engine': 'toy', 'engine_options.half': 'true'}"] == 12345
    assert plan.configured.engine.name == "toy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"engine": "fsdp"},
            r"engine: 'fsdp' does not exist\. Did you mean 'fsdp2'\? Engines: ddp, fsdp2, zero2, zero3",
        ),
        ({"engine_options": {"offload": True}}, "engine_options of ddp: unknown key `offload`"),
        ({"engine": "zero2", "engine_options": {"offload_parameters": True}}, "Valid here: offload_optimizer"),
        ({"engine": "fsdp2", "engine_options": {"offload": "yes"}}, "`offload` is 'yes': .*boolean"),
        ({"engine": "fsdp2", "compile": "inductor"}, "compile: .* not been tried with engine: fsdp2.* Use engine: ddp"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(make_run: MakeRun, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResolvedRun(make_run(**changes))


def test_weights_in_few_bits_need_whole_layers(make_run: MakeRun) -> None:
    lora = {"parts": {"language_model": {"train": "lora"}}, "lora": {"base_bits": 4}}
    with pytest.raises(UserError, match=r"lora\.base_bits: weights in 4 bits cannot be sharded.* Use engine: ddp"):
        ResolvedRun(make_run(engine="fsdp2", **lora))
