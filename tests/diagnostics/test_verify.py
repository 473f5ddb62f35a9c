"""`verify` passes on devices that are right, and names what is wrong on those that are not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llava_npu import devices
from llava_npu.cli import app
from llava_npu.devices.npu import NpuDevice
from llava_npu.diagnostics import models, operations, tiny_models
from llava_npu.diagnostics import verification_report as report
from llava_npu.diagnostics import verify as verification
from llava_npu.diagnostics.comparison import Comparison, relative_error
from llava_npu.diagnostics.operations import Operation, compare, expected
from llava_npu.diagnostics.optimizer_steps import compare_optimizer
from llava_npu.diagnostics.real_sizes import real_sizes
from llava_npu.diagnostics.verify import Verification, verify
from llava_npu.ops.attention.implementation import AttentionInputs
from llava_npu.ops.attention.sdpa import SdpaAttention
from llava_npu.ops.kernels.npu.attention import NpuAttention

SIZES = list(real_sizes())


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the operations at real sizes but two: they are tested one by one."""
    few = [SIZES[0], next(size for size in SIZES if size.name == "rms_norm")]
    monkeypatch.setattr(verification, "real_sizes", lambda: few)


def _verify(device: torch.device) -> Verification:
    return verify(devices.select(device.type), progress=lambda line: None, quick=True)


def _compare_all(device: torch.device, dtype: torch.dtype) -> list[Comparison]:
    return list(operations.compare_operations(operations.operations(), device, dtype))


def _failed(comparisons: Any) -> set[tuple[str, str, str]]:
    return {(each.subject, each.part, each.quantity) for each in comparisons if not each.passed}


@pytest.mark.slow
@pytest.mark.usefixtures("few_sizes")
def test_a_right_device_passes(device: torch.device) -> None:
    result = _verify(device)
    assert result.passed, report.as_markdown(result)
    assert result.device.startswith(device.type)
    assert result.simulated == (device.type == "npu")
    assert {each.kind for each in result.comparisons} == {"operation", "model"}
    assert {each.stage for each in result.comparisons} == {"forward", "gradient", "steps"}
    assert len({each.dtype for each in result.comparisons}) == 2
    assert "float32" in {each.dtype for each in result.comparisons}
    subjects = {each.subject for each in result.comparisons}
    assert subjects > {"packed_attention", "rms_norm", "FusedMultiheadAttention", "SigLIP, ldpv2, Llama"}
    # On a CPU nothing may be so near its limit that another CPU's rounding would cross it.
    if device.type == "cpu":
        assert max(each.error / each.limit for each in result.comparisons) < 0.6


def test_every_gradient_of_every_operation_is_compared() -> None:
    found = _compare_all(torch.device("cpu"), torch.float32)
    for operation in operations.operations():
        quantities = {each.quantity for each in found if (each.subject, each.part) == (operation.name, operation.case)}
        gradients = {f"gradient of {name}" for name in operation.inputs} if operation.differentiable else set()
        assert quantities == {"output", *gradients}


