"""How close a short answer comes to the true one: ANLS (documents) and relaxed accuracy (charts).

Both are exact against the scripts that published scores come from, as Qwen-VL has them (QwenLM/Qwen-VL at aa00ed0,
eval_mm/infographicsvqa_eval.py, which is the script of the RRC's server, and eval_mm/evaluate_vqa.py, from pix2struct).
"""

from __future__ import annotations

from collections.abc import Sequence

_ANLS_THRESHOLD = 0.5
_TOLERANCE = 0.05  # of the true number


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's distance in characters."""
    row = list(range(len(other) + 1))
    for place, character in enumerate(one, start=1):
        above, row = row, [place]
        for column, expected in enumerate(other, start=1):
            row.append(min(above[column] + 1, row[-1] + 1, above[column - 1] + (character != expected)))
    return row[-1]


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity (Biten et al. 2019, arXiv:1905.13648) to the closest reference.

    Case and runs of spaces do not count in the distance; the length that divides it is that of the texts as they are.

    Returns:
        1 − distance / length, and 0 below one half.
    """
    distances = []
    for reference in references:
        length = max(len(reference.upper()), len(answer.upper()))
        distance = edit_distance(_plain(reference), _plain(answer))
        distances.append(distance / length if length else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= _ANLS_THRESHOLD else 0.0


def relaxed_match(answer: str, truth: str) -> bool:
    """Whether two numbers differ by at most 5 % of the true one, or two texts are equal but for case.

    "12%" is 0.12, and "1,200" is a text, as in the original.
    """
    answered, expected = _as_number(answer), _as_number(truth)
    if answered is not None and expected:
        return abs(answered - expected) / abs(expected) <= _TOLERANCE
    return answer.lower() == truth.lower()


def relaxed_match_strict(answer: str, truth: str) -> bool:
    """`relaxed_match` where "$1,200.", "1200" and "12 %", "12" are the same numbers, and 0 is a number too."""
    answered, expected = _without_unit(answer), _without_unit(truth)
    if answered is not None and expected is not None:
        return abs(answered - expected) <= _TOLERANCE * abs(expected)
    return _plain(answer).rstrip(".") == _plain(truth).rstrip(".")


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _as_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _without_unit(text: str) -> float | None:
    return _as_number(text.strip().rstrip(".").strip("$€£% ").replace(",", ""))
