"""Data sets by name: `data.sources: [llava_665k, my_documents]`, defined once in a `datasets.yaml` for every run.

    llava_665k:
      path: llava_v1_5_mix665k.json   # relative to this file
      images: /data/images
    my_documents: {path: documents.jsonl, weight: 2, template: v1}

The file is looked for next to the run's configuration and in the working directory; `LLAVA_NPU_DATASETS` names others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from llava_npu.config.section import PathText, Section
from llava_npu.config.yaml_reader import read_yaml_file
from llava_npu.errors import UserError, nearest
from llava_npu.files.home import expand_home

DATASETS_FILE = "datasets.yaml"
ENVIRONMENT = "LLAVA_NPU_DATASETS"


class DatasetConfig(Section):
    """A data set of `datasets.yaml`."""

    path: PathText = Field(description="As `data.path`, relative to `datasets.yaml`.")
    images: PathText | None = Field(None, description="As `data.image_root`, relative to `datasets.yaml`.")
    template: str | None = Field(None, description="The conversation template, where a run does not set its own.")
    weight: float = Field(1.0, gt=0, description="As `data.sources[].weight`.")
    limit: int | None = Field(None, ge=1, description="As `data.sources[].limit`.")


def with_named_datasets(values: Any, where: str) -> Any:
    """Replaces each name in a `data.sources` of a configuration, at any depth, by what a `datasets.yaml` says of it.

    Args:
        values: the configuration as read.
        where: its file, for messages; `datasets.yaml` is looked for next to it.

    Raises:
        UserError: a name that is in no file, or in two; a `datasets.yaml` that cannot be read; templates that differ.
    """
    if isinstance(values, list):
        return [with_named_datasets(each, where) for each in values]
    if not isinstance(values, dict):
        return values
    values = {key: with_named_datasets(value, where) for key, value in values.items()}
    data = values.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    if not isinstance(sources, list) or not any(isinstance(each, str) for each in sources):
        return values
    names = [each for each in sources if isinstance(each, str)]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(
            f"{where}: `data.sources` names {twice[0]!r} twice. Name it once; to see its records more often, set its "
            f"`weight` in {DATASETS_FILE}."
        )
    files = {file: _read(file) for file in _files(Path(where).parent)}
    found = {name: _find(name, files, where) for name in names}
    expanded = [found[each][0] if isinstance(each, str) else each for each in sources]
    data = {**data, "sources": expanded}
    if data.get("template") is None:
        templates = {name: template for name, (_, template) in found.items()}
        data["template"] = _template(templates, len(found) == len(sources), where)
    return {**values, "data": data}


def _files(folder: Path) -> list[Path]:
    named = [expand_home(each) for each in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if each]
    missing = [str(file) for file in named if not file.is_file()]
    if missing:
        raise UserError(f"{ENVIRONMENT}: {', '.join(missing)} does not exist; name existing {DATASETS_FILE} files.")
    near = [file for file in (folder / DATASETS_FILE, Path(DATASETS_FILE)) if file.is_file()]
    return list({file.resolve(): file for file in (*near, *named)}.values())


def _read(file: Path) -> dict[str, tuple[dict[str, Any], str | None]]:
    """name → (its source, its template) of every data set in `file`."""
    values = read_yaml_file(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: should map names to data sets, as in `captions: {{path: captions.json}}`.")
    return {str(name): _source(file, str(name), entry) for name, entry in values.items()}


def _source(file: Path, name: str, entry: Any) -> tuple[dict[str, Any], str | None]:
    try:
        dataset = DatasetConfig.model_validate(entry)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, (name, *problem["loc"])))
        valid = ", ".join(DatasetConfig.model_fields)
        raise UserError(f"{file}: `{key}`: {problem['msg']}. A data set has the keys {valid}.") from None
    source: dict[str, Any] = {"path": str(file.parent / dataset.path), "weight": dataset.weight}
    if dataset.images is not None:
        source["image_root"] = str(file.parent / dataset.images)
    if dataset.limit is not None:
        source["limit"] = dataset.limit
    return source, dataset.template


def _find(
    name: str, files: Mapping[Path, Mapping[str, tuple[dict[str, Any], str | None]]], where: str
) -> tuple[dict[str, Any], str | None]:
    holding = [file for file, entries in files.items() if name in entries]
    if len(holding) > 1:
        raise UserError(
            f"{where}: `data.sources` names {name!r}, which is defined in {' and in '.join(map(str, holding))}; rename "
            "or remove one of them."
        )
    if not holding:
        known = sorted({known for entries in files.values() for known in entries})
        there = f"Known data sets: {', '.join(known)}." if known else f"Define it in a {DATASETS_FILE} next to it."
        raise UserError(f"{where}: `data.sources` names an unknown data set {name!r}.{nearest(name, known)} {there}")
    return files[holding[0]][name]


def _template(templates: Mapping[str, str | None], all_named: bool, where: str) -> str | None:
    """The template that all sources share, for a run that sets none."""
    chosen = {template for template in templates.values() if template}
    if len(chosen) > 1 or (chosen and (None in templates.values() or not all_named)):
        listed = ", ".join(f"{name}: {template or 'none'}" for name, template in templates.items())
        raise UserError(
            f"{where}: `data.sources`: the data sets have different templates ({listed}), but a run has one; set "
            "`data.template`."
        )
    return next(iter(chosen), None)
