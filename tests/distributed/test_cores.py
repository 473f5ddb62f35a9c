"""How many cores and threads a process takes: affinity, cgroup quotas of both versions, and what the user has set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_npu import devices
from llava_npu.devices import cpu
from llava_npu.distributed import cores


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "250000 100000"}, 2.5),  # a container sees its own cgroup as the root
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
        ("0::/a/b", {"a/cpu.max": "800000 100000", "a/b/cpu.max": "150000 50000"}, 3.0),  # the narrowest counts
        ("0::/", {}, None),
        ("5:cpu,cpuacct:/d", {"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, None),
        ("5:cpu,cpuacct:/d", {"cpu/d/cpu.cfs_quota_us": "400000", "cpu/d/cpu.cfs_period_us": "100000"}, 4.0),
        (  # version 1 in a container: the path is the host's, of which the mount shows the end alone
            "5:cpu,cpuacct:/docker/0123",
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("3:memory:/d\n0::/d", {"d/cpu.max": "100000 100000", "memory/d/cpu.cfs_quota_us": "1"}, 1.0),
    ],
)
def test_quota(tmp_path: Path, own: str, files: dict[str, str], limit: float | None) -> None:
    _write(tmp_path, {"self": own, **files})
    assert cores.quota(tmp_path, tmp_path / "self") == limit


def test_no_cgroups_no_limit(tmp_path: Path) -> None:
    assert cores.quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize(("limit", "usable"), [(None, 8), (2.5, 2), (0.5, 1), (16.0, 8)])
def test_usable_cores_are_those_of_the_affinity_within_the_quota(
    limit: float | None, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "affinity", lambda: set(range(8)))
    monkeypatch.setattr(cores, "quota", lambda: limit)
    assert cores.usable_cores() == usable


def test_processes_share_the_cores_unless_the_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    variables = cores.thread_variables(5)
    assert variables["OMP_NUM_THREADS"] == "2"
    assert cores.thread_variables(64)["OMP_NUM_THREADS"] == "1"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not cores.user_has_chosen()
    assert cores.thread_variables(2) == {}  # a launch inside a launch: the share is divided already
    monkeypatch.delenv("LLAVA_NPU_SET_THREADS")
    assert cores.user_has_chosen()


@pytest.fixture
def twelve_cores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A host of 64 cores whose container may use 12. Returns the threads that torch has, first 64, in a list."""
    threads = [64]
    monkeypatch.setattr(cores, "usable_cores", lambda: 12)
    monkeypatch.setattr(cores, "affinity", lambda: set(range(64)))
    monkeypatch.setattr(cpu, "_threads_set", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: threads.__setitem__(0, number))
    for name in ("OMP_NUM_THREADS", "LLAVA_NPU_SET_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return threads


def test_choosing_a_device_sets_torchs_threads(twelve_cores: list[int]) -> None:
    devices.select("cpu")
    assert twelve_cores == [12]


def test_loader_workers_take_their_part(twelve_cores: list[int]) -> None:
    devices.share_host_threads()
    devices.share_host_threads(workers=4)
    assert twelve_cores == [8]
    devices.share_host_threads(workers=20)
    assert twelve_cores == [1]


def test_processes_of_a_launch_take_their_part(twelve_cores: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # torchrun
    devices.share_host_threads(workers=1)
    assert twelve_cores == [3]


def test_a_launcher_of_ours_has_divided_them(twelve_cores: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    twelve_cores[0] = 4
    for name, value in {"OMP_NUM_THREADS": "4", "LLAVA_NPU_SET_THREADS": "1", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    devices.share_host_threads(workers=2)
    assert twelve_cores == [2]


def test_what_the_user_has_set_stays(twelve_cores: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    twelve_cores[0] = 5  # by torch.set_num_threads: torch starts with no such number here
    devices.share_host_threads()
    assert twelve_cores == [5]
    twelve_cores[0] = 64
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    devices.share_host_threads()
    assert twelve_cores == [64]


def test_how_busy_the_cores_are_is_seen_from_the_kernels_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    #        user nice system idle iowait irq softirq steal
    before = "cpu  9 9 9 9 9 9 9 9\ncpu0 100 0 0 100 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0\nintr 1"
    after = "cpu  9 9 9 9 9 9 9 9\ncpu0 160 0 15 115 10 0 0 0\ncpu1 0 0 0 90 10 0 0 0\ncpu2 100 0 0 0 0 0 0 0\nintr 1"
    stat = tmp_path / "stat"
    stat.write_text(before)
    monkeypatch.setattr(cores, "_STAT", stat)
    monkeypatch.setattr(cores, "affinity", lambda: {0, 1})  # the third core is not ours
    monkeypatch.setattr("time.sleep", lambda seconds: stat.write_text(after))
    assert cores.look().busy == pytest.approx(75 / 200)
    stat.unlink()
    assert cores.look().busy == 0  # not Linux
