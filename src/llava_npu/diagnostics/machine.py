"""What `doctor` looks at: facts about this machine, gathered without importing anything that could break."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llava_npu.diagnostics.compatibility import CANN_PYTHON_PACKAGES, LIBRARIES
from llava_npu.diagnostics.trial import ProbeResult, try_torch
from llava_npu.distributed import cores
from llava_npu.distributed.cores import Cores
from llava_npu.errors import UserError
from llava_npu.files.cache import cache_root
from llava_npu.files.home import expand_home

PACKAGES = (*(library.name for library in LIBRARIES), "torch-npu", "bitsandbytes", *CANN_PYTHON_PACKAGES)
_VARIABLES = re.compile(
    r"(HCCL|NCCL|ASCEND|PYTORCH|GLOO|OMP|CUDA|NPU|TORCH|ACCELERATE|HF|LLAVA_NPU)_\w+"
    r"|(MASTER|WORLD|LOCAL_WORLD)_(ADDR|PORT|SIZE)|(LOCAL_)?RANK|TASK_QUEUE_ENABLE|CPU_AFFINITY_CONF"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
_ENTRY_OF_NPU_SMI = re.compile(r"^\|\s*(\d+)\s+(\S*[A-Za-z]\S*)\s*\|\s*([A-Za-z]+)\s*\|")
_COMMAND_SECONDS = 10


@dataclass(frozen=True)
class Chip:
    """One line of npu-smi."""

    index: int
    name: str
    health: str


@dataclass(frozen=True)
class Ascend:
    """Huawei's software and devices, as far as files and npu-smi show them.

    Attributes:
        cann, cann_folder: version and place of CANN, or None where none is found.
        sourced: whether this shell has CANN's environment.
        driver: version of the driver, or None.
        nodes: device files (/dev/davinci*).
        closed_nodes: those that this user may not open.
        chips: what npu-smi lists.
        npu_smi_problem: why npu-smi said nothing, or "".
    """

    cann: str | None = None
    cann_folder: Path | None = None
    sourced: bool = False
    driver: str | None = None
    nodes: tuple[str, ...] = ()
    closed_nodes: tuple[str, ...] = ()
    chips: tuple[Chip, ...] = ()
    npu_smi_problem: str = ""


@dataclass(frozen=True)
class Disk:
    """Free space where something is written, in bytes."""

    purpose: str
    path: Path
    free: int


@dataclass(frozen=True)
class Machine:
    """All facts, from which every finding follows.

    Attributes:
        versions: of Python packages; None for those that are not installed.
        environment: the variables that matter here, secrets left out.
        taken_ports: those of HCCL and of torch's rendezvous that are in use now.
        trial: what happened when torch and the devices were tried.
        cores: the host's, and how busy they were before anything was tried.
    """

    python: str
    system: str
    versions: Mapping[str, str | None]
    environment: Mapping[str, str]
    ascend: Ascend
    disks: tuple[Disk, ...]
    taken_ports: tuple[int, ...]
    trial: ProbeResult
    cores: Cores

    @property
    def simulated(self) -> bool:
        """Whether torch-npu is the simulated one of the tests."""
        return "simulated" in (self.versions["torch-npu"] or "")

    @property
    def is_ascend(self) -> bool:
        """Whether this machine has, or is meant to have, an Ascend."""
        ascend = self.ascend
        return bool(self.versions["torch-npu"] or ascend.nodes or ascend.chips or ascend.cann)


def look(timeout: float) -> Machine:
    """Gathers the facts; `timeout` seconds are given to torch and the devices."""
    environment = {name: value for name, value in sorted(os.environ.items()) if _matters(name)}
    own_cores = cores.look()
    with ThreadPoolExecutor(1) as pool:  # the slowest fact, while the others are gathered
        trial = pool.submit(try_torch, timeout, bool(installed(["torch-npu"])))
        return Machine(
            python=platform.python_version(),
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            versions={name: installed([name]).get(name) for name in PACKAGES},
            environment=environment,
            ascend=_ascend(),
            disks=_disks(),
            taken_ports=tuple(port for port in watched_ports(environment) if is_taken(port)),
            trial=trial.result(),
            cores=own_cores,
        )


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that are installed, from their metadata alone."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def watched_ports(environment: Mapping[str, str]) -> list[int]:
    """Ports that a run on several devices would take."""
    ports = [int(value) for name in ("MASTER_PORT",) if (value := environment.get(name, "")).isdigit()]
    base = environment.get("HCCL_IF_BASE_PORT", "")
    if base.isdigit() and 1024 <= int(base) <= 65520:
        ports += range(int(base), int(base) + 16)
    return ports


def is_taken(port: int) -> bool:
    """Whether something on this machine listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a lingering connection is not a listener
        try:
            probe.bind(("", port))
        except (OSError, OverflowError):
            return True
        return False


