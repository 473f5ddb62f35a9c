from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_npu.diagnostics.compatibility import (
    ASCEND_RELEASES,
    LIBRARIES,
    OLDEST_DRIVER,
    at_least,
    install_command,
    listed,
    parse,
    runs_with,
    suits,
)

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_ranges_are_those_of_the_package() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    declared = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for library in LIBRARIES:
        if library.name != "deepspeed":  # no dependency of the package in any extra
            assert library.requirement in declared


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.9.0.post2+cpu", (2, 9, 0)), ("8.3.RC1", (8, 3)), ("v24.1.rc3.7", (24, 1)), ("nightly", ()), ("6", (6,))],
)
def test_parse(version: str, numbers: tuple[int, ...]) -> None:
    assert parse(version) == numbers


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.lists(st.integers(0, 50), min_size=1, max_size=4))
def test_at_least_orders_versions_as_numbers_with_zeros_behind(one: list[int], other: list[int]) -> None:
    first, second = ".".join(map(str, one)), ".".join(map(str, other))
    width = max(len(one), len(other))
    expected = one + [0] * (width - len(one)) >= other + [0] * (width - len(other))
    assert at_least(first, second) == expected


def test_ranges_are_half_open() -> None:
    transformers = next(library for library in LIBRARIES if library.name == "transformers")
    assert suits(transformers, "5.18.0")
    assert suits(transformers, "5.99")
    assert not suits(transformers, "6.0.0")
    assert not suits(transformers, "5.17.0")


@pytest.mark.parametrize(
    ("torch_npu", "cann"),
    [
        ("2.9.0", "8.5.0"),
        ("2.9.0.post2", "9.0.0"),
        ("2.9.0.post5", "9.0.0"),  # between two listed packages: the one before
        ("2.9.0.post8", "9.1.x"),
        ("2.9.0.post9", "9.2.0"),
        ("2.9.0.post12", "9.2.0"),
        ("2.13.0", "9.2.0"),
        ("2.14.0", "9.2.0"),
        ("2.15.0", None),
        ("2.9.1", None),
        ("2.1.0.post13", None),
    ],
)
def test_which_cann_a_torch_npu_was_made_with(torch_npu: str, cann: str | None) -> None:
    release = listed(torch_npu)
    assert (release and release.cann) == cann


@pytest.mark.parametrize(
    ("torch_npu", "cann", "runs"),
    [
        ("2.9.0.post6", "8.5.0", True),  # TorchNPU 26.1 with an older CANN
        ("2.9.0", "9.2.0", True),  # TorchNPU 7.3 with a newer one
        ("2.14.0", "9.1.1", True),
        ("2.14.0", "8.3.RC1", False),
        ("2.14.0", "9.3.0", False),
        ("2.7.1", "8.3.RC1", True),
        ("2.7.1", "8.5.0", False),  # TorchNPU 7.2 is older than the range
    ],
)
def test_which_cann_a_torch_npu_runs_with(torch_npu: str, cann: str, runs: bool) -> None:
    release = listed(torch_npu)
    assert release is not None
    assert runs_with(release, cann) == runs


def test_the_install_command_can_be_resolved_on_x86_and_aarch64() -> None:
    """The wheels want torch==X+cpu on x86_64; that build, which fits torch==X too, is on PyTorch's own index alone."""
    release = listed("2.9.0.post9")
    assert release is not None
    assert install_command(release) == (
        "pip install torch==2.9.0+cpu torch-npu==2.9.0.post9 --extra-index-url https://download.pytorch.org/whl/cpu"
    )


def test_every_listed_package_is_one_whose_wheel_was_read() -> None:
    wheels = json.loads((PYPROJECT.parent / "simulated-npu/torch_npu/simulation/wheels.json").read_text())["wheels"]
    assert {release.torch_npu for release in ASCEND_RELEASES} <= wheels.keys()


def test_the_table_is_sound() -> None:
    assert len({release.torch_npu for release in ASCEND_RELEASES}) == len(ASCEND_RELEASES)
    for release in ASCEND_RELEASES:
        assert parse(release.torch) == parse(release.torch_npu)
        assert listed(release.torch_npu) == release
        assert runs_with(release, release.cann)
    assert {".".join(map(str, parse(release.cann)[:2])) for release in ASCEND_RELEASES} >= OLDEST_DRIVER.keys()


def test_the_documentation_has_the_same_tables() -> None:
    text = (PYPROJECT.parent / "docs/npu.md").read_text()
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if "|" in line]
    releases = [(each.torch_npu, each.torch, each.cann, each.torchnpu) for each in ASCEND_RELEASES]
    assert [row for row in rows if row in releases] == releases
    assert {row[0]: row[1] for row in rows if len(row) == 3 and row[0] in OLDEST_DRIVER} == OLDEST_DRIVER
