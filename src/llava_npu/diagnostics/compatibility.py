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
    Library("transformers", "5.13", below="6"),
    Library("accelerate", "1.10"),
    Library("tokenizers", "0.22"),
    Library("safetensors", "0.6"),
    Library("numpy", "1.26"),
    Library("pillow", "11"),
    Library("sentencepiece", "0.2", required=False, purpose="Llama and Vicuna tokenizers"),
    Library("peft", "0.17", required=False, purpose="LoRA"),
    # 0.14.3 is the first whose ZeRO-3 with CPU offload works on an Ascend (hiyouga/LLaMA-Factory issue 4146).
    Library("deepspeed", "0.14.3", required=False, purpose="ZeRO"),
)

# What CANN imports and pip does not install with it. Source: CANN 9.1.0 and 8.5.0 installation guides, "Runtime
# dependencies", hiascend.com.
CANN_PYTHON_PACKAGES = ("attrs", "cffi", "decorator", "protobuf", "psutil", "pyyaml", "scipy", "sympy")


@dataclass(frozen=True)
class AscendRelease:
    """One torch-npu release, the torch that it needs and the CANN that it was made with."""

    torch_npu: str
    torch: str
    cann: str


# Source: COMPATIBILITY.md of Ascend/pytorch (github.com/Ascend/pytorch and gitcode.com/Ascend/pytorch), read in 2026,
# from torch 2.7 on; of several packages for one pair, the newest first.
ASCEND_RELEASES = (
    AscendRelease("2.12.0", "2.12.0", "9.1.0"),
    AscendRelease("2.11.0", "2.11.0", "9.1.0"),
    AscendRelease("2.10.0.post4", "2.10.0", "9.1.0"),
    AscendRelease("2.10.0", "2.10.0", "9.0.0"),
    AscendRelease("2.9.0.post6", "2.9.0", "9.1.0"),
    AscendRelease("2.9.0.post2", "2.9.0", "9.0.0"),
    AscendRelease("2.9.0", "2.9.0", "8.5.0"),
    AscendRelease("2.8.0.post4", "2.8.0", "9.0.0"),
    AscendRelease("2.8.0.post2", "2.8.0", "8.5.0"),
    AscendRelease("2.8.0", "2.8.0", "8.3.RC1"),
    AscendRelease("2.7.1.post8", "2.7.1", "9.1.0"),
    AscendRelease("2.7.1.post4", "2.7.1", "9.0.0"),
    AscendRelease("2.7.1.post2", "2.7.1", "8.5.0"),
    AscendRelease("2.7.1", "2.7.1", "8.3.RC1"),
)
RECOMMENDED = ASCEND_RELEASES[0]

# The oldest driver (Ascend HDK) for a CANN. Source: release notes of CANN 8.5.0 and 9.1.0, "CANN and Ascend HDK version
# compatibility", hiascend.com.
OLDEST_DRIVER = {"9.1": "25.2", "9.0": "25.0", "8.5": "25.0"}

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


def for_cann(cann: str) -> list[AscendRelease]:
    """Releases made with a CANN, the newest first."""
    return [release for release in ASCEND_RELEASES if parse(release.cann)[:2] == parse(cann)[:2]]


def _post(version: str) -> int:
    match = re.search(r"\.post(\d+)", version)
    return int(match.group(1)) if match else 0
