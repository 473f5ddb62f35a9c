"""What `doctor` says about one thing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"  # works, but slower, or not everywhere
    ERROR = "error"  # does not work


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: short name of what was looked at, as in "CANN".
        what: what was found.
        why: why it matters; empty where all is well.
        fix: the command or change that fixes it; empty where all is well.
    """

    check: str
    level: Level
    what: str
    why: str = ""
    fix: str = ""


def ok(check: str, what: str) -> Finding:
    return Finding(check, Level.OK, what)


def warning(check: str, what: str, why: str, fix: str) -> Finding:
    return Finding(check, Level.WARNING, what, why, fix)


def error(check: str, what: str, why: str, fix: str) -> Finding:
    return Finding(check, Level.ERROR, what, why, fix)
