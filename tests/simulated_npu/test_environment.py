"""What a new process sees: torch finds the device by itself, as where the real package is installed, with the number
of devices and the memory that the environment asks for.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch_npu


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_distribution_is_named_simulated() -> None:
    assert importlib.metadata.version("torch-npu") == torch_npu.__version__ == "2.13.0+simulated"


def test_import_torch_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATED_NPU_COUNT", "5")
    monkeypatch.setenv("SIMULATED_NPU_MEMORY", "3MiB")
    answer = python(
        "import torch; x = torch.ones(1, device='npu:4'); print(x.device, torch.npu.device_count(),"
        " torch.npu.mem_get_info(4)[1])"
    )
    assert answer.stdout.split() == ["npu:4", "5", str(3 << 20)], answer.stderr


def test_autoload_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    answer = python("import sys, torch; print('torch_npu' in sys.modules)")
    assert answer.stdout.strip() == "False", answer.stderr


def test_bad_device_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATED_NPU_COUNT", "many")
    answer = python("import torch_npu; torch_npu.npu.device_count()")
    assert answer.returncode != 0
    assert "SIMULATED_NPU_COUNT must be a whole number from 1 to 16, got 'many'" in answer.stderr


_SETTINGS = """
import os, torch, torch_npu
from torch_npu.simulation import allocator_settings
assert allocator_settings() is None
torch_npu.npu.device_count(), torch_npu.npu.is_available()
os.environ["PYTORCH_NPU_ALLOC_CONF"] = "early"
torch.npu.set_device(0)
os.environ["PYTORCH_NPU_ALLOC_CONF"] = "late"
torch.ones(1, device="npu")
print(allocator_settings())
"""


def test_the_allocator_reads_its_settings_once_when_a_device_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    answer = python(_SETTINGS)
    assert answer.stdout.strip() == "early", answer.stderr


def test_two_allocator_variables_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    answer = python("import torch, torch_npu; torch.npu.set_device(0); print('alive')")
    assert answer.returncode != 0
    assert "alive" not in answer.stdout


@pytest.mark.parametrize("preset", [None, "PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_every_command_sets_the_allocator_before_it_reads(preset: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`devices.select`, which every command calls first, and never against what the user has set."""
    for name in ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if preset:
        monkeypatch.setenv(preset, "max_split_size_mb:256")
    answer = python(
        "from llava_npu import devices; from torch_npu.simulation import allocator_settings;"
        "devices.select('npu'); print(allocator_settings())"
    )
    assert answer.stdout.strip() == ("max_split_size_mb:256" if preset else "expandable_segments:True"), answer.stderr
