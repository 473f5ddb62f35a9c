"""YAML + `key=value` overrides → a typed description, with every mistake named: key, file, nearest valid name."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llava_npu.config.datasets import with_named_datasets
from llava_npu.config.schema import RunConfig
from llava_npu.config.yaml_reader import YamlError, read_yaml, read_yaml_file, read_yaml_text, write_yaml
from llava_npu.errors import UserError, nearest
from llava_npu.files.home import expand_home
from llava_npu.files.json_objects import flatten

_Schema = TypeVar("_Schema", bound=BaseModel)
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_SHOWN = 100  # characters of a value in a message
_MAX_NAMED = 20  # mistakes


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's configuration.

    Args:
        path: a YAML file. Its key `base` may name another file, or several, whose values hold where it has none.
            `${key}` in a text stands for the value of that key, as in `output: runs/${model.projector}-align`.
        overrides: such as `optimizer.learning_rate=2e-5`; values are YAML, later ones win.

    Raises:
        UserError: the file or an override is wrong; all mistakes are listed, each with its key.
    """
    return load_as(RunConfig, path, overrides)


def load_text(text: str, path: Path) -> RunConfig:
    """As `load_config`, for the text of a file that is not written yet."""
    return override(RunConfig, _as_mapping(read_yaml_text(text, path), path), [], str(path))


def load_as(schema: type[_Schema], path: str | Path, overrides: Sequence[str] = ()) -> _Schema:
    """As `load_config`, for any schema."""
    values, origin = _read_with_bases(schema, Path(path))
    return override(schema, values, overrides, str(path), origin)


def override(
    schema: type[_Schema],
    values: dict[str, Any],
    overrides: Sequence[str],
    where: str,
    origin: Mapping[str, str] | None = None,
) -> _Schema:
    """Sets `key=value` overrides in `values`, then checks them as `validate` does."""
    places = dict(origin or {})
    parsed = [_parse_override(each) for each in overrides]
    for each, (key, value) in zip(overrides, parsed, strict=True):
        if not any(other.startswith(f"{key}_options") for other, _ in parsed):
            _drop_options(values, key, value)
        set_key(values, key, value, "command line")
        places[key] = f"command line: {_clipped(each, quote=False)}"
    values = with_named_datasets(_with_references(schema, values, where), where)
    return validate(schema, values, where, places)


def validate(
    schema: type[_Schema], values: Mapping[str, Any], where: str, origin: Mapping[str, str] | None = None
) -> _Schema:
    """Checks `values` against a schema.

    Args:
        where: where they come from, for messages; `origin` names another place for single keys.

    Raises:
        UserError: all mistakes, of many the first, each with its key.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        lines = [_explain(schema, problem, where, origin or {}) for problem in problems[:_MAX_NAMED]]
        if len(problems) > _MAX_NAMED:
            lines.append(f"{where}: and {len(problems) - _MAX_NAMED:,} more mistakes.")
        raise UserError("\n".join(lines)) from None


def _drop_options(values: dict[str, Any], key: str, value: Any) -> None:
    """Takes out the options of a projector or engine where another one is about to be chosen."""
    *sections, last = key.split(".")
    inner: Any = values
    for section in sections:
        inner = inner.get(section) if isinstance(inner, dict) else None
    if isinstance(inner, dict) and f"{last}_options" in inner and inner.get(last) != value:
        del inner[f"{last}_options"]


def _with_references(schema: type[BaseModel], values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` with each `${key}` in a text replaced by the value of that key."""

    def replace(text: str, key: str) -> str:
        return _REFERENCE.sub(lambda match: _referred_to(schema, values, match[1], f"{where}: `{key}`"), text)

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: walk(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner, key) for inner in value]
        return replace(value, key) if isinstance(value, str) else value

    return {name: walk(value, name) for name, value in values.items()}


def _referred_to(schema: type[BaseModel], values: Any, key: str, where: str) -> str:
    section: Any = schema
    for name in key.split("."):
        field = section.model_fields.get(name) if hasattr(section, "model_fields") else None
        if field is None:
            raise UserError(f"{where} refers to ${{{key}}}, but no such key exists.")
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        values = values.get(name, default) if isinstance(values, dict) else getattr(values, name, default)
        section = field.annotation
    if values is None or isinstance(values, (dict, list, BaseModel)) or "${" in str(values):
        raise UserError(f"{where} refers to ${{{key}}}, which has to be a plain text or number.")
    return str(values)


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
    return write_yaml(config.model_dump(mode="json"))


def _as_mapping(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"{path}: should hold `key: value` lines, found {found}.")
    return values


def _read_with_bases(
    schema: type[BaseModel], path: Path, above: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's values over those of the files that its `base` names, and in which file each key is written."""
    if path.resolve() in above:
        raise UserError(f"{above[-1]}: `base` leads back to {path}; remove one of the two.")
    own = _as_mapping(read_yaml_file(path), path)
    bases = own.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise UserError(f"{path}: `base` is {bases!r}; it takes the name of a configuration file, or a list of them.")
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for base in bases:
        file = path.parent / expand_home(base)
        below, written = _read_with_bases(schema, file, (*above, path.resolve()))
        values = _overlay(schema, values, below)
        origin |= written
    return _overlay(schema, values, own), origin | dict.fromkeys(flatten(own), str(path))


def _overlay(schema: type[BaseModel] | None, below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`: sections key by key; all else (a list, a projector's options) as a whole."""
    merged = dict(below)
    for key, value in above.items():
        _drop_options(merged, key, value)
    for key, value in above.items():
        section = _section(schema, [key]) if schema is not None and isinstance(value, dict) else None
        both = section is not None and isinstance(below.get(key), dict)
        merged[key] = _overlay(section, below[key], value) if both else value
    return merged


def _parse_override(given: str) -> tuple[str, Any]:
    key, equals, text = given.partition("=")
    if not equals or not key:
        raise UserError(
            f"command line: {_clipped(given)} does not have the form key=value, as in optimizer.learning_rate=2e-5."
        )
    try:
        return key, read_yaml(text)
    except YamlError as error:
        raise UserError(f"command line: {_clipped(given)}: {error}.") from None


def _explain(schema: type[BaseModel], problem: Any, path: str, origin: Mapping[str, str]) -> str:
    kinds = ("function-", "tuple[", "list[", "constrained-")  # pydantic's names of a value's possible types
    location = [str(part) for part in problem["loc"] if not str(part).startswith(kinds)]
    key = ".".join(location)
    where = next(
        (text for name, text in reversed(list(origin.items())) if key == name or key.startswith(name + ".")), path
    )
    if problem["type"] == "extra_forbidden":
        section = _section(schema, location[:-1])
        allowed = list(section.model_fields) if section else []
        hint = nearest(location[-1], allowed)
        if ":" in key:
            hint = " In YAML a space follows the colon, as in {limit: 5}."
        return f"{where}: unknown key `{key}`.{hint} Valid here: {', '.join(allowed)}."
    if problem["type"] == "missing":
        return f"{where}: `{key}` is required. {_describe(schema, location)}".rstrip()
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "model_type":
        message = "it is a section of keys"
    given = "" if isinstance(problem["input"], dict) else f" is {_clipped(problem['input'])}"
    stop = "" if message.endswith((".", "?")) else "."
    return f"{where}: `{key or 'configuration'}`{given}: {message}{stop} {_describe(schema, location)}".rstrip()


def _clipped(value: Any, *, quote: bool = True) -> str:
    text = repr(value) if quote else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text):,} characters)"


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
