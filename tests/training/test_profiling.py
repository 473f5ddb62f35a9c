"""`--profile`: the trace of a few steps, and the table of where their time went."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from llava_npu import devices
from llava_npu.config import RunConfig
from llava_npu.devices.profiling import ProfiledOperation, ascend_kind, kernel_kind, operator_kind
from llava_npu.errors import UserError
from llava_npu.training import train
from llava_npu.training.monitoring.profiling import ProfiledSteps, StepProfiler, time_by_kind

MakeRun = Callable[..., RunConfig]
KINDS = ["input", "host", "matrix", "vector", "attention", "communication", "idle"]


def _profiled(run: RunConfig, steps: str) -> str:
    console = Console(file=io.StringIO(), width=200)
    train(run, profile=steps, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_is_profiled(make_run: MakeRun, device: torch.device) -> None:
    run = make_run(max_steps=4, batch_size=2, pack_tokens=256)
    shown = _profiled(run, "2-3")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    table = {row[0]: (row[1], float(row[2].replace(",", ""))) for row in cells}
    assert list(table) == [*KINDS, "in all"]
    times = {kind: table[kind][1] for kind in KINDS}
    assert sum(times.values()) == pytest.approx(table["in all"][1], abs=0.5)  # as rounded
    # The simulated NPU takes operators of the host, with which data is loaded, for its own.
    kinds = KINDS[device.type == "npu" : 5]
    assert min(times[kind] for kind in kinds) > 0, times
    assert times["communication"] == 0  # it is alone
    folder = run.output_path / "profile" / "steps-2-3" / "process-0"
    pattern = "*_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json" if device.type == "npu" else "trace.json"
    (trace,) = folder.glob(pattern)
    assert trace.read_text().count("llava_npu: step") == 2
    train(run.model_copy(update={"max_steps": 1}), fresh=True, console=Console(quiet=True))
    assert not folder.exists()


@pytest.mark.parametrize(("made", "profiled"), [(0, "steps 1-3"), (2, "steps 3"), (5, "nothing")])
def test_steps_that_were_made_before_are_not_profiled(made: int, profiled: str, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    profiler = StepProfiler(ProfiledSteps(1, 3), devices.select("cpu"), tmp_path, console)
    with profiler.open(made):
        for step in range(made + 1, 7):
            with profiler.step(step), profiler.input():
                torch.ones(2, 2) @ torch.ones(2, 2)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert (f"step {made} was made before; {profiled}" in shown) == (made > 0)
    assert (tmp_path / "trace.json").is_file() == ("trace:" in shown) == (profiled != "nothing")


def test_a_step_that_fails_stops_the_profiler(tmp_path: Path) -> None:
    for _ in range(2):  # torch refuses to start a second one while the first runs
        profiler = StepProfiler(ProfiledSteps(1, 2), devices.select("cpu"), tmp_path, Console(quiet=True))
        with pytest.raises(ZeroDivisionError), profiler.open(0), profiler.step(1):
            1 / 0  # noqa: B018


@pytest.mark.parametrize("steps", ["5-3", "0", "0-2", "-1", "2-", "two", "", "1,2", "1.5"])
def test_what_names_no_steps_is_refused(steps: str) -> None:
    with pytest.raises(UserError, match=r"--profile '.*': give a step, as in 20, or the first and the last"):
        ProfiledSteps.parse(steps)


def test_steps_past_the_end_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"--profile 4-5: the run has 4 steps; give steps from 1 to 4\."):
        _profiled(make_run(max_steps=4), "4-5")


@pytest.mark.parametrize("host_computes", [True, False])
def test_each_moment_counts_once(host_computes: bool) -> None:
    operations = [
        ProfiledOperation("llava_npu: step", "range", 0, 100),
        ProfiledOperation("llava_npu: input", "range", 0, 20),
        ProfiledOperation("aten::mul", "vector", 10, 30),  # half of it while data is loaded
        ProfiledOperation("aten::mm", "matrix", 25, 50),
        ProfiledOperation("attention", "attention", 40, 60),
        ProfiledOperation("all_reduce", "communication", 50, 80),
        ProfiledOperation("synchronize", "waiting", 80, 90),
        ProfiledOperation("aten::mm", "matrix", 110, 120),  # after the last step
    ]
    times = time_by_kind(operations, host_computes=host_computes)
    assert {kind: round(1e9 * seconds) for kind, seconds in times.items()} == {
        "input": 20 if host_computes else 10,
        "host": 10,
        "matrix": 15,
        "vector": 5 if host_computes else 15,
        "attention": 20,
        "communication": 20,
        "idle": 10,
    }


@pytest.mark.parametrize(
    ("kind", "names"),
    {
        "matrix": ["aten::mm", "aten::addmm", "aten::bmm", "aten::convolution_backward", "aten::mkldnn_convolution"],
        "vector": ["aten::add_", "aten::native_layer_norm", "aten::_softmax", "aten::copy_", "aten::_fused_adamw_"],
        "attention": ["aten::_scaled_dot_product_flash_attention_for_cpu_backward", "npu::npu_fusion_attention"],
        None: ["aten::view", "aten::linear", "aten::empty_like", "Optimizer.step#AdamW.step", "AddmmBackward0"],
    }.items(),
)
def test_operators_of_the_host(kind: str | None, names: list[str]) -> None:
    assert [operator_kind(name) for name in names] == [kind] * len(names)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("matrix", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64"),
        ("matrix", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT"),
        ("attention", "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>"),
        ("communication", "ncclDevKernel_AllReduce_Sum_f32_RING_LL"),
        ("vector", "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"),
    ],
)
def test_kernels_of_a_gpu(kind: str, name: str) -> None:
    assert kernel_kind(name) == kind


@pytest.mark.parametrize(
    ("kind", "operator", "core"),
    [
        ("matrix", "MatMulV2", "AI_CORE"),
        ("matrix", "GroupedMatmul", "MIX_AIC"),
        ("attention", "FlashAttentionScoreGrad", "MIX_AIC"),
        ("vector", "RmsNorm", "AI_VECTOR_CORE"),
        ("vector", "Index", "AI_CPU"),
        ("communication", "hcom_allReduce_", "HCCL"),
    ],
)
def test_kernels_of_an_npu(kind: str, operator: str, core: str) -> None:
    assert ascend_kind(operator, core) == kind


def test_a_trace_of_torch_npu_is_read(tmp_path: Path) -> None:
    from llava_npu.devices.profiling import AscendProfiler

    class Module:
        profile = ProfilerActivity = ProfilerLevel = type(
            "", (), {"__init__": lambda self, **_: None, "CPU": 0, "NPU": 1, "Level1": 2}
        )
        tensorboard_trace_handler = staticmethod(lambda folder: None)
        _ExperimentalConfig = staticmethod(lambda profiler_level: None)

    profiler = AscendProfiler(tmp_path / "trace", Module)
    output = tmp_path / "trace" / "host_1_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
    output.mkdir(parents=True)
    (output / "kernel_details.csv").write_text(
        "Step Id,Device_id,Name,Type,OP State,Accelerator Core,Start Time(us),Duration(us)\n"
        "0,0,aclnnMm,MatMulV2,dynamic,AI_CORE,1750000000000001.500\t,2.5\n"
    )
    events = [
        {"ph": "M", "name": "process_name", "args": {"name": "Python"}},
        {"ph": "X", "name": "llava_npu: step", "ts": "1750000000000000.000", "dur": 10.0, "pid": 1, "tid": 1},
        {"ph": "X", "name": "aten::mm", "ts": "1750000000000001.000", "dur": 1.0, "pid": 1, "tid": 1},
    ]
    (output / "trace_view.json").write_text(json.dumps(events))
    times = time_by_kind(profiler.operations(), host_computes=False)
    assert {kind: round(1e6 * seconds, 1) for kind, seconds in times.items() if seconds} == {
        "matrix": 2.5,
        "host": 7.5,
    }
