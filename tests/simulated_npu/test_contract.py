"""The stand-in against the real torch-npu wheel, which is downloaded and read, never installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch_npu
from torch_npu.fused._operator import SCHEMAS
from torch_npu.simulation import contract, recording
from torch_npu.simulation.recording import FusedCall


@pytest.fixture(scope="module")
def schemas() -> dict[str, str]:
    try:
        return contract.real_schemas()
    except contract.WheelUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.network
@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_schema_is_the_real_one(name: str, schemas: dict[str, str]) -> None:
    registered = getattr(torch.ops.npu, name).default._schema
    assert str(registered) == str(torch._C.parse_schema(f"npu::{schemas[name]}"))


@pytest.mark.network
def test_device_module_has_only_real_names(schemas: dict[str, str]) -> None:
    assert set(torch_npu.npu.__all__) <= contract.real_device_names()


@pytest.mark.network
def test_wheel_has_several_hundred_operators(schemas: dict[str, str]) -> None:
    assert len(schemas) > 300


TOY = {"npu_toy": "npu_toy(Tensor self, int n, *, float scale=1., int[]? lengths=None, Tensor? mask=None) -> Tensor"}


def call(*positional: str, **keywords: str) -> FusedCall:
    return FusedCall("npu_toy", positional, keywords)


@pytest.mark.parametrize(
    "good",
    [
        call("Tensor", "int"),
        call("Tensor", n="int"),
        call("Tensor", "int", scale="float", lengths="int[]", mask="None"),
        call("Tensor", "SymInt", scale="int", lengths="None", mask="Tensor"),
    ],
)
def test_call_binds(good: FusedCall) -> None:
    assert contract.binding_problems(good, TOY) == []


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (FusedCall("npu_other", ("Tensor",), {}), "no such operator"),
        (call("Tensor"), "arguments missing: n"),
        (call("Tensor", "int", "float"), "3 positional arguments, it takes 2"),
        (call("Tensor", "int", n="int"), "'n' is given twice"),
        (call("Tensor", "int", factor="float"), "no argument 'factor'"),
        (call("Tensor", "float"), "'n' is float, it takes int"),
        (call("Tensor", "int", lengths="Tensor"), "'lengths' is Tensor"),
        (call("Tensor", "int", lengths="Tensor[]"), "'lengths' is Tensor[]"),
        (call("Tensor", "int", scale="None"), "'scale' is None"),
    ],
)
def test_call_does_not_bind(bad: FusedCall, problem: str) -> None:
    problems = contract.binding_problems(bad, TOY)
    assert len(problems) == 1
    assert problem in problems[0]


def test_calls_are_recorded_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_folder", None)
    monkeypatch.setattr(recording, "_written", set())
    recording.start(tmp_path)
    x = torch.ones(2, 8, device="npu")
    for _ in range(3):
        torch_npu.npu_swiglu(x, 1)
    torch_npu.npu_rms_norm(x, torch.ones(8, device="npu"), epsilon=1e-5)
    assert recording.read(tmp_path) == [
        FusedCall("npu_rms_norm", ("Tensor", "Tensor"), {"epsilon": "float"}),
        FusedCall("npu_swiglu", ("Tensor", "int"), {}),
    ]


@pytest.mark.network
def test_recorded_calls_bind_to_the_real_schemas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schemas: dict[str, str]
) -> None:
    monkeypatch.setattr(recording, "_folder", None)
    recording.start(tmp_path)
    torch_npu.npu_swiglu(torch.ones(2, 8, device="npu"), 1)
    assert contract.check_recorded_calls(tmp_path, schemas) == []
    recording.record("npu_swiglu", (torch.ones(2),), {"axis": 1})
    (problem,) = contract.check_recorded_calls(tmp_path, schemas)
    assert "no argument 'axis'" in problem
