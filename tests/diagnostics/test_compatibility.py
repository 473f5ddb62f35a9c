from __future__ import annotations

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
    listed,
    parse,
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
    assert suits(transformers, "5.13.0")
    assert suits(transformers, "5.99")
    assert not suits(transformers, "6.0.0")
    assert not suits(transformers, "5.12.1")


@pytest.mark.parametrize(
    ("torch_npu", "cann"),
    [
        ("2.9.0", "8.5.0"),
        ("2.9.0.post2", "9.0.0"),
        ("2.9.0.post5", "9.0.0"),  # between two listed packages: the one before
        ("2.9.0.post8", "9.1.0"),
        ("2.13.0", None),
        ("2.1.0.post13", None),
    ],
)
def test_which_cann_a_torch_npu_was_made_with(torch_npu: str, cann: str | None) -> None:
    release = listed(torch_npu)
    assert (release and release.cann) == cann


def test_the_table_is_sound() -> None:
    assert len({release.torch_npu for release in ASCEND_RELEASES}) == len(ASCEND_RELEASES)
    for release in ASCEND_RELEASES:
        assert parse(release.torch) == parse(release.torch_npu)
        assert listed(release.torch_npu) == release
    assert {".".join(map(str, parse(release.cann)[:2])) for release in ASCEND_RELEASES} >= OLDEST_DRIVER.keys()


def test_the_documentation_has_the_same_tables() -> None:
    text = (PYPROJECT.parent / "docs/npu.md").read_text()
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if "|" in line]
    releases = [(release.torch_npu, release.torch, release.cann) for release in ASCEND_RELEASES]
    assert [row for row in rows if row in releases] == releases
    assert {row[0]: row[1] for row in rows if len(row) == 3 and row[0] in OLDEST_DRIVER} == OLDEST_DRIVER