def test_attention_that_sees_the_future_is_found_and_named(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation = NpuAttention if device.type == "npu" else SdpaAttention
    right = implementation.batched

    def sees_all(self: Any, inputs: AttentionInputs, causal: bool) -> torch.Tensor:
        return right(self, inputs, False)

    monkeypatch.setattr(implementation, "batched", sees_all)
    failed = _failed(_compare_all(device, torch.float32))
    assert ("batched_attention", "causal", "output") in failed
    assert ("batched_attention", "causal", "gradient of key") in failed
    assert {(subject, part) for subject, part, _ in failed} <= {
        ("batched_attention", "causal"),
        ("batched_attention", "prompt, no gradients"),
        ("batched_attention", "chunk behind a cache"),
        ("packed_attention", "causal"),  # on a CPU, packs of one length end there too
    }


@pytest.mark.usefixtures("few_sizes")
def test_a_wrong_kernel_of_the_npu_is_named_and_shows_in_the_models(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type != "npu":
        pytest.skip("fused kernels are the NPU's")
    import torch_npu

    right = torch_npu.npu_rms_norm
    monkeypatch.setattr(torch_npu, "npu_rms_norm", lambda *args: (1.001 * right(*args)[0], None))
    failures = _verify(device).failures
    assert {each.subject for each in failures if each.kind == "operation"} == {"rms_norm"}
    broken = {each.part for each in failures if each.kind == "model" and each.stage == "forward"}
    assert {"language layer 0", "final norm"} <= broken
    assert not {"vision layer 1", "projector"} & broken


class _LosesRows(torch.autograd.Function):
    """A wrong backward pass: nothing comes back to the last quarter of the rows."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        wrong = gradient.clone()
        rows = wrong.view(-1, wrong.shape[-1])
        rows[-(len(rows) // 4) :] = 0
        return wrong


def _plant_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fused operator gives a wrong last row, and no gradient to some rows; it is right otherwise."""
    import torch_npu

    def wrong(right: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            learns = torch.is_grad_enabled()
            inputs = [
                _LosesRows.apply(each) if learns and isinstance(each, torch.Tensor) and each.dim() > 1 else each
                for each in arguments
            ]
            outputs = right(*inputs, **options)
            first = outputs[0] if isinstance(outputs, tuple) else outputs
            factors = torch.ones_like(first)
            factors.view(-1, first.shape[-1])[-1] = 1.5
            return (first * factors, *outputs[1:]) if isinstance(outputs, tuple) else first * factors

        return call

    for name in ("npu_fusion_attention", "npu_fused_infer_attention_score", "npu_rms_norm", "npu_swiglu"):
        monkeypatch.setattr(torch_npu, name, wrong(getattr(torch_npu, name)))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=[f"{size.name}, {size.case}" for size in SIZES])
def test_a_right_device_passes_at_each_real_size_and_a_planted_fault_is_found(
    device: torch.device, size: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu" and size.differentiable and "2,100" in size.case:
        pytest.skip("torch's own attention: its shorter forms are compared")
    dtype = torch.bfloat16
    wanted = expected(size, dtype)
    found = list(compare(size, device, dtype, wanted))
    assert not _failed(found), [(each.quantity, each.error, each.problem) for each in found if not each.passed]
    if device.type != "npu":
        return
    _plant_fault(monkeypatch)
    failed = {each.quantity for each in compare(size, device, dtype, wanted) if not each.passed}
    assert "output" in failed
    if size.differentiable:
        assert failed >= {f"gradient of {name}" for name in size.inputs if name in ("query", "key", "value", "hidden")}


def test_a_slightly_wrong_optimizer_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _failed(compare_optimizer(device))
    right = torch._fused_adamw_

    def too_fast(*arguments: Any, lr: Any, **options: Any) -> Any:
        return right(*arguments, lr=1.001 * lr, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", too_fast)
    assert {each.part for each in compare_optimizer(device) if not each.passed} == {
        "five steps",
        "one step skipped",
    }


def test_a_step_that_should_be_skipped_and_is_not_is_found(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NPU's optimizer ignores `found_inf`: without the decision on the host the weights would be NaN."""
    if device.type != "npu":
        pytest.skip("other devices' optimizers read found_inf")
    monkeypatch.setattr(NpuDevice, "optimizer_heeds_found_inf", True)
    (failure,) = [each for each in compare_optimizer(device) if not each.passed]
    assert failure.part == "one step skipped"
    assert failure.error == math.inf


@pytest.mark.slow
def test_the_command_compares_at_all_real_sizes_and_quick_does_so_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, torch.dtype]] = []

    def compare_operations(cases: Any, on: torch.device, dtype: torch.dtype) -> list[Comparison]:
        compared.append((len(list(cases)), dtype))
        return []

    monkeypatch.setattr(verification, "compare_operations", compare_operations)
    monkeypatch.setattr(verification, "compare_model", lambda *arguments: [])
    device = devices.select("cpu")
    verify(device, progress=lambda line: None)
    verify(device, progress=lambda line: None, quick=True)
    half = device.autocast_dtype or torch.bfloat16
    small, real = len(list(operations.operations())), len(SIZES)
    both = [(small, torch.float32), (small, half)]
    assert compared == [*both, (real, torch.float32), (real, half), *both, (real, half)]


def test_a_wrong_gradient_alone_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = operations.rms_norm

    def forgets_half(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return right(hidden, 0.5 * weight + 0.5 * weight.detach(), epsilon)

    monkeypatch.setattr(operations, "rms_norm", forgets_half)
    failed = _failed(_compare_all(device, torch.float32))
    assert failed == {("rms_norm", "", "gradient of weight")}


def test_float32_products_rounded_to_tf32_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = operations.batched_attention

    def to_tf32(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.detach().view(torch.int32)
        return tensor + (((bits + 0x1000) & ~0x1FFF).view(torch.float32) - tensor.detach())  # 10 bits of mantissa

    monkeypatch.setattr(
        operations, "batched_attention", lambda q, k, v, causal: right(to_tf32(q), to_tf32(k), to_tf32(v), causal)
    )
    failures = [each for each in _compare_all(torch.device("cpu"), torch.float32) if not each.passed]
    assert {each.subject for each in failures} == {"batched_attention"}
    assert min(each.error for each in failures if each.stage == "forward") > 1e-4


def test_an_operation_that_raises_is_one_finding_among_the_others(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("EZ9999: no kernel for this shape")

    monkeypatch.setattr(operations, "swiglu", no_kernel)
    found = _compare_all(device, torch.float32)
    failures = [each for each in found if not each.passed]
    assert {each.subject for each in failures} == {"swiglu"}
    assert {each.problem for each in failures} == {"RuntimeError: EZ9999: no kernel for this shape"}
    assert {each.subject for each in found if each.passed} > {"rms_norm", "linear_cross_entropy"}


def test_a_result_that_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "swiglu", lambda gate, value: gate * math.nan)
    assert ("swiglu", "", "output") in _failed(_compare_all(torch.device("cpu"), torch.float32))


def test_a_wrong_layer_of_the_model_is_where_the_table_turns_red(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = models.fuse

    def breaks_a_layer(model: Any, on: torch.device) -> Any:
        attention = model.model.language_model.layers[1].self_attn
        attention.scaling *= 1.05
        return right(model, on)

    monkeypatch.setattr(models, "fuse", breaks_a_layer)
    tiny = tiny_models.tiny_models()[0]
    found = list(models.compare_model(tiny, device, [torch.float32]))
    forward = {each.part: each.passed for each in found if each.stage == "forward"}
    assert forward["vision layer 1"]
    assert forward["language layer 0"]
    assert not forward["language layer 1"]
    assert not forward["loss"]


@pytest.mark.slow
def test_an_optimizer_that_stands_still_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = torch.optim.AdamW.step, iter(range(100))

    def step(self: torch.optim.AdamW) -> None:
        if next(calls) < models.NUM_STEPS:  # the first run is the reference
            right(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    tiny = tiny_models.tiny_models()[0]
    found = list(models.compare_model(tiny, torch.device("cpu"), [torch.float32, torch.bfloat16]))
    changes = [each for each in found if each.stage == "steps" and "layer" in each.part]
    assert {each.dtype for each in changes} == {"float32", "bfloat16"}
    assert not any(each.passed for each in changes)


def test_a_model_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(model: Any, on: torch.device) -> Any:
        raise RuntimeError("NPU out of memory")

    monkeypatch.setattr(models, "fuse", out_of_memory)
    found = list(models.compare_model(tiny_models.tiny_models()[0], torch.device("cpu"), [torch.float32]))
    assert [(each.problem, each.passed) for each in found] == [("RuntimeError: NPU out of memory", False)]


def test_relative_error_sees_shape_nan_and_one_wrong_row() -> None:
    right = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    assert relative_error(right, right) == 0
    assert relative_error(right[:1], right) == math.inf
    assert relative_error(right.clone().index_fill(0, torch.tensor([7]), math.nan), right) == math.inf
    one_row = right.clone()
    one_row[500] = 0
    assert relative_error(one_row, right) > 0.1
    assert relative_error(torch.tensor([0.5]), torch.zeros(1)) == 0.5  # nothing to relate it to
    # As attention's: the first rows are means over few values, the last over many.
    sizes = torch.arange(1, 1001)[:, None] ** -0.5
    shrinking = right * sizes
    last = shrinking.clone()
    last[-1] *= 1.5
    assert (last - shrinking).norm() / shrinking.norm() < 0.01
    assert relative_error(last, shrinking) > 0.05


@given(st.floats(1e-6, 1e6), st.integers(0, 100))
def test_relative_error_does_not_depend_on_scale(scale: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    expected = torch.randn(20, generator=random, dtype=torch.float64)
    actual = expected + 1e-3 * torch.randn(20, generator=random, dtype=torch.float64)
    assert relative_error(actual * scale, expected * scale) == pytest.approx(relative_error(actual, expected), rel=1e-6)


def _result(*comparisons: Comparison, name: str = "Ascend910B3", simulated: bool = False) -> Verification:
    return Verification("npu:0", name, simulated, ("HF32 off",), {"torch": "2.9.0"}, 3.2, comparisons)


GOOD = Comparison("operation", "rms_norm", "", "forward", "output", "float32", 1e-7, 1e-5)
BAD = Comparison("model", "CLIP", "projector", "gradient", "gradient", "bfloat16", 0.31, 0.1)
RAISED = Comparison("operation", "swiglu", "", "forward", "output", "float32", math.inf, 1e-5, "RuntimeError: EZ9999")


def test_markdown_is_a_bug_report() -> None:
    text = report.as_markdown(_result(GOOD, BAD, RAISED))
    assert "Ascend910B3 (npu:0) against the CPU: FAILED (2 of 3)" in text
    assert "torch 2.9.0" in text
    assert "HF32 off" in text
    assert "| rms_norm | 1.0e-07 |" in text
    assert "**3.1e-01** ✗" in text
    assert "- CLIP: projector, bfloat16, gradient: 3.1e-01, limit 0.1" in text
    assert "- swiglu, float32, output: RuntimeError: EZ9999" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_a_simulated_device_says_so() -> None:
    text = report.as_markdown(_result(GOOD, name="Ascend910B", simulated=True))
    assert "Ascend910B, simulated (npu:0)" in text
    assert "nothing about hardware" in text


def test_json_has_every_comparison_and_is_valid() -> None:
    result = json.loads(report.as_json(_result(GOOD, BAD, RAISED)))
    assert {"format", "passed", "device", "name", "simulated", "settings", "versions", "seconds"} <= result.keys()
    assert result["passed"] is False
    assert [each["passed"] for each in result["comparisons"]] == [True, False, False]
    assert result["comparisons"][2]["error"] is None


def test_nothing_compared_is_not_a_pass() -> None:
    assert not _result().passed


def _invoke(*options: str) -> Any:
    return CliRunner().invoke(app, ["verify", *options])


@pytest.mark.slow
@pytest.mark.usefixtures("few_sizes")
def test_command(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = _invoke("--device", device.type, "--quick")
    assert right.exit_code == 0, right.output
    assert "passed" in right.output
    assert ("simulated" in right.output) == (device.type == "npu")
    assert "…" not in right.output  # the table fits into 80 columns

    exact: Callable[..., torch.Tensor] = operations.swiglu
    monkeypatch.setattr(operations, "swiglu", lambda gate, value: 1.01 * exact(gate, value))
    wrong = _invoke("--device", device.type, "--quick", "--json")
    assert wrong.exit_code == 1
    failed = [each for each in json.loads(wrong.stdout)["comparisons"] if not each["passed"]]
    assert {each["subject"] for each in failed} == {"swiglu"}
