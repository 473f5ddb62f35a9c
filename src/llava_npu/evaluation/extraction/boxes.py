"""Boxes in answers: (left, top, right, bottom) in fractions of the image's width and height, by three published rules.

lmms-eval   the first [x, y, x, y] of four plain numbers, taken as fractions whatever they are (EvolvingLMMs-Lab/
            lmms-eval at 75571cf, lmms_eval/tasks/refcoco/utils_rec.py).
qwen-vl     the first "(x,y),(x,y)", in 999ths (QwenLM/Qwen-VL at aa00ed0, eval_mm/evaluate_grounding.py).
vlmevalkit  the first [x, y, x, y], commas or spaces between, else the first four numbers of all; fractions if none is
            above 1.5, thousandths if none is above 1000, else pixels; clipped, corners put in order
            (open-compass/VLMEvalKit at e8e78f0, vlmeval/dataset/refcoco.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import chain

Box = tuple[float, float, float, float]

ABOUT = {
    "lmms-eval": "its refcoco_bbox_rec tasks: the first [x, y, x, y], in fractions of the image",
    "qwen-vl": "Qwen-VL's script: the first (x,y),(x,y), in 999ths",
    "vlmevalkit": "VLMEvalKit: the first four numbers; fractions, thousandths or pixels by their size",
}

_PLAIN = r"(-?\d+(?:\.\d+)?)"
_PLAIN_BOX = re.compile(rf"\[\s*{_PLAIN},\s*{_PLAIN},\s*{_PLAIN},\s*{_PLAIN}\s*\]")
_CORNERS = re.compile(r"\((.*?)\),\((.*?)\)")
_NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
_LIST = re.compile(r"\[\s*({0}){1}({0}){1}({0}){1}({0})\s*\]".format(_NUMBER, r"(?:\s*,\s*|\s+)"))
_MOST_AS_FRACTION, _MOST_IN_THOUSANDTHS = 1.5, 1000


def lmms_eval(answer: str) -> Box | None:
    match = _PLAIN_BOX.search(answer)
    return _box(map(float, match.groups())) if match else None


def qwen_vl(answer: str) -> Box | None:
    match = _CORNERS.search(answer)
    if match is None:
        return None
    try:
        numbers = [[float(part) for part in corner.split(",")] for corner in match.groups()]
    except ValueError:
        return None
    if any(len(corner) != 2 for corner in numbers):
        return None
    return _box(number / 999 for number in chain(*numbers))


def vlmevalkit(answer: str, width: float, height: float) -> Box | None:
    """
    Args:
        answer: the model's.
        width, height: of the image, in pixels.
    """
    match = _LIST.search(answer)
    numbers = [float(number) for number in (match.groups() if match else re.findall(_NUMBER, answer)[:4])]
    if len(numbers) < 4:
        return None
    largest = max(map(abs, numbers))
    if largest > _MOST_IN_THOUSANDTHS:
        numbers = [number / size for number, size in zip(numbers, (width, height, width, height), strict=True)]
    elif largest > _MOST_AS_FRACTION:
        numbers = [number / 1000 for number in numbers]
    left, top, right, bottom = (min(max(number, 0.0), 1.0) for number in numbers)
    return min(left, right), min(top, bottom), max(left, right), max(top, bottom)


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Area of two boxes' intersection over that of their union; 0 where the union is empty, or no number ("inf")."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    union = areas - width * height
    return width * height / union if union and math.isfinite(union) else 0.0


def _box(numbers: Iterable[float]) -> Box:
    left, top, right, bottom = numbers
    return left, top, right, bottom
