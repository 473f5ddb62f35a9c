from __future__ import annotations

import socket
from pathlib import Path

import pytest

from llava_npu.diagnostics import machine
from llava_npu.diagnostics.machine import Chip, is_taken, read_npu_smi, watched_ports

# As npu-smi of the Ascend HDK 25.5 prints it.
TABLE = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.2                   Version: 25.5.2                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 89.9        39                0    / 0             |
| 0                         | 0000:41:00.0  | 0           0    / 0          2922 / 65536         |
+===========================+===============+====================================================+
| 5     910B3               | Critical      | -           -                 0    / 0             |
| 0     5                   | 0000:42:00.0  | 0           0    / 0          2922 / 65536         |
+===========================+===============+====================================================+
"""


def _npu_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "npu-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_chips_and_driver_from_npu_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_npu_smi(TABLE) == (Chip(0, "910B3", "OK"), Chip(5, "910B3", "Critical"))
    _npu_smi(tmp_path, f"cat <<'END'\n{TABLE}END", monkeypatch)
    ascend = machine._ascend()
    assert ascend.driver == "25.5.2"
    assert len(ascend.chips) == 2
    assert ascend.npu_smi_problem == ""


def test_an_npu_smi_that_fails_is_a_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _npu_smi(tmp_path, "echo 'dcmi module initialize failed. ret is -8005'; exit 255", monkeypatch)
    assert machine._ascend().npu_smi_problem == "npu-smi info failed: dcmi module initialize failed. ret is -8005"


def test_an_npu_smi_that_hangs_is_a_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _npu_smi(tmp_path, "exec sleep 60", monkeypatch)
    monkeypatch.setattr(machine, "_COMMAND_SECONDS", 0.2)
    assert "did not answer" in machine._ascend().npu_smi_problem


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        ("aarch64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=9.1.0\n", "9.1.0"),
        ("x86_64-linux/ascend_toolkit_install.info", "version=8.3.RC1\ninnerversion=V100\n", "8.3.RC1"),
        ("version.cfg", "# comment\nruntime_running_version=[8.5.0:8.5.0]\n", "8.5.0"),
        ("unrelated.txt", "version=1", None),
    ],
)
def test_cann_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, version: str | None
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    ascend = machine._ascend()
    assert (ascend.cann, ascend.cann_folder, ascend.sourced) == (version, tmp_path, True)


def test_ports() -> None:
    assert watched_ports({"MASTER_PORT": "29500", "HCCL_IF_BASE_PORT": "50000"}) == [29500, *range(50000, 50016)]
    assert watched_ports({"MASTER_PORT": "auto", "HCCL_IF_BASE_PORT": "99999"}) == []
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert is_taken(port)
    assert not is_taken(port)
    assert is_taken(70000)  # no such port: it cannot be had


def test_versions_are_read_from_metadata_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "transformers-4.37.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.37.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.installed(["transformers", "no-such-package"]) == {"transformers": "4.37.2"}


def test_secrets_stay_out() -> None:
    assert machine._matters("HCCL_CONNECT_TIMEOUT")
    assert machine._matters("MASTER_PORT")
    assert not machine._matters("HF_TOKEN")
    assert not machine._matters("HOME")
