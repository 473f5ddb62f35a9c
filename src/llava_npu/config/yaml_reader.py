"""YAML as people write it: numbers, text, lists and mappings whose keys are text; everything else is refused by key.

Read as YAML 1.2 does where YAML 1.1 surprises: `2e-5` is a number; `010` and `1:30` are text, not 8 and 90.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_npu.errors import UserError

_MAX_VALUES = 100_000  # of a file, with every alias written out
_MAX_BYTES = 1 << 18  # of a file; more take long to read
_MAX_INT = 2**63 - 1
_LONGEST_NUMBER = 40  # characters; anything longer is text

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_FLOAT = re.compile(
    r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
)
_IMPLICIT = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class YamlError(ValueError):
    """What is wrong, for a message that begins with the file's name."""


@dataclass(frozen=True)
class _Date:
    text: str


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _IMPLICIT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if first != "="
}


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML takes for something else."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_IMPLICIT[0], _INT, list("-+0123456789"))
    _class.add_implicit_resolver(_IMPLICIT[1], _FLOAT, list("-+0123456789."))


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node).replace("_", "")
    if len(text) > _LONGEST_NUMBER:
        return text
    if _INT.match(text):
        return int(text, 16 if "0x" in text else 10)
    return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").replace(".nan", "nan"))


for _tag in _IMPLICIT:
    _Loader.add_constructor(_tag, _construct_number)


def _construct_date(loader: _Loader, node: yaml.ScalarNode) -> _Date:
    return _Date(str(loader.construct_scalar(node)))


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _construct_date)


def write_yaml(value: Any, width: int = 80) -> str:
    """A value as YAML of lines of about `width` characters, which `read_yaml` reads as the same value."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width))


def read_yaml_file(path: Path) -> Any:
    """As `read_yaml`, of a file.

    Raises:
        UserError: the file does not exist or cannot be read, or its text is wrong.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise UserError(
                f"{path}: is larger than {_MAX_BYTES >> 10} KiB, as no configuration is; name another file."
            )
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return read_yaml_text(text, path)


def read_yaml_text(text: str, path: Path) -> Any:
    """As `read_yaml`; errors begin with `path`, the file that the text is of or for."""
    try:
        return read_yaml(text)
    except YamlError as error:
        raise UserError(f"{path}: {error}.") from None


def read_yaml(text: str) -> Any:
    """The value that a YAML document holds; None for an empty one.

    Raises:
        YamlError: it is not valid YAML, or holds what no configuration can.
    """
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a character that YAML does not allow, such as NUL
        raise YamlError(f"is not valid YAML: {error}") from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node)
        value = loader.construct_document(node)
    except RecursionError:
        raise YamlError("is nested too deeply") from None
    except (yaml.YAMLError, ValueError, KeyError) as error:  # KeyError: `!!bool perhaps`
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"is not valid YAML: {error}") from None
    finally:
        loader.dispose()
    problem = next(_problems(value, ""), None)
    if problem is not None:
        raise YamlError(problem)
    return value


def _check_node(root: yaml.Node) -> None:
    """Raises `YamlError` for keys that are not text or are given twice, and for aliases that never end or multiply."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        """The values in a node, aliases written out."""
        if id(node) in open_nodes:
            raise YamlError(f"has an anchor that contains itself{_place(node)}")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
                sizes[id(node)] = 1 + sum(size(value) for _, value in node.value)
            else:
                inner = node.value if isinstance(node, yaml.SequenceNode) else []
                sizes[id(node)] = 1 + sum(size(each) for each in inner)
            open_nodes.remove(id(node))
        return sizes[id(node)]

    if size(root) > _MAX_VALUES:
        raise YamlError(f"holds more than {_MAX_VALUES:,} values once its aliases are written out")


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise YamlError(f"has a key that is a list or a mapping{_place(key)}; keys are text")
        if key.value in seen:
            raise YamlError(f"is not valid YAML: the key {key.value!r} is given twice{_place(key)}")
        seen.add(key.value)


def _place(node: yaml.Node) -> str:
    return f", in line {node.start_mark.line + 1}"


def _problems(value: Any, key: str) -> Iterator[str]:
    """What is wrong with a value or the values in it, each with its key."""
    where = f"`{key}`" if key else "the value"
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                yield f"{where if key else 'the file'} has the key {name!r}, which is not text; put it in quotes"
                return
            yield from _problems(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _problems(inner, f"{key}.{number}" if key else str(number))
    elif isinstance(value, _Date):
        yield f"{where} is {value.text}, which YAML takes for a date; put it in quotes if it is text"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}, and has to be a finite number"
    elif isinstance(value, int) and abs(value) > _MAX_INT:
        yield f"{where} is {value}, which is too large: at most 2^63 − 1"
    elif isinstance(value, str) and (problem := _unusable(value)):
        yield f"{where} holds {problem}, which no text here may"
    elif not isinstance(value, (str, int, float, type(None))):
        allowed = "text, numbers, true, false, null, lists and mappings"
        yield f"{where} has the YAML type {type(value).__name__}; allowed are {allowed}"


def _unusable(text: str) -> str | None:
    if "\0" in text:
        return "a NUL character"
    return "half of a surrogate pair" if any("\ud800" <= character <= "\udfff" for character in text) else None