def read_npu_smi(text: str) -> tuple[Chip, ...]:
    """The chips in npu-smi's table."""
    found = (_ENTRY_OF_NPU_SMI.match(line) for line in text.splitlines())
    return tuple(Chip(int(entry[1]), entry[2], entry[3]) for entry in found if entry)


def _matters(name: str) -> bool:
    return bool(_VARIABLES.fullmatch(name)) and not _SECRET.search(name)


def _ascend() -> Ascend:
    folder = _cann_folder()
    nodes = sorted(path for path in Path("/dev").glob("davinci*") if path.name[7:].isdigit())
    listing, problem = _npu_smi()
    return Ascend(
        cann=_cann_version(folder) if folder else None,
        cann_folder=folder,
        sourced="ASCEND_HOME_PATH" in os.environ,
        driver=_driver_version(listing),
        nodes=tuple(map(str, nodes)),
        closed_nodes=tuple(str(path) for path in nodes if not os.access(path, os.R_OK | os.W_OK)),
        chips=read_npu_smi(listing),
        npu_smi_problem=problem,
    )


def _cann_folder() -> Path | None:
    named = [os.environ.get(name) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")]
    roots = [Path("/usr/local/Ascend")]
    with suppress(UserError):  # a user without a home folder
        roots.append(expand_home("~/Ascend"))
    usual = [root / name for root in roots for name in ("cann", "ascend-toolkit/latest")]  # from 8.5 on, and before
    return next((folder for folder in [*map(Path, filter(None, named)), *usual] if folder.is_dir()), None)


def _cann_version(folder: Path) -> str | None:
    files = [*folder.glob("*-linux/ascend_toolkit_install.info"), folder / "version.cfg", folder / "version.info"]
    return next((version for file in files if (version := _version_in(file))), None)


def _driver_version(npu_smi: str) -> str | None:
    banner = re.search(r"npu-smi \S+\s+Version:\s*(\S+)", npu_smi)
    return banner[1] if banner else _version_in(Path("/usr/local/Ascend/driver/version.info"))


def _version_in(file: Path) -> str | None:
    """The value of the first line `version=…`; CANN also writes it as `[9.1.0:9.1.0]`."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return None
    line = re.search(r"^\s*(?:\w*running_)?version\s*=\s*\[?([\w.]+)", text, re.MULTILINE | re.IGNORECASE)
    return line[1] if line else None


def _npu_smi() -> tuple[str, str]:
    """npu-smi's table, and what went wrong with it."""
    command = shutil.which("npu-smi")
    if command is None:
        return "", "npu-smi is not installed"
    try:
        done = subprocess.run(
            [command, "info"], capture_output=True, text=True, errors="replace", timeout=_COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"npu-smi info did not answer within {_COMMAND_SECONDS} s"
    except OSError as error:
        return "", f"npu-smi cannot be started: {error.strerror}"
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return done.stdout, f"npu-smi info failed: {lines[-1] if lines else f'exit status {done.returncode}'}"
    return done.stdout, ""


def _disks() -> tuple[Disk, ...]:
    places = {
        "run folder": Path.cwd(),
        "temporary files": Path(tempfile.gettempdir()),
        "shared memory": Path("/dev/shm"),
    }
    with suppress(UserError):  # a user without a home folder
        places["cache"] = cache_root()
    return tuple(Disk(purpose, path, free) for purpose, path in places.items() if (free := _free(path)) is not None)


def _free(path: Path) -> int | None:
    existing = next((parent for parent in (path, *path.parents) if parent.is_dir()), None)
    try:
        return shutil.disk_usage(existing).free if existing else None
    except OSError:
        return None
