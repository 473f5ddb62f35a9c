"""YAML + `key=value` overrides → a typed description, with every mistake named: key, file, nearest valid name."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from llava_npu.config.schema import RunConfig
from llava_npu.errors import UserError, nearest

_Schema = TypeVar("_Schema", bound=BaseModel)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's configuration.

    Args:
        path: a YAML file.
        overrides: such as `optimizer.learning_rate=2e-5`; values are YAML, later ones win.

    Raises:
        UserError: the file or an override is wrong; all mistakes are listed, each with its key.
    """
    return load_as(RunConfig, path, overrides)


def load_as(schema: type[_Schema], path: str | Path, overrides: Sequence[str] = ()) -> _Schema:
    """As `load_config`, for any schema."""
    values = _read_yaml(Path(path))
    origin: dict[str, str] = {}
    for override in overrides:
        key, value = _parse_override(override)
        set_key(values, key, value, "command line")
        origin[key] = f"command line: {override}"
    return validate(schema, values, str(path), origin)


def validate(
    schema: type[_Schema], values: Mapping[str, Any], where: str, origin: Mapping[str, str] | None = None
) -> _Schema:
    """Checks `values` against a schema.

    Args:
        where: where they come from, for messages; `origin` names another place for single keys.

    Raises:
        UserError: all mistakes, each with its key.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [_explain(schema, problem, where, origin or {}) for problem in error.errors()]
        raise UserError("\n".join(lines)) from None


def set_key(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets `section.key` in nested `values`; `where` the key was written is for messages."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"{where}: {key}: `{section}` is a value, not a section.")
        values = inner
    values[last] = value


def render_config(config: BaseModel) -> str:
    """The whole resolved configuration as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `2e-5` is a number (YAML 1.1 wants a point), and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    try:
        return (
            float(text)
            if node.style is None and any(digit in text for digit in "0123456789") and "e" in text.lower()
            else text
        )
    except ValueError:
        return text


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_scalar)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such configuration file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: should hold `key: value` lines, found {type(values).__name__}.")
    return values


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"command line: {override!r} is not of the form key=value, as in optimizer.learning_rate=2e-5.")
    try:
        return key, yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"command line: {override!r}: the value is not valid YAML: {error}") from None


def _explain(schema: type[BaseModel], problem: Any, path: str, origin: Mapping[str, str]) -> str:
    location = [str(part) for part in problem["loc"] if not str(part).startswith(("function-", "tuple["))]
    key = ".".join(location)
    where = next((text for name, text in origin.items() if key == name or key.startswith(name + ".")), path)
    if problem["type"] == "extra_forbidden":
        section = _section(schema, location[:-1])
        allowed = list(section.model_fields) if section else []
        return f"{where}: unknown key `{key}`.{nearest(location[-1], allowed)} Valid here: {', '.join(allowed)}."
    if problem["type"] == "missing":
        return f"{where}: `{key}` is required. {_describe(schema, location)}"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict) else f" is {problem['input']!r}"
    return f"{where}: `{key or 'configuration'}`{given}: {message}. {_describe(schema, location)}".rstrip()


def _describe(schema: type[BaseModel], location: Sequence[str]) -> str:
    section = _section(schema, location[:-1]) if location else None
    field = section.model_fields.get(location[-1]) if section else None
    return field.description or "" if field else ""


def _section(schema: type[BaseModel], location: Sequence[str]) -> type[BaseModel] | None:
    """The section at `location`; positions in lists of sections are steps of their own."""
    section: Any = schema
    for part in location:
        if hasattr(section, "model_fields"):
            field = section.model_fields.get(part)
            section = field.annotation if field else None
        elif typing.get_origin(section) is list:
            section = typing.get_args(section)[0]
        else:
            return None
        if isinstance(section, types.UnionType) or typing.get_origin(section) is typing.Union:
            section = next((each for each in typing.get_args(section) if hasattr(each, "model_fields")), None)
    return section if hasattr(section, "model_fields") else None
