"""CUDA calls by product files raise in a simulated run; those by anybody else do not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch_npu.simulation import tripwire
from torch_npu.simulation.tripwire import CudaTouchedError

PRODUCT_SOURCE = """
import torch
from torch import nn

WRONG = {
    "empty_cache": lambda: torch.cuda.empty_cache(),
    "manual_seed": lambda: torch.cuda.manual_seed(0),
    "manual_seed_all": lambda: torch.cuda.manual_seed_all(0),
    "memory_allocated": lambda: torch.cuda.memory_allocated(),
    "max_memory_allocated": lambda: torch.cuda.max_memory_allocated(),
    "reset_peak_memory_stats": lambda: torch.cuda.reset_peak_memory_stats(),
    "synchronize": lambda: torch.cuda.synchronize(),
    "set_device": lambda: torch.cuda.set_device(0),
    "current_device": lambda: torch.cuda.current_device(),
    "current_stream": lambda: torch.cuda.current_stream(),
    "get_device_name": lambda: torch.cuda.get_device_name(),
    "get_rng_state": lambda: torch.cuda.get_rng_state(),
    "Tensor.cuda": lambda: torch.ones(1).cuda(),
    "Module.cuda": lambda: nn.Linear(1, 1).cuda(),
    "autocast": lambda: torch.autocast("cuda"),
    "autocast keyword": lambda: torch.amp.autocast(device_type="cuda"),
    "cuda.amp.autocast": lambda: torch.cuda.amp.autocast(),
    "GradScaler": lambda: torch.amp.GradScaler(),
}

def right():
    torch.manual_seed(0)
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
    with torch.autocast("npu"), torch.autocast("cpu"):
        pass
    torch.amp.GradScaler("npu")
    model = nn.Linear(2, 2).to("npu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 2, device="npu")).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

def swallow():
    try:
        torch.cuda.empty_cache()
    except AssertionError:
        pass
"""


@pytest.fixture
def product(tmp_path: Path) -> Iterator[ModuleType]:
    """A package of its own in the product's place, until the test ends."""
    before = tripwire._product
    (tmp_path / "product").mkdir()
    source = tmp_path / "product" / "code.py"
    source.write_text(PRODUCT_SOURCE)
    spec = importlib.util.spec_from_file_location("product_code", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tripwire.arm(tmp_path / "product")
    yield module
    tripwire.touched.clear()
    tripwire._product = before


NAMES = [line.split('"')[1] for line in PRODUCT_SOURCE.splitlines() if line.startswith('    "')]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.cuda.amp is deprecated, and caught all the same
@pytest.mark.parametrize("name", NAMES)
def test_product_code_is_caught(product: ModuleType, name: str) -> None:
    with pytest.raises(CudaTouchedError, match=r"code\.py:\d+: .*in a run on the simulated NPU"):
        product.WRONG[name]()
    assert len(tripwire.touched) == 1


def test_device_neutral_product_code_is_not(product: ModuleType) -> None:
    product.right()
    assert tripwire.touched == []


def test_a_swallowed_error_is_remembered(product: ModuleType) -> None:
    product.swallow()
    assert len(tripwire.touched) == 1


def test_other_code_is_not_blamed(product: ModuleType) -> None:
    torch.cuda.empty_cache()
    torch.cuda.manual_seed_all(0)
    with pytest.warns(UserWarning, match="CUDA is not available"):
        torch.autocast("cuda")
    assert tripwire.touched == []


def test_the_real_product_is_watched() -> None:
    assert tripwire._product is not None
    assert tripwire._product.endswith("/src/llava_npu/")
