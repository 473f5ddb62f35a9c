"""Configurations of runs and comparisons, broken as text and as values, and as `key=value` on the command line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from llava_npu.comparison.grid import expand
from llava_npu.config import RunConfig, load_config, render_config
from llava_npu.config.comparison import ComparisonConfig
from llava_npu.config.loading import load_as
from llava_npu.config.recipes import find_comparison, find_recipe
from mutations import Case, WrongError, broken_bytes, broken_json
from support import tiny

RECIPES = (
    "llava-npu-7b-align",
    "llava-npu-7b-finetune",
    "llava-v1.5-7b-lora",
    "compare-debug",
    "compare-llava-v1.5-7b",
)


class Configurations:
    """What is read is a whole configuration that reads the same when it is written."""

    def make(self, folder: Path) -> None:
        tiny.write_records(folder, 3)
        for name in RECIPES:
            schema: type[BaseModel] = ComparisonConfig if name.startswith("compare") else RunConfig
            values = load_as(schema, (find_comparison if schema is ComparisonConfig else find_recipe)(name)).model_dump(
                mode="json"
            )
            _use_data(values, str(folder / "train.json"))
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def case(self, rng: random.Random, material: Path, folder: Path) -> Case:
        name = rng.choice(RECIPES)
        schema = ComparisonConfig if name.startswith("compare") else RunConfig
        text = (material / f"{name}.yaml").read_text()
        path, overrides = folder / f"{name}.yaml", []
        kind = rng.choice(["value", "value", "value", "override", "bytes"])
        if kind == "bytes":
            data, done = broken_bytes(rng, text.encode())
            path.write_bytes(data)
        elif kind == "value":
            values, done = broken_json(rng, yaml.safe_load(text))
            path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
        else:
            path.write_text(text)
            overrides = [done := _override(rng, yaml.safe_load(text))]
        return Case(
            f"{name}, {kind} {done!a}", lambda: self._use(schema, path, overrides), (path.name, "command", "data file")
        )

    def _use(self, schema: type[Any], path: Path, overrides: list[str]) -> str:
        config = load_as(schema, path, overrides) if schema is ComparisonConfig else load_config(path, overrides)
        again = path.with_name("again.yaml")
        again.write_text(render_config(config), encoding="utf-8")
        if load_as(schema, again) != config:
            raise WrongError("reads differently when it is written")
        if schema is ComparisonConfig:
            expand(config, str(path))
        return "read"


def _use_data(values: dict[str, Any], data: str) -> None:
    """Makes every run of a configuration train on this file."""
    for key, value in values.items():
        if key == "data" and isinstance(value, dict):
            value["path"] = data
        elif isinstance(value, dict):
            _use_data(value, data)


def _override(rng: random.Random, values: dict[str, Any]) -> str:
    keys = [f"{name}.{inner}" for name, value in values.items() if isinstance(value, dict) for inner in value]
    key = rng.choice([*values, *keys, "", "x.y", "data..path", ".", "model.checkpoint.x"])
    return f"{key}={rng.choice(_TEXTS)}"


_TEXTS = (
    *("", "1", "-1", "0", "nan", ".inf", "1e400", "9" * 5000, "[", "{a: 1}", "[1, 2]", "null", "true", "2026-11-30"),
    *("&a [*a]", "x\x00y", "!!python/object:os.system x", "${output}", "${nothing}", "'", "a: b: c", "\ud83d", "~"),
)
