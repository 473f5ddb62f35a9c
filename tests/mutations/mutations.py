"""Broken inputs of every kind, made by seed, and what came of each: right, refused, or a fault.

A subject (`model_folders`, `records`, …) makes sound material once and, for each case, a broken copy with a function
that uses it. Using it either gives a right result or raises one `UserError` that names the broken file; everything
else is a fault. More cases than the test runs: `python -m mutations.test_mutations 5000 [SUBJECT …]` in tests/.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from llava_npu.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
_LONGEST_MESSAGE = 4000
_SECONDS = 60  # after which a case hangs


@dataclass(frozen=True)
class Case:
    """A broken input.

    Attributes:
        description: what was done to it, for whoever repeats it.
        use: gives what came of a right result, or raises.
        names: one of these texts is in the message of an error.
        refused: it cannot be right: an error must come.
    """

    description: str
    use: Callable[[], str]
    names: tuple[str, ...] = ()
    refused: bool = False


class Subject(Protocol):
    """One kind of input: `make` writes sound material into a folder, once; `case` a broken copy into another."""

    def make(self, folder: Path) -> None: ...

    def case(self, rng: random.Random, material: Path, folder: Path) -> Case: ...


@dataclass
class Outcomes:
    """What came of the cases of one subject."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


class WrongError(AssertionError):
    """A result that is not right, though nothing was raised."""


def run_cases(subject: Subject, seeds: range, folder: Path) -> Outcomes:
    """Runs one case per seed."""
    material = folder / "material"
    material.mkdir(parents=True)
    subject.make(material)
    outcomes = Outcomes()
    for seed in seeds:
        place = folder / "case"
        place.mkdir()
        case = subject.case(random.Random(seed), material, place)
        outcome, said = _outcome(case)
        outcomes.counts[outcome] += 1
        if said:
            kept = outcomes.faults if outcome == "fault" else outcomes.refusals
            kept.append(f"{outcome}: seed {seed}: {case.description}: {said}")
        for path in (*place.rglob("*"), place):
            if not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(place)
    return outcomes


def _outcome(case: Case) -> tuple[str, str]:
    try:
        with _time_limit():
            result = case.use()
            return ("fault", f"{result}, and should be refused") if case.refused else (result, "")
    except UserError as error:
        message = str(error)
        if case.names and not any(name in message for name in case.names):
            return "fault", f"the message names none of {case.names}: {message}"
        if len(message) > _LONGEST_MESSAGE or (
            not message.isprintable() and not message.replace("\n", "").isprintable()
        ):
            return "fault", f"the message is too long or not printable: {message[:500]!r}"
        return "refused", message
    except WrongError as error:
        return "fault", f"wrong: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(last))
        return "fault", f"{type(error).__name__}: {str(error)[:300]} ({where})"


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- what is done to files and values ----

_STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    10**12,
    10**30,
    0.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "12",
    "x" * 300,
    "\ud83d",
    "\x00",
    "<image>",
    "</s>",
    "../..",
    "/dev/null",
    "~",
    "none",
    "true",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": [1, {"b": 2}]},
)


def broken_json(rng: random.Random, value: Any) -> tuple[Any, str]:
    """A copy of a JSON value with one thing in it changed, and what."""
    value = json.loads(json.dumps(value))
    places = list(_places(value, []))
    path = rng.choice(places) if places else []
    if not path:
        return rng.choice(_STRANGE), "all replaced"
    *above, last = path
    holder = value
    for step in above:
        holder = holder[step]
    name = ".".join(map(str, path))
    old = holder[last]
    kind = rng.choice(["replace", "replace", "replace", "remove", "retype", "rename", "twice"])
    if kind == "remove":
        del holder[last]
    elif kind == "retype":
        holder[last] = _other_type(old)
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice([f"{last}s", f"_{last}", str(last).upper(), "video", "tool_calls"])] = holder.pop(last)
    elif kind == "twice" and isinstance(holder, list):
        holder.insert(last, old)
    else:
        kind, holder[last] = "replace", rng.choice(_STRANGE)
    now = holder[last] if kind in ("replace", "retype") else ""
    return value, f"{kind} {name} {ascii(now)[:60]}"


def _places(value: Any, path: list[Any]) -> Iterator[list[Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield [*path, key]
        if len(path) < 6:
            yield from _places(inner, [*path, key])


def _other_type(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return [value]
    return {str(place): each for place, each in enumerate(value)} if isinstance(value, list) else list(value)


def broken_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A file's bytes, damaged as files are."""
    at = rng.randrange(len(data)) if data else 0
    damages: dict[str, Callable[[], bytes]] = {
        "cut short": lambda: data[:at],
        "empty": lambda: b"",
        "a pointer of Git LFS": lambda: LFS_POINTER,
        "zeros": lambda: bytes(len(data)),
        "zeros at the end": lambda: data[:at] + bytes(len(data) - at),
        "one byte changed": lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        "some bytes changed": lambda: bytes(b if rng.random() > 0.01 else rng.randrange(256) for b in data),
        "a part missing": lambda: data[:at] + data[at + rng.randrange(1, 50) :],
        "more at the end": lambda: data + rng.randbytes(20),
        "a web page": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "UTF-16": lambda: data.decode("latin-1").encode("utf-16"),
        "a byte order mark": lambda: b"\xef\xbb\xbf" + data,
        "CRLF": lambda: data.replace(b"\n", b"\r\n"),
        "twice": lambda: data + data,
    }
    name = rng.choice(list(damages))
    return damages[name](), name


def break_file(rng: random.Random, path: Path) -> str:
    """Damages a file in place, as a file or as the JSON in it; says how."""
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        try:
            value, done = broken_json(rng, json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            pass
        else:
            path.write_text(json.dumps(value), encoding="utf-8")
            return f"{path.name}: {done}"
    if rng.random() < 0.15:
        path.unlink()
        if rng.random() < 0.5:
            return f"{path.name}: missing"
        path.mkdir() if rng.random() < 0.5 else path.symlink_to(path.name)
        return f"{path.name}: a folder or a link to itself"
    data, done = broken_bytes(rng, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name}: {done}"
