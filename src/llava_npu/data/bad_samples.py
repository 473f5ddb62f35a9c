"""What a run does about a sample it cannot use: stop (`error`), or take another one and say so (`skip`).

The substitute depends on nothing but the bad sample's number, so that a run repeats, continues and divides over devices
as without bad samples. Text alone may stand in for an image and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from llava_npu.errors import UserError

if TYPE_CHECKING:
    from llava_npu.data.dataset import Sample

BadSamples = Literal["error", "skip"]
MAX_SUBSTITUTES = 16


def load_or_substitute(load: Callable[[int], Sample], index: int, num_samples: int) -> Sample:
    """The sample, or the first good one among those drawn in its place; that one's `replaced` says what was wrong.

    Raises:
        UserError: the sample is bad and so are all that were drawn: the fault is not the samples'.
    """
    try:
        return load(index)
    except UserError as error:
        problem = error
    for substitute in substitutes(index, num_samples):
        try:
            sample = load(substitute)
        except UserError:
            continue  # named when it is its own turn
        return replace(sample, replaced=f"{problem} (replaced by {sample.name})")
    raise UserError(
        f"{problem}\nNone of the {MAX_SUBSTITUTES} samples drawn in its place can be used either, so data.bad_samples: "
        "skip does not help. Check the data file and data.image_root with `llava-npu data check`."
    ) from problem


def substitutes(index: int, num_samples: int) -> list[int]:
    """The samples to try in place of sample `index`, in order: a pseudo-random draw that only these numbers decide."""
    draws = np.random.PCG64(np.random.SeedSequence([index, num_samples])).random_raw(MAX_SUBSTITUTES)
    return [int(draw) for draw in draws % num_samples]
