"""Which pictures are trained on, and which concepts are held out, whole, to be asked about."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from demo.concepts import family, names_any, single_noun, word_set
from demo.pictures import Picture, with_article
from llava_npu.errors import UserError

# Names that are no thing by themselves, or that a picture of the thing does not show.
_NOT_ASKED = word_set("""
    foggy leafy potted wilted christmas ripe mate cooking mine tender short brief boom rail joker construction rhea
    prune mercury venus mars jupiter saturn uranus neptune pluto earth station school bank hotel hospital farm wood
    rock ice salt herb memo e-mail dna droplet blood scroll ledger package wedding fishery adenium anthurium balsam
    xanthia gazania seville pigface bowling tennis lacrosse badminton sparkle eye wing ornament seat fog pick
""")


@dataclass(frozen=True)
class HeldOut:
    """A concept that no training caption names, and a picture of it.

    Attributes:
        name: as an option says it, "zebra" or "grapes".
        picture: of it.
    """

    name: str
    picture: Picture

    @property
    def caption(self) -> str:
        return with_article(self.name)


@dataclass(frozen=True)
class Split:
    """Training pictures, and held-out concepts, one picture each."""

    train: tuple[Picture, ...]
    held_out: tuple[HeldOut, ...]


def hold_out(pictures: Sequence[Picture], num_concepts: int, seed: int) -> Split:
    """Draws concepts and takes everything that names them, or their family, out of training.

    Args:
        pictures: all there are.
        num_concepts: how many to hold out. No two share a family, so any two are fair options of one question.
        seed: of the draw.

    Raises:
        UserError: there are not that many.
    """
    of_noun: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        noun = single_noun(picture.caption)
        if noun is not None and len(noun) > 2 and noun not in _NOT_ASKED:
            of_noun[noun].append(picture)
    nouns = sorted(of_noun)
    random.Random(seed).shuffle(nouns)
    chosen: list[str] = []
    for noun in nouns:
        if len(chosen) < num_concepts and not any(_related(noun, other) for other in chosen):
            chosen.append(noun)
    if len(chosen) < num_concepts:
        raise UserError(f"only {len(chosen)} concepts can be held out of {len(pictures)} pictures, not {num_concepts}.")
    held_out = [_held_out(noun, of_noun[noun]) for noun in chosen]
    unseen = frozenset().union(*(family(noun) for noun in chosen))
    return Split(tuple(picture for picture in pictures if not names_any(picture.caption, unseen)), tuple(held_out))


def _related(noun: str, other: str) -> bool:
    return names_any(noun, family(other)) or names_any(other, family(noun))


def _held_out(noun: str, pictures: Sequence[Picture]) -> HeldOut:
    # A photograph, if there is one: `stamps` sorts behind `emoji`.
    picture = max(pictures, key=lambda picture: (picture.source, picture.key))
    last_word = picture.caption.split()[-1].lower()
    return HeldOut(last_word if single_noun(last_word) == noun else noun, picture)
