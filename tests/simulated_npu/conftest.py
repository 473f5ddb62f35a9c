"""The tests of the simulated NPU call its operators wrongly on purpose: their calls are not the product's."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_npu.simulation import recording

    monkeypatch.setattr(recording, "_folder", None)
