"""The committed page is what the schema says."""

from __future__ import annotations

from pathlib import Path

from llava_npu.config.reference import reference


def test_the_configuration_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs/configuration.md"
    assert page.read_text(encoding="utf-8") == reference(), "run `make docs`"
