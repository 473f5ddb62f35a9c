"""Compiled layers compute the same numbers, and are compiled once, not for every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import load_file

from llava_npu import UserError
from llava_npu.config import RunConfig
from llava_npu.ops.attention.transformers_interface import register_attention
from llava_npu.training import train
from llava_npu.training.monitoring.metrics import read_metrics


@pytest.fixture(autouse=True)
def _start_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    register_attention()


@pytest.mark.slow
def test_the_same_numbers_from_graphs_that_all_layers_and_batches_share(
    make_run: Callable[..., RunConfig], device: torch.device
) -> None:
    if device.type == "npu":
        pytest.skip("refused there")
    from torch._dynamo.utils import counters

    plain, compiled = (
        make_run(str(backend), compile=backend, pack_tokens=512, max_steps=4) for backend in (None, "aot_eager")
    )
    train(plain)
    counters.clear()
    train(compiled)
    losses = [[line["loss"] for line in read_metrics(run.output_path)] for run in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    weights = [load_file(run.output_path / "model/model.safetensors") for run in (plain, compiled)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=0, msg=name)
    # What stands before attention and what stands behind it: not per layer, not per batch.
    assert 2 <= counters["stats"]["unique_graphs"] <= 6


def test_recomputing_and_compiling_exclude_each_other(make_run: Callable[..., RunConfig]) -> None:
    with pytest.raises(ValueError, match="torch compiles nothing inside `gradient_checkpointing`"):
        make_run(compile="inductor", gradient_checkpointing=True)


def test_a_device_without_compiled_code_refuses(make_run: Callable[..., RunConfig], device: torch.device) -> None:
    if device.type != "npu":
        pytest.skip("these devices have it")
    with pytest.raises(UserError, match=r"compile: torch.compile makes no code for npu devices; leave `compile` out"):
        train(make_run(compile="inductor"))
