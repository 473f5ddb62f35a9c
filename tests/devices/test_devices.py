"""The device objects, on whatever this machine has."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch

from llava_npu import UserError, ascend_chips, devices
from llava_npu.devices import npu
from llava_npu.devices.peaks import PEAKS, published_tflops


@pytest.fixture(autouse=True)
def _restore_device() -> None:
    yield
    devices.select("cpu")


def test_the_cpu_is_always_there() -> None:
    device = devices.select("cpu")
    assert devices.current() is device
    assert device.torch_device == torch.device("cpu")
    memory = device.memory()
    assert 0 < memory.free <= memory.total
    assert memory.peak > 0
    assert device.distributed_backend == "gloo"
    assert 0.001 < device.peak_tflops(torch.float32) < 100


def test_rng_state_repeats() -> None:
    device = devices.select("cpu")
    state = device.rng_state()
    first = torch.rand(3)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_auto_prefers_accelerators_and_always_finds_something() -> None:
    assert devices.kinds() == ["npu", "cuda", "cpu"]
    assert devices.select("auto").is_available()


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_asking_for_an_absent_device_names_what_there_is(kind: str) -> None:
    present = {"npu": "torch_npu" in sys.modules, "cuda": torch.cuda.is_available()}[kind]
    if present:
        pytest.skip(f"this process has {kind}")
    with pytest.raises(UserError, match=rf"device '{kind}' is not available: .*\n?.*Found here: .*cpu"):
        devices.select(kind)


@pytest.mark.parametrize(("name", "message"), [("gpu", "allowed are auto, npu, cuda, cpu"), ("cpu:x", "number")])
def test_a_wrong_name_says_what_is_allowed(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        devices.select(name)


def test_a_broken_torch_npu_is_a_sentence_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "torch_npu" in sys.modules:
        pytest.skip("this process has a working torch_npu")
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu/__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    npu._torch_npu.cache_clear()
    try:
        assert devices.select("auto").kind != "npu"
        with pytest.raises(UserError, match=r"libhccl\.so.*set_env\.sh"):
            devices.select("npu")
    finally:
        sys.modules.pop("torch_npu", None)
        npu._torch_npu.cache_clear()


def test_peak_figures_by_product_name() -> None:
    assert published_tflops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989.0
    assert published_tflops("NVIDIA H100 PCIe", torch.bfloat16) == 756.0
    assert published_tflops("Ascend910B3", torch.bfloat16) == 294.9  # 20 cores × 8192 FLOP × 1.8 GHz
    assert published_tflops("Ascend910B3", torch.bfloat16) == pytest.approx(20 * 8192 * 1.8e9 / 1e12, abs=0.1)
    assert published_tflops("an unknown product", torch.bfloat16) is None
    assert all(peak.source for peak in PEAKS)


def test_a_cpu_gives_freed_memory_back() -> None:
    device = devices.select("cpu")
    blocks = [torch.ones(300_000) for _ in range(200)]  # 240 MB in blocks that glibc keeps when they are freed
    keep = torch.ones(1000)  # behind them, so that the heap cannot shrink by itself
    held = psutil.Process().memory_info().rss
    del blocks
    device.empty_cache()
    assert psutil.Process().memory_info().rss < held - 200e6
    assert keep.sum() == 1000


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("Ascend910A", True),
        ("Ascend910PremiumA", True),
        ("Ascend910B", True),
        ("Ascend310P3", True),
        ("310B4", True),
        ("Ascend910B3", False),
        ("910B2C", False),
        ("Ascend910_9391", False),
        ("Ascend950PR", False),
        ("Ascend910", False),  # what npu-smi calls an A3
        ("Ascend999", False),  # nothing is known against it
    ],
)
def test_chips_without_the_operators_are_refused_by_name(name: str, refused: bool) -> None:
    assert bool(ascend_chips.refusal(name)) == refused


def test_a_chip_without_the_operators_is_refused_before_anything_runs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type != "npu":
        pytest.skip("it is about NPUs")
    monkeypatch.setattr("torch_npu.npu.get_device_name", lambda index=None: "Ascend310P3")
    with pytest.raises(UserError, match=r"Ascend310P3.* \(Ascend 310\) has no operators .* Use an Atlas A2"):
        devices.select("npu")


def test_4_bits_on_an_npu_need_the_library_that_others_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    device = npu.NpuDevice()
    assert device.quantized_bits == ()
    assert "COMPUTE_BACKEND=npu" in device.quantization_hint
    (package / "libbitsandbytes_npu.so").touch()
    assert device.quantized_bits == (4,)
