"""From facts to findings: what is well is left alone, and each trap is found, explained and given its fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_npu.diagnostics.doctor import findings
from llava_npu.diagnostics.findings import Finding, Level
from llava_npu.diagnostics.machine import Ascend, Chip, Disk, Machine
from llava_npu.diagnostics.trial import DeviceFacts
from llava_npu.distributed.cores import Cores

MakeMachine = Callable[..., Machine]
NO_ASCEND = {
    "versions": {"torch-npu": None},
    "ascend": {"cann": None, "cann_folder": None, "sourced": False, "driver": None, "nodes": (), "chips": ()},
    "trial": {"devices": ()},
}


def _problems(machine: Machine) -> list[Finding]:
    return [finding for finding in findings(machine) if finding.level != Level.OK]


def test_a_healthy_ascend_has_no_problems(machine: MakeMachine) -> None:
    assert _problems(machine()) == []


def test_a_machine_without_ascend_needs_none(machine: MakeMachine) -> None:
    found = findings(machine(**NO_ASCEND))
    assert not [finding for finding in found if finding.level != Level.OK]
    assert not [finding for finding in found if finding.check in ("CANN", "driver", "torch-npu")]


TRAPS: list[tuple[str, dict[str, Any], Level, str, str, str]] = [
    # what is wrong, changes, level, check, part of what is found, part of the fix
    ("old Python", {"python": "3.9.2"}, Level.ERROR, "Python", "3.9.2", "python3.11 -m venv"),
    ("no torch", {"versions": {"torch": None}}, Level.ERROR, "torch", "not installed", "pip install 'torch>=2.7'"),
    (
        "old transformers",
        {"versions": {"transformers": "4.37.2"}},
        Level.ERROR,
        "transformers",
        "4.37.2",
        "pip install 'transformers>=5.18,<6'",
    ),
    ("new transformers", {"versions": {"transformers": "6.0"}}, Level.ERROR, "transformers", "6.0", "<6"),
    ("old peft", {"versions": {"peft": "0.4"}}, Level.WARNING, "peft", "0.4", "pip install 'peft>=0.18'"),
    (
        "DeepSpeed without offload on NPUs",
        {"versions": {"deepspeed": "0.14.2"}},
        Level.WARNING,
        "deepspeed",
        "0.14.2",
        "deepspeed>=0.14.3",
    ),
    (
        "torch-npu for another torch",
        {"versions": {"torch": "2.8.0"}},
        Level.ERROR,
        "torch-npu",
        "torch-npu 2.9.0.post6 with torch 2.8.0",
        "pip install torch==2.9.0+cpu torch-npu==2.9.0.post6 --extra-index-url",
    ),
    (
        "devices without torch-npu",
        {"versions": {"torch-npu": None}},
        Level.ERROR,
        "torch-npu",
        "not installed",
        "pip install torch==2.12.0+cpu torch-npu==2.12.0.post2 --extra-index-url",
    ),
    (
        "CANN too old for torch-npu",
        {"ascend": {"cann": "8.3.RC1"}},
        Level.WARNING,
        "CANN",
        "8.3.RC1 with torch-npu 2.9.0.post6, which was made with CANN 9.1.0",
        "torch-npu==2.8.0 ",
    ),
    (
        "a torch-npu that nobody listed",
        {"versions": {"torch": "2.9.1", "torch-npu": "2.9.1"}},
        Level.WARNING,
        "CANN",
        "knows no CANN release",
        "COMPATIBILITY.md",
    ),
    (
        "no CANN",
        {"ascend": {"cann": None, "cann_folder": None, "sourced": False}},
        Level.ERROR,
        "CANN",
        "not found",
        "Install the CANN 9.1.0 toolkit",
    ),
    (
        "CANN not sourced",
        {"ascend": {"sourced": False, "cann_folder": Path("/usr/local/Ascend/ascend-toolkit/latest")}},
        Level.ERROR,
        "CANN",
        "its environment is not set",
        "source /usr/local/Ascend/ascend-toolkit/set_env.sh",
    ),
    (
        "old driver",
        {"ascend": {"driver": "25.0.1"}},
        Level.ERROR,
        "driver",
        "25.0.1 with CANN 9.1.0",
        "25.2 or newer",
    ),
    (
        "a driver too old for CANN 9.2",
        {
            "versions": {"torch": "2.14.0+cpu", "torch-npu": "2.14.0"},
            "ascend": {"cann": "9.2.0", "driver": "25.2.1"},
        },
        Level.ERROR,
        "driver",
        "25.2.1 with CANN 9.2.0",
        "25.3 or newer",
    ),
    (
        "an Ascend 910A",
        {"ascend": {"chips": (Chip(0, "910A", "OK"),)}, "trial": {"devices": ()}},
        Level.ERROR,
        "chip",
        "910A (the first Ascend 910) has no operators for what llava-npu does",
        "Atlas A2 or A3",
    ),
    (
        "an Ascend 310P",
        {"ascend": {"chips": (Chip(0, "310P3", "OK"),)}, "trial": {"devices": ()}},
        Level.ERROR,
        "chip",
        "npu_fused_infer_attention_score",
        "Atlas A2 or A3",
    ),
    (
        "no driver",
        {"ascend": {"driver": None}},
        Level.WARNING,
        "driver",
        "no version",
        "mount /usr/local/Ascend/driver",
    ),
    (
        "a sick NPU",
        {"ascend": {"chips": (Chip(0, "910B3", "OK"), Chip(1, "910B3", "Alarm"))}},
        Level.ERROR,
        "health",
        "NPU 1 (910B3): Alarm",
        "npu-smi info -t health -i 1",
    ),
    (
        "devices of another group",
        {"ascend": {"closed_nodes": ("/dev/davinci0",)}},
        Level.ERROR,
        "device files",
        "/dev/davinci0",
        "usermod -a -G HwHiAiUser",
    ),
    (
        "numpy 2 with old CANN",
        {
            "versions": {"numpy": "2.1.0", "torch-npu": "2.9.0", "torch": "2.9.0"},
            "ascend": {"cann": "8.5.0"},
        },
        Level.ERROR,
        "numpy",
        "numpy 2.1.0 with CANN 8.5.0",
        "pip install 'numpy<2'",
    ),
    (
        "CANN's packages",
        {"versions": {"decorator": None, "scipy": None}},
        Level.WARNING,
        "CANN's Python packages",
        "decorator, scipy",
        "pip install decorator scipy",
    ),
    (
        "exclusive allocator options",
        {"environment": {"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:250, expandable_segments:True"}},
        Level.ERROR,
        "allocator",
        "max_split_size_mb:250",
        "export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True",
    ),
    (
        "short timeout",
        {"environment": {"HCCL_CONNECT_TIMEOUT": "60"}},
        Level.WARNING,
        "communication",
        "HCCL_CONNECT_TIMEOUT=60",
        "unset HCCL_CONNECT_TIMEOUT",
    ),
    (
        "impossible port",
        {"environment": {"HCCL_IF_BASE_PORT": "70000"}},
        Level.ERROR,
        "communication",
        "70000",
        "unset HCCL_IF_BASE_PORT",
    ),
    (
        "HCCL's ports taken",
        {"environment": {"HCCL_IF_BASE_PORT": "50000"}, "taken_ports": (50003,)},
        Level.ERROR,
        "ports",
        "in use: 50003",
        "unset HCCL_IF_BASE_PORT",
    ),
    (
        "rendezvous taken",
        {"environment": {"MASTER_PORT": "29500"}, "taken_ports": (29500,)},
        Level.ERROR,
        "ports",
        "MASTER_PORT=29500",
        "--master-port=0",
    ),
    (
        "unreadable device list",
        {"environment": {"ASCEND_RT_VISIBLE_DEVICES": "npu0"}},
        Level.ERROR,
        "visible devices",
        "npu0",
        "export ASCEND_RT_VISIBLE_DEVICES=0,1",
    ),
    (
        "blocking launches",
        {"environment": {"ASCEND_LAUNCH_BLOCKING": "1"}},
        Level.WARNING,
        "speed",
        "ASCEND_LAUNCH_BLOCKING=1",
        "unset ASCEND_LAUNCH_BLOCKING",
    ),
    (
        "the global hook",
        {"trial": {"warnings": ("torch_npu.contrib.transfer_to_npu is active: remove its import",)}},
        Level.WARNING,
        "process",
        "transfer_to_npu is active",
        "remove its import",
    ),
    (
        "torch-npu breaks torch",
        {"trial": {"autoload_breaks_torch": True, "torch_error": "libhccl.so: cannot open shared object file"}},
        Level.ERROR,
        "torch",
        "libhccl.so",
        "TORCH_DEVICE_BACKEND_AUTOLOAD=0",
    ),
    (
        "torch broken",
        {"trial": {"torch": None, "torch_error": "libgomp.so.1: cannot open shared object file", "devices": ()}},
        Level.ERROR,
        "torch",
        "libgomp.so.1",
        "pip install --force-reinstall --no-cache-dir torch==2.9.0",
    ),
    (
        "a driver that crashes",
        {"trial": {"died": "use npu devices: crashed (SIGSEGV)", "devices": ()}},
        Level.ERROR,
        "devices",
        "SIGSEGV",
        "npu-smi info",
    ),
    (
        "a device that is not there",
        {"trial": {"broken": {"npu": "torch_npu 2.9.0 finds no NPU"}, "devices": ()}},
        Level.ERROR,
        "npu devices",
        "finds no NPU",
        "npu-smi info",
    ),
    (
        "a device in use",
        {"trial": {"devices": (DeviceFacts("npu:3", "Ascend910B3", 64 << 30, 20 << 30, True, True),)}},
        Level.WARNING,
        "npu:3",
        "20.0 of 64.0 GiB free",
        "--device npu:N",
    ),
    (
        "bitsandbytes",
        {"versions": {"bitsandbytes": "0.49"}},
        Level.WARNING,
        "bitsandbytes",
        "0.49",
        "LoRA in bfloat16",
    ),
    (
        "cores busy with other work",
        {"cores": Cores(machine=2, usable=2, busy=0.97)},
        Level.WARNING,
        "cores",
        "2 of 2 may be used, and other work keeps them 97% busy",
        "top",
    ),
    (
        "more threads than a container's cores",
        {"cores": Cores(machine=64, usable=4, busy=0.0), "environment": {"OMP_NUM_THREADS": "64"}},
        Level.WARNING,
        "cores",
        "4 of 64 may be used, but OMP_NUM_THREADS=64",
        "unset OMP_NUM_THREADS",
    ),
    ("full disk", {"disks": (Disk("cache", Path("/c"), 1000),)}, Level.ERROR, "disk", "0.0 GiB", "Free some space"),
    (
        "docker's shared memory",
        {"disks": (Disk("shared memory", Path("/dev/shm"), 64 << 20),)},
        Level.WARNING,
        "disk",
        "/dev/shm",
        "--shm-size",
    ),
]


@pytest.mark.parametrize(
    ("changes", "level", "check", "what", "fix"), [trap[1:] for trap in TRAPS], ids=[trap[0] for trap in TRAPS]
)
def test_trap_is_found_explained_and_mended(
    machine: MakeMachine, changes: dict[str, Any], level: Level, check: str, what: str, fix: str
) -> None:
    found = [finding for finding in _problems(machine(**changes)) if finding.check == check]
    assert len(found) == 1, found
    assert found[0].level == level
    assert what in found[0].what
    assert found[0].why
    assert fix in found[0].fix


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": {"numpy": "2.1.0"}},  # CANN 9 runs with it
        {"python": "3.13.1", "versions": {"numpy": "2.1.0"}, "ascend": {"cann": "8.5.0"}},
        {"environment": {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:False,max_split_size_mb:250"}},
        {"ascend": {"cann": "8.5.0"}},  # TorchNPU 26.1 runs with it
        {"versions": {"torch-npu": "2.9.0"}, "ascend": {"cann": "9.2.0"}},
        {"environment": {"HCCL_EXEC_TIMEOUT": "0"}},  # no limit
        {"environment": {"MASTER_PORT": "29500", "HCCL_IF_BASE_PORT": "50000"}},
    ],
)
def test_what_looks_like_a_trap_and_is_none(machine: MakeMachine, changes: dict[str, Any]) -> None:
    assert _problems(machine(**changes)) == []


@pytest.mark.parametrize(
    ("name", "found"),
    [("Ascend910B4-1", "Atlas A2, 8 devices in a node"), ("Ascend910_9391", "Atlas A3, 16 devices in a node")],
)
def test_the_family_of_a_chip_is_named(machine: MakeMachine, name: str, found: str) -> None:
    changes = {"ascend": {"chips": ()}, "trial": {"devices": (DeviceFacts("npu:0", name, 1, 1, True, True),)}}
    assert [finding.what for finding in findings(machine(**changes)) if finding.check == "chip"] == [f"{name}: {found}"]


def test_the_simulated_npu_needs_neither_cann_nor_driver(machine: MakeMachine) -> None:
    bare = vars(Ascend())
    simulated = machine(versions={"torch": "2.13.0", "torch-npu": "2.13.0+simulated"}, ascend=bare)
    assert simulated.simulated
    assert _problems(simulated) == []


def test_every_problem_says_what_why_and_how(machine: MakeMachine) -> None:
    everything: dict[str, Any] = {"python": "3.8", "disks": (Disk("run folder", Path("/d"), 3 << 30),)}
    for finding in _problems(machine(**everything)):
        assert finding.what
        assert finding.why
        assert finding.fix
