"""What a run sets for its device: only what the user has not, before the first work, and said aloud."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch

from llava_npu import devices
from llava_npu.devices import Variable
from llava_npu.devices.cpu import CpuDevice
from llava_npu.devices.npu import NpuDevice
from llava_npu.devices.peaks import PEAKS, cube_tflops, published, published_tflops

NAMES = (
    "PYTORCH_NPU_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "HCCL_CONNECT_TIMEOUT",
    "HCCL_IF_BASE_PORT",
    "MASTER_PORT",
    "RANK",
    "LLAVA_TEST",
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what a test adds is taken away
        monkeypatch.delenv(name)


class Particular(CpuDevice):
    """A device that wants things."""

    def environment(self) -> list[Variable]:
        return [Variable("LLAVA_TEST", "1", "it is better")]

    def use_exact_float32(self) -> list[str]:
        return ["allow_tf32=False"]

    def warnings(self) -> list[str]:
        return ["something is wrong: mend it"]


def test_what_is_set_is_said() -> None:
    said: list[str] = []
    devices.apply_environment(Particular(), said.append)
    assert os.environ["LLAVA_TEST"] == "1"
    assert said[0] == "LLAVA_TEST=1 (it is better)"
    assert said[1].startswith("allow_tf32=False")
    assert said[2] == "warning: something is wrong: mend it"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_TEST", "")  # set, though to nothing
    said: list[str] = []
    devices.apply_environment(Particular(), said.append)
    assert os.environ["LLAVA_TEST"] == ""
    assert not [line for line in said if "LLAVA_TEST" in line]


def test_one_process_of_a_launch_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    said: list[str] = []
    devices.apply_environment(Particular(), said.append)
    assert said == []
    assert os.environ["LLAVA_TEST"] == "1"


def test_a_cpu_wants_nothing() -> None:
    said: list[str] = []
    devices.apply_environment(CpuDevice(), said.append)
    assert said == []


def _advice() -> dict[str, str]:
    return {variable.name: variable.value for variable in NpuDevice().environment()}


def test_advice_for_ascend() -> None:
    assert _advice() == {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "HCCL_CONNECT_TIMEOUT": "1200"}


def test_one_allocator_variable_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # with both, TorchNPU 26.2 ends the process
    assert "PYTORCH_NPU_ALLOC_CONF" not in _advice()


def test_jobs_on_one_machine_get_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for master in range(29500, 29600):
        monkeypatch.setenv("MASTER_PORT", str(master))
        base = int(_advice()["HCCL_IF_BASE_PORT"])
        assert base >= 1024
        assert base + 32 <= 32768
        ports |= set(range(base, base + 32))
    assert len(ports) == 100 * 32
    monkeypatch.setenv("MASTER_PORT", "nonsense")  # torch will say so
    assert "HCCL_IF_BASE_PORT" not in _advice()


def test_the_global_hook_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NpuDevice().warnings() == []
    monkeypatch.setitem(sys.modules, "torch_npu.contrib.transfer_to_npu", types.ModuleType("transfer_to_npu"))
    assert "transfer_to_npu is active" in NpuDevice().warnings()[0]


def test_float32_is_exact_afterwards_and_changed_once(device: torch.device) -> None:
    chosen = devices.select(device.type)
    chosen.use_exact_float32()
    assert chosen.use_exact_float32() == []
    if device.type == "npu":
        import torch_npu

        assert not torch_npu.npu.conv.allow_hf32
        assert torch_npu.npu.is_jit_compile_false()


def test_work_on_a_stream_of_its_own(device: torch.device) -> None:
    chosen = devices.select(device.type)
    with chosen.stream():
        result = torch.ones(3, device=device) * 2
    chosen.synchronize()
    assert result.tolist() == [2, 2, 2]


def test_ascend_peaks_follow_from_cores_and_clock() -> None:
    for peak in PEAKS:
        if peak.cores:
            assert peak.clock_ghz is not None
            assert peak.bf16 == pytest.approx(cube_tflops(peak.cores, peak.clock_ghz), abs=0.05)
    assert cube_tflops(20, 1.8) == pytest.approx(294.9, abs=0.05)
    b3 = published("Ascend910B3")
    assert b3 is not None
    assert (b3.cores, b3.clock_ghz, b3.memory_gib) == (20, 1.8, 64)


def test_the_devices_own_count_of_cores_corrects_the_table() -> None:
    as_listed = published_tflops("Ascend910B3", torch.bfloat16)
    assert published_tflops("Ascend910B3", torch.bfloat16, cores=20) == as_listed
    assert published_tflops("Ascend910B3", torch.bfloat16, cores=24) == pytest.approx(353.9, abs=0.1)
    assert published_tflops("NVIDIA H100 80GB HBM3", torch.bfloat16, cores=24) == 989.0
