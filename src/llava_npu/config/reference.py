"""Writes docs/configuration.md from the schema: `make docs`."""

from __future__ import annotations

import types
import typing

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llava_npu.config.comparison import ComparisonConfig
from llava_npu.config.schema import RunConfig

_HEAD = """# Configuration of a training run

`llava-npu train CONFIG [key=value …]` reads a YAML file; `key=value` on the command line overrides it, with dots for
sections (`optimizer.learning_rate=2e-5`). Unknown keys and wrong types are errors. `--print-config` shows the whole
resolved run. This page is generated from the schema by `make docs`.

CONFIG is a file, or the name of a recipe in `src/llava_npu/recipes/`. A file may begin with `base: other.yaml` (or a
list of files, later ones winning; paths from its own folder): then it says only what differs. Sections are merged key
by key; lists and `model.projector_options` are replaced as a whole.

`--debug-size` runs the same configuration in seconds, on any machine and offline: on models and data that are tiny and
made on the spot (in `runs/debug-size/`), with the stage, projector, template and other settings of the real run.
"""

_COMPARISON = """# Configuration of a comparison

`llava-npu compare CONFIG [key=value …]` reads a file of these keys; `compare-*.yaml` among the recipes are some. See
[comparison.md](comparison.md).
"""


def reference() -> str:
    """The page, as Markdown."""
    return "\n".join([_HEAD, *_section(RunConfig, ""), _COMPARISON, *_section(ComparisonConfig, "")])


def _section(section: type[BaseModel], prefix: str) -> list[str]:
    title = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    rows, nested = [], []
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            nested.append((field.annotation, f"{prefix}{name}."))
        elif inner := _optional_section(field.annotation):
            rows.append(f"| `{prefix}{name}` | mapping, see below, or null | `null` | {field.description} |")
            nested.append((inner, f"{prefix}{name}."))
        else:
            meaning = (field.description or "").replace("|", "\\|")
            rows.append(f"| `{prefix}{name}` | {_type(field.annotation)} | {_default(field)} | {meaning} |")
            if items := _section_of_items(field.annotation):
                nested.append((items, f"{prefix}{name}[]."))
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []
    lines = [f"## {title}", "", section.__doc__ or "", "", *table]
    return lines + [line for each, inner_prefix in nested for line in _section(each, inner_prefix)]


def _optional_section(annotation: typing.Any) -> type[BaseModel] | None:
    """The section that may be given or left out."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return next((each for each in typing.get_args(annotation) if is_union and _is_section(each)), None)


def _is_section(annotation: typing.Any) -> typing.TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _section_of_items(annotation: typing.Any) -> type[BaseModel] | None:
    """The section that a list holds, if it holds sections."""
    items = typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else None
    return items if _is_section(items) else None


def _type(annotation: typing.Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(each) for each in arguments)
    if _section_of_items(annotation):
        return "list of mappings, see below"
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} × {_type(arguments[0])}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return names.get(annotation, "mapping" if origin is dict else str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        value = "null" if value is None else str(value).lower()
    return f"`{list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    print(reference(), end="")
