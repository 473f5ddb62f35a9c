"""Huawei's software and devices: torch-npu, CANN, driver, and what must go with them."""

from __future__ import annotations

from collections.abc import Iterator

from llava_npu import ascend_chips
from llava_npu.diagnostics import compatibility
from llava_npu.diagnostics.compatibility import RECOMMENDED, AscendRelease
from llava_npu.diagnostics.findings import Finding, error, ok, warning
from llava_npu.diagnostics.machine import Machine


def torch_npu(machine: Machine) -> Iterator[Finding]:
    version, torch = machine.versions["torch-npu"], machine.versions["torch"]
    if version is None:
        if machine.is_ascend:
            yield error(
                "torch-npu",
                "not installed, though this machine has Ascend devices or CANN",
                "torch cannot use the NPUs without it.",
                _install(_release_for(machine)),
            )
        return
    if machine.simulated:
        yield ok("torch-npu", f"{version}: test equipment; speed and precision say nothing of hardware")
        return
    if torch is None:  # told with the other libraries
        return
    if compatibility.parse(torch) != compatibility.parse(version):
        yield error(
            "torch-npu",
            f"torch-npu {version} with torch {torch}",
            "torch-npu is compiled against one torch, of the same three numbers, and its metadata allows no other.",
            _install(_wanted(machine)),
        )
    else:
        yield ok("torch-npu", f"{version} with torch {torch}")


def cann(machine: Machine) -> Iterator[Finding]:
    if not machine.is_ascend or machine.simulated:
        return
    ascend, version = machine.ascend, machine.versions["torch-npu"]
    release = _wanted(machine)
    if ascend.cann_folder is None:
        yield error(
            "CANN",
            "not found in $ASCEND_HOME_PATH, /usr/local/Ascend or ~/Ascend",
            "torch-npu consists of calls to its libraries.",
            f"Install the CANN {release.cann} toolkit and ops packages for your chip from "
            "https://www.hiascend.com/cann, then source their set_env.sh",
        )
        return
    if not ascend.sourced:
        yield error(
            "CANN",
            f"{ascend.cann or 'a version unknown'} in {ascend.cann_folder}, but its environment is not set",
            "torch-npu finds CANN's libraries only through it.",
            _source(machine),
        )
    if ascend.cann is None:
        yield warning(
            "CANN",
            f"no version can be read in {ascend.cann_folder}",
            "Whether it goes with torch-npu cannot be told.",
            f"Compare by hand: ls {ascend.cann_folder}; wanted is CANN {release.cann}",
        )
    elif version and compatibility.listed(version) is None:
        yield warning(
            "CANN",
            f"{ascend.cann} with torch-npu {version}, for which this llava-npu knows no CANN release",
            "Unlisted pairs may work; nobody has said so.",
            f"Look it up in https://gitcode.com/Ascend/pytorch COMPATIBILITY.md, or: {_install(_release_for(machine))}",
        )
    elif not compatibility.runs_with(release, ascend.cann):
        yield warning(
            "CANN",
            f"{ascend.cann} with torch-npu {version}, which was made with CANN {release.cann}",
            "Operators may be missing or fail in use (Ascend/pytorch issue 99).",
            f"Install CANN {release.cann}, or take what goes with {ascend.cann}: {_install(_release_for(machine))}",
        )
    elif ascend.sourced:
        yield ok("CANN", f"{ascend.cann} in {ascend.cann_folder}")


def driver(machine: Machine) -> Iterator[Finding]:
    ascend = machine.ascend
    if not machine.is_ascend or machine.simulated:
        return
    if ascend.driver is None:
        yield warning(
            "driver",
            f"no version found: {ascend.npu_smi_problem or 'npu-smi tells none'}",
            "Without the driver no NPU works.",
            "Install the Ascend HDK driver and firmware; in a container, mount /usr/local/Ascend/driver, "
            "/usr/local/dcmi and /usr/local/bin/npu-smi from the host",
        )
        return
    oldest = ascend.cann and compatibility.OLDEST_DRIVER.get(".".join(ascend.cann.split(".")[:2]))
    if oldest and not compatibility.at_least(ascend.driver, oldest):
        yield error(
            "driver",
            f"{ascend.driver} with CANN {ascend.cann}",
            f"CANN {ascend.cann} needs the Ascend HDK driver {oldest} or newer.",
            f"Upgrade driver and firmware to {oldest} or newer, or install an older CANN (docs/npu.md)",
        )
    else:
        yield ok("driver", f"Ascend HDK {ascend.driver}")


