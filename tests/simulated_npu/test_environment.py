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
