"""COCO's objects in a caption, as CHAIR finds them (Rohrbach et al. 2018, arXiv:1809.02156).

Reference: LisaAnne/Hallucination at 6e4d33c, utils/chair.py, with the singular forms of clips/pattern at d25511f and
NLTK's words, faults included: a "bus" becomes a "bu" and is not found, "buses" are; "ties" become a "ty". The list of
synonyms (data/synonyms.txt there) is the authors' and is read from the user's copy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

# Words keep hyphens and slashes, and periods within them; every other mark is a token of its own, as in NLTK.
_TOKEN = re.compile(r"(?:(?<!-)[-/])?[^\W_]+(?:[-./][^\W_]+)*(?:[-/](?!-))?|[^\w\s]|_")

_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_PAIRS = """
motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant, stop sign,
parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, hot dog, cell phone,
mobile phone, teddy bear, hair drier, potted plant, bow tie, laptop computer, home plate, train track
"""
_AS_ONE_WORD = {
    **{pair: pair for pair in " ".join(_PAIRS.split()).split(", ")},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",  # pattern's singular of glass
}

_UNCHANGED = ("scissors", "collies", "doggies", "cookies", "zombies")
_ENDINGS = (
    *((r"men$", "man"), (r"children$", "child"), (r"people$", "person"), (r"geese$", "goose"), (r"^oxen", "ox")),
    *((r"kine$", "cow"), (r"([ml])ice$", r"\1ouse"), (r"([^aeiouy]|qu)ies$", r"\1y"), (r"oes$", "o")),
    *((r"buses$", "bus"), (r"(x|ch|ss|sh)es$", r"\1"), (r"([aeo]l|ar)ves$", r"\1f"), (r"([nlw]i)ves$", r"\1fe")),
    (r"s$", ""),
)
_SINGULAR = tuple((re.compile(form), singular) for form, singular in _ENDINGS)


@dataclass(frozen=True)
class CocoObjects:
    """Which objects captions name.

    Attributes:
        names: a word, or two words → the object that it names.
    """

    names: dict[str, str]

    def of_caption(self, caption: str) -> list[str]:
        """The objects that a caption names, once for each mention, in order."""
        words = _joined([singular(token) for token in _TOKEN.findall(caption.lower())])
        if "toilet" in words:  # the seat of a toilet is not a chair
            words = [word for word in words if word != "seat"]
        return [self.names[word] for word in words if word in self.names]


@lru_cache(maxsize=4)
def coco_objects(synonyms: str) -> CocoObjects:
    """
    Args:
        synonyms: one object a line, its name first, its synonyms after it, separated by ", ".
    """
    lines = [line.strip().split(", ") for line in synonyms.splitlines() if line.strip()]
    return CocoObjects({word: words[0] for words in lines for word in words})


def singular(word: str) -> str:
    """pattern's singular, for words whose singular may name an object."""
    if word.endswith(_UNCHANGED):
        return word
    for form, ending in _SINGULAR:
        if form.search(word):
            return form.sub(ending, word)
    return word


def _joined(words: list[str]) -> list[str]:
    """Words, where two that mean one thing are one."""
    joined = []
    place = 0
    while place < len(words):
        pair = _AS_ONE_WORD.get(" ".join(words[place : place + 2])) if place + 1 < len(words) else None
        joined.append(pair or words[place])
        place += 2 if pair else 1
    return joined