def health(machine: Machine) -> Iterator[Finding]:
    ascend = machine.ascend
    if ascend.closed_nodes:
        yield error(
            "device files",
            f"no permission for {', '.join(ascend.closed_nodes)}",
            "The driver refuses users outside its group.",
            "sudo usermod -a -G HwHiAiUser $USER, then log in again",
        )
    sick = [chip for chip in ascend.chips if chip.health.upper() != "OK"]
    for chip in sick:
        yield error(
            "health",
            f"NPU {chip.index} ({chip.name}): {chip.health}",
            "Its results cannot be relied on, and a run on several devices waits for it.",
            f"npu-smi info -t health -i {chip.index} tells the fault; leave it out with ASCEND_RT_VISIBLE_DEVICES",
        )
    if ascend.chips and not sick:
        yield ok("health", f"{len(ascend.chips)} NPUs, all OK")
    elif ascend.nodes and not ascend.chips:
        yield warning(
            "health",
            f"{len(ascend.nodes)} device files, but {ascend.npu_smi_problem or 'npu-smi lists no NPU'}",
            "The state of the NPUs cannot be told.",
            "npu-smi info; in a container, mount /usr/local/bin/npu-smi and /usr/local/dcmi from the host",
        )


def numpy(machine: Machine) -> Iterator[Finding]:
    version, cann_version = machine.versions["numpy"], machine.ascend.cann
    if not (version and cann_version) or machine.simulated:
        return
    old_cann = compatibility.parse(cann_version)[:2] <= compatibility.parse(compatibility.NUMPY_1_UP_TO_CANN)
    if compatibility.at_least(version, "2") and old_cann and not compatibility.at_least(machine.python, "3.13"):
        yield error(
            "numpy",
            f"numpy {version} with CANN {cann_version}",
            f"CANN up to {compatibility.NUMPY_1_UP_TO_CANN} needs numpy below 2 with this Python: its operator "
            "compiler fails with np.float_ or error 500001 at first use (vllm-ascend issues 1875, 2210).",
            "pip install 'numpy<2', or install CANN 9.0 or newer",
        )


def cann_packages(machine: Machine) -> Iterator[Finding]:
    if not machine.is_ascend or machine.simulated:
        return
    missing = [name for name in compatibility.CANN_PYTHON_PACKAGES if machine.versions[name] is None]
    if missing:
        yield warning(
            "CANN's Python packages",
            f"not installed: {', '.join(missing)}",
            "CANN's operator compiler imports them; without them operators fail that have no ready-made kernel.",
            f"pip install {' '.join(missing)}",
        )


def bitsandbytes(machine: Machine) -> Iterator[Finding]:
    if machine.is_ascend and machine.versions.get("bitsandbytes"):
        yield warning(
            "bitsandbytes",
            f"{machine.versions['bitsandbytes']} on an Ascend",
            "PyPI's build has no operators for Ascends: QLoRA fails (hiyouga/LLaMA-Factory issues 6452, 7337). A build "
            "of its Ascend branch has 4 bits (bitsandbytes pull requests 1422, 1695); this project has not tried it.",
            "Train LoRA in bfloat16, or compile bitsandbytes with -DCOMPUTE_BACKEND=npu (docs/npu.md)",
        )


def chips(machine: Machine) -> Iterator[Finding]:
    names = {chip.name for chip in machine.ascend.chips}
    names |= {device.name for device in machine.trial.devices if device.accelerator}
    for name in sorted(names):
        family = ascend_chips.family_of(name)
        if problem := ascend_chips.refusal(name):
            yield error(
                "chip",
                problem,
                "Training and chat would end at the first attention.",
                "Use an Atlas A2 or A3; on this machine: --device cpu",
            )
        elif family and not machine.simulated:
            per_node = f", {family.per_node} devices in a node" if family.per_node else ""
            yield ok("chip", f"{name}: {family.name}{per_node}")


def compilation(machine: Machine) -> Iterator[Finding]:
    if machine.is_ascend:
        yield ok(
            "jit_compile",
            "off in llava-npu; in your own scripts call torch.npu.set_compile_mode(jit_compile=False) first, or every "
            "new shape is compiled (ComfyUI pull request 10050: 600 s for the first step instead of 40 s)",
        )


def fix_for(machine: Machine) -> str:
    """What to do first where an Ascend's software does not work."""
    ascend = machine.ascend
    if ascend.cann_folder is None:
        return f"Install CANN {_wanted(machine).cann} (docs/npu.md)"
    if not ascend.sourced:
        return _source(machine)
    return "Check npu-smi info, and that torch, torch-npu and CANN belong together (the findings on them)"


def _source(machine: Machine) -> str:
    folder = machine.ascend.cann_folder
    assert folder is not None
    parent = folder.parent if folder.name == "latest" else folder  # ascend-toolkit/latest keeps it one folder up
    return f"source {parent}/set_env.sh"


def _wanted(machine: Machine) -> AscendRelease:
    """The release of the torch-npu that is there, if it is listed, else what to install here."""
    version = machine.versions["torch-npu"]
    return (compatibility.listed(version) if version else None) or _release_for(machine)


def _release_for(machine: Machine) -> AscendRelease:
    """What to install here: made for the CANN that is there if one is, else the recommended release."""
    cann_version = machine.ascend.cann
    return next(iter(compatibility.for_cann(cann_version)), RECOMMENDED) if cann_version else RECOMMENDED


def _install(release: AscendRelease) -> str:
    return f"{compatibility.install_command(release)}  # with CANN {release.cann}"
