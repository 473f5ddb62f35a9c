"""Which versions belong together, each table with its source."""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, ...]


@dataclass(frozen=True)
class Library:
    """A Python package that is used, and the versions that will do.

    Attributes:
        name: of the distribution, as pip knows it.
        minimum: the first version that will do.
        below: the first version that will not do any more, or None.
        required: whether nothing works without it; else `purpose` says what does not.
    """

    name: str
    minimum: str
    below: str | None = None
    required: bool = True
    purpose: str = ""

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}>={self.minimum}" + (f",<{self.below}" if self.below else "")


PYTHON = "3.11"

# Source: this package's own metadata (pyproject.toml), which a test compares with this table.
LIBRARIES = (
    Library("torch", "2.7"),
    Library("transformers", "5.18", below="6"),
    Library("accelerate", "1.10"),
    Library("tokenizers", "0.23.1"),
    Library("safetensors", "0.8"),
    Library("numpy", "1.26"),
    Library("pillow", "11"),
    Library("sentencepiece", "0.2", required=False, purpose="Llama and Vicuna tokenizers"),
    Library("peft", "0.18", required=False, purpose="LoRA"),
    # 0.14.3 is the first whose ZeRO-3 with CPU offload works on an Ascend (hiyouga/LLaMA-Factory issue 4146).
    Library("deepspeed", "0.14.3", required=False, purpose="ZeRO"),
)

# What CANN imports and pip does not install with it. Source: CANN 9.1.0 and 8.5.0 installation guides, "Runtime
# dependencies", hiascend.com.
CANN_PYTHON_PACKAGES = ("attrs", "cffi", "decorator", "protobuf", "psutil", "pyyaml", "scipy", "sympy")


@dataclass(frozen=True)
class AscendRelease:
    """One torch-npu package, the torch that it needs, the CANN that it was made with, and the TorchNPU release."""

    torch_npu: str
    torch: str
    cann: str
    torchnpu: str


# Source: COMPATIBILITY.md of Ascend/pytorch (github.com/Ascend/pytorch at commit 9e73e708 up to TorchNPU 26.1.0, and
# gitcode.com/Ascend/pytorch in October 2026 for 26.1.1 and 26.2.0), from torch 2.7 on; of several packages for one
# torch, the newest first.
ASCEND_RELEASES = (
    AscendRelease("2.14.0", "2.14.0", "9.2.0", "26.2.0"),
    AscendRelease("2.13.0", "2.13.0", "9.2.0", "26.2.0"),
    AscendRelease("2.12.0.post3", "2.12.0", "9.2.0", "26.2.0"),
    AscendRelease("2.12.0.post2", "2.12.0", "9.1.x", "26.1.1"),
    AscendRelease("2.12.0", "2.12.0", "9.1.0", "26.1.0"),
    AscendRelease("2.11.0.post3", "2.11.0", "9.2.0", "26.2.0"),
    AscendRelease("2.11.0.post2", "2.11.0", "9.1.x", "26.1.1"),
    AscendRelease("2.11.0", "2.11.0", "9.1.0", "26.1.0"),
    AscendRelease("2.10.0.post7", "2.10.0", "9.2.0", "26.2.0"),
    AscendRelease("2.10.0.post6", "2.10.0", "9.1.x", "26.1.1"),
    AscendRelease("2.10.0.post4", "2.10.0", "9.1.0", "26.1.0"),
    AscendRelease("2.10.0", "2.10.0", "9.0.0", "26.0.0"),
    AscendRelease("2.9.0.post9", "2.9.0", "9.2.0", "26.2.0"),
    AscendRelease("2.9.0.post8", "2.9.0", "9.1.x", "26.1.1"),
    AscendRelease("2.9.0.post6", "2.9.0", "9.1.0", "26.1.0"),
    AscendRelease("2.9.0.post2", "2.9.0", "9.0.0", "26.0.0"),
    AscendRelease("2.9.0", "2.9.0", "8.5.0", "7.3.0"),
    AscendRelease("2.8.0.post4", "2.8.0", "9.0.0", "26.0.0"),
    AscendRelease("2.8.0.post2", "2.8.0", "8.5.0", "7.3.0"),
    AscendRelease("2.8.0", "2.8.0", "8.3.RC1", "7.2.0"),
    AscendRelease("2.7.1.post11", "2.7.1", "9.2.0", "26.2.0"),
    AscendRelease("2.7.1.post10", "2.7.1", "9.1.x", "26.1.1"),
    AscendRelease("2.7.1.post8", "2.7.1", "9.1.0", "26.1.0"),
    AscendRelease("2.7.1.post4", "2.7.1", "9.0.0", "26.0.0"),
    AscendRelease("2.7.1.post2", "2.7.1", "8.5.0", "7.3.0"),
    AscendRelease("2.7.1", "2.7.1", "8.3.RC1", "7.2.0"),
)
RECOMMENDED = next(each for each in ASCEND_RELEASES if each.torch == "2.13.0")  # what this project tests with

