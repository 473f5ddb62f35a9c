"""Memory does not grow with the number of records; benchmarks/data_memory.py measures the same at full size."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_npu.data.formats import json_spans, record_files
from llava_npu.data.records import open_records


def write(path: Path, count: int) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat is in this image?"}, {"from": "gpt", "value": "a cat " * 10}]
    lines = (json.dumps({"id": str(i), "image": f"{i}.jpg", "conversations": turns}) for i in range(count))
    is_list = path.suffix == ".json"
    path.write_text("[" * is_list + (",\n" if is_list else "\n").join(lines) + "]" * is_list)
    return path


def peak(action: Callable[[], Any]) -> int:
    """The most bytes that Python and NumPy had allocated meanwhile; mapped files are not among them."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_memory_is_flat(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(record_files, "CACHED_FROM_BYTES", 0)
    monkeypatch.setattr(record_files, "INDEX_BLOCK", 256)
    monkeypatch.setattr(json_spans, "WINDOW_BYTES", 1 << 14)
    small, large = write(tmp_path / f"small{suffix}", 1000), write(tmp_path / f"large{suffix}", 8000)

    def read(path: Path) -> None:
        records = open_records(path)
        for index in range(0, len(records), 97):
            assert records[index].id == str(index)

    read(write(tmp_path / f"first{suffix}", 1000))  # what is imported and cached on first use
    ours_small, ours_large = peak(lambda: read(small)), peak(lambda: read(large))
    whole = peak(lambda: [json.loads(line.rstrip(",\n]").lstrip("[")) for line in large.open(encoding="utf-8")])
    assert ours_large < 1.3 * ours_small
    assert ours_large < whole / 40
