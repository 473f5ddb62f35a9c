"""The stand-in and the product's calls against the real torch-npu wheels, as `wheels.json` has them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch_npu
from torch_npu.fused._operator import SCHEMAS
from torch_npu.simulation import contract, recording
from torch_npu.simulation.recording import FusedCall


@pytest.fixture(scope="module")
def extraction() -> ModuleType:
    path = Path(torch_npu.__file__).parents[1] / "extract_schemas.py"
    specification = importlib.util.spec_from_file_location("extract_schemas", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_schema_is_the_real_one(name: str) -> None:
    registered = getattr(torch.ops.npu, name).default._schema
    assert str(registered) == str(torch._C.parse_schema(f"npu::{contract.schemas(contract.VERSION)[name]}"))


def test_releases_from_2_7_1_to_2_14_have_all_operators_that_the_stand_in_has() -> None:
    releases = contract.releases()
    assert (releases[0], releases[-1]) == ("2.7.1", "2.14.0")
    for release in releases:
        assert contract.schemas(release).keys() == SCHEMAS.keys(), release


@pytest.mark.parametrize("release", contract.releases())
def test_device_module_has_only_real_names(release: str) -> None:
    assert set(torch_npu.npu.__all__) <= contract.device_names(release)


@pytest.mark.network
def test_the_data_is_what_the_wheel_has(extraction: ModuleType) -> None:
    data = json.loads(contract.DATA.read_text())
    try:
        found = extraction.extract(contract.VERSION, data["wheels"][contract.VERSION]["sha256"])
    except OSError as error:
        pytest.skip(str(error))
    assert found["schemas"] == contract.schemas(contract.VERSION)
    assert set(found["names"]) == contract.device_names(contract.VERSION)


def test_what_releases_share_is_written_once(extraction: ModuleType) -> None:
    releases: dict[str, Any] = {"1": {"schemas": {"a": "a()"}}, "2": {"schemas": {}}, "3": {"schemas": {"a": "a()"}}}
    assert extraction.by_content(releases, "schemas", "a") == [
        {"is": "a()", "in": ["1", "3"]},
        {"is": None, "in": ["2"]},
    ]


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


def test_recorded_calls_bind_to_the_real_schemas_of_every_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_folder", None)
    recording.start(tmp_path)
    torch_npu.npu_swiglu(torch.ones(2, 8, device="npu"), 1)
    assert contract.check_recorded_calls(tmp_path) == []
    recording.record("npu_swiglu", (torch.ones(2),), {"axis": 1})
    (problem,) = contract.check_recorded_calls(tmp_path)
    assert "no argument 'axis'" in problem
    assert problem.count(",") >= len(contract.releases()) - 1


def test_an_argument_that_only_newer_releases_have_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """npu_fusion_attention has `sink` from TorchNPU 7.3 on."""
    monkeypatch.setattr(recording, "_folder", None)
    recording.start(tmp_path)
    tensor = torch.ones(1)
    recording.record("npu_fusion_attention", (tensor, tensor, tensor, 1, "BNSD"), {"sink": tensor})
    (problem,) = contract.check_recorded_calls(tmp_path)
    assert problem.endswith("it has no argument 'sink' (torch-npu 2.7.1, 2.8.0)")
