"""The one exception that users are meant to read.

Everything a user can get wrong (a config key, a data record, an image, a checkpoint, a device) is raised as
`UserError`. The command line prints its message without a traceback and exits with status 2; from Python it is an
ordinary `ValueError`. A message names the file, field or record, the value found, what is allowed, and the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, described so that whoever reads it can fix it."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns ' Did you mean X?' for the allowed name closest to `name`, or '' if none is close."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