# TorchNPU releases of this range run with any CANN of this range, whichever they were made with. Source: the same
# COMPATIBILITY.md.
INTERCHANGEABLE_TORCHNPU = ("7.3", "26.2")
INTERCHANGEABLE_CANN = ("8.5", "9.2")

# The oldest driver (Ascend HDK) for a CANN. Source: release notes of CANN 8.5.0, 9.1.0 and 9.2.0, "CANN and Ascend HDK
# version compatibility", hiascend.com.
OLDEST_DRIVER = {"9.2": "25.3", "9.1": "25.2", "9.0": "25.0", "8.5": "25.0"}

# torch's CPU builds. PyPI's torch-npu wheels up to 2.11 require `torch==X+cpu` on x86_64, which PyPI does not have; on
# aarch64, PyPI's torch is a CUDA build from 2.12 on. Source: the wheels' own metadata.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Up to this CANN, numpy must be below 2 with Python below 3.13. Source: CANN 8.5.0 installation guide, "Running
# dependencies"; vllm-project/vllm-ascend issues 1875 and 2210 show what happens otherwise.
NUMPY_1_UP_TO_CANN = "8.5"


def parse(version: str) -> Version:
    """The leading numbers of a version: "2.9.0.post2+cpu" → (2, 9, 0), "8.3.RC1" → (8, 3)."""
    numbers = re.match(r"\d+(\.\d+)*", version.strip().lstrip("vV"))
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()


def at_least(version: str, minimum: str) -> bool:
    wanted = parse(minimum)
    found = parse(version)
    return found + (0,) * (len(wanted) - len(found)) >= wanted


def suits(library: Library, version: str) -> bool:
    """Whether a version of a library will do."""
    return at_least(version, library.minimum) and not (library.below and at_least(version, library.below))


def listed(torch_npu: str) -> AscendRelease | None:
    """The entry of a torch-npu version: its own, or of the newest listed package before it for the same torch."""
    same_torch = [release for release in ASCEND_RELEASES if parse(release.torch) == parse(torch_npu)[:3]]
    older = [release for release in same_torch if _post(release.torch_npu) <= _post(torch_npu)]
    return older[0] if older else None


def runs_with(release: AscendRelease, cann: str) -> bool:
    """Whether a torch-npu runs with a CANN: the one it was made with, or any where both are interchangeable."""

    def within(version: str, ends: tuple[str, str]) -> bool:
        return parse(ends[0]) <= parse(version)[:2] <= parse(ends[1])

    interchangeable = within(release.torchnpu, INTERCHANGEABLE_TORCHNPU) and within(cann, INTERCHANGEABLE_CANN)
    return interchangeable or parse(release.cann)[:2] == parse(cann)[:2]


def install_command(release: AscendRelease) -> str:
    """What installs a torch-npu with the CPU build of its torch, on x86_64 and on aarch64."""
    return f"pip install torch=={release.torch}+cpu torch-npu=={release.torch_npu} --extra-index-url {CPU_INDEX}"


def for_cann(cann: str) -> list[AscendRelease]:
    """Releases made with a CANN, the newest first."""
    return [release for release in ASCEND_RELEASES if parse(release.cann)[:2] == parse(cann)[:2]]


def _post(version: str) -> int:
    match = re.search(r"\.post(\d+)", version)
    return int(match.group(1)) if match else 0
