"""What a caption is about, so that whole concepts can be held out of training and not only images.

A held-out concept is one noun. None of its training pictures remain, under any name that this file can recognise:
another number ("mice"), colour ("a red apple"), part or compound ("apple core", "seahorse" for "horse"), or another
word for the same kind of thing ("a kitten" for "cat").
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_IRREGULAR = {
    "mice": "mouse", "geese": "goose", "teeth": "tooth", "men": "man", "women": "woman", "feet": "foot", "oxen": "ox",
    "leaves": "leaf", "knives": "knife", "wolves": "wolf", "children": "child", "people": "person", "loaves": "loaf",
    "shelves": "shelf", "scarves": "scarf", "calves": "calf", "halves": "half", "dice": "die", "cacti": "cactus",
}  # fmt: skip


def word_set(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


# Singulars that end as plurals do, and pairs that have no singular.
_ENDS_IN_S = word_set("""
    abacus bass bus cactus christmas chess clothes compass cypress dress glass goggles gas grass headdress hibiscus
    hippopotamus iris lens lotus minibus mantis mars maracas moss octopus pants rhinoceros scissors swiss this
    trolleybus tennis venus uranus virus walrus jeans binoculars pliers sunglasses briefs shorts
""")
# Words that say how many, how large, which colour, what for: they make no other concept.
_MODIFIERS = word_set("""
    a an the of and in with on for at to by from its his her our your my some two three four another pair couple bunch
    cluster head bulb string piece slice sliced quarter part plant fruit flower animal baby male female little small
    big large huge tiny very old modern new young happy sleeping sitting standing flying singing open closed full half
    whole black white grey gray red green blue yellow orange brown pink purple golden silver gold colorful colored
    dark light bright cartoon toy wooden plastic metal electric electronic digital classical wild freshwater roasted
    roast fried wrapped lit folded eared covered drop dew
""")
# Kinds of things that go by several names; a picture of one would answer a question about another.
_FAMILIES = """
    chicken hen rooster chick cock poultry
    rabbit bunny hare
    cow bull ox calf zebu cattle bison buffalo yak gnu
    deer doe caribou reindeer wapiti moose stag
    pig boar
    duck drake duckling
    goose gander
    rat mouse hamster
    sheep lamb ram ewe
    cat kitten
    dog puppy poodle dingo
    camel dromedary
    penguin tux
    bee honeybee
    ladybug beetle
    peacock peahen peafowl
    seagull gull
    lion lioness
    donkey mule
    horse pony
    frog toad
    turtle tortoise
    crocodile alligator
    bug insect
    crab lobster shrimp
    whale orca
    car sedan automobile beetle taxi
    truck lorry dumper tanker
    bus trolleybus minibus
    train locomotive tram
    airplane plane
    boat sailboat ship speedboat tugboat canoe
    bicycle bike tricycle
    tent tepee
    cup mug teacup
    hat cap fedora sombrero
    shoe boot sandal
    pants jeans
    coat jacket
    shirt t-shirt
    guitar banjo
    violin cello
    drum cymbal
    trumpet horn
    telephone phone mobile
    hammer mallet
    wrench pliers
    candle lamp
    gift present
    gravestone headstone tombstone grave cemetery graveyard monument
    castle fortress fort
    house cottage home hut
    church cathedral monastery
    inn tavern
    lemon lime
    orange mandarin tangerine
    pepper chile
    lettuce salad
    clock watch stopwatch
    ball football basketball volleyball baseball softball soccer rugby
    fireman firefighter
    bread loaf baguette bagel flatbread croissant
    cake cupcake shortcake
    cookie cracker
    candy lollipop
    doughnut donut
    sun sunrise sunset
    mushroom cep toadstool
    pen pencil marker
    bottle jar
    pot pan kettle
    mailbox postbox
    garbage trash bin
    money coin banknote dollar
    book notebook ledger
    glasses goggles sunglasses
    disk disc dvd
    sled sledge
    eagle hawk
    crow blackbird raven
    parrot rosella lorikeet
"""


def words(caption: str) -> list[str]:
    """The caption's words in lower case and in the singular."""
    return [singular(word) for word in re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", caption.lower())]


def singular(word: str) -> str:
    word = word.removesuffix("'s").removesuffix("'")
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word in _ENDS_IN_S or not word.endswith("s") or word.endswith("ss") or len(word) <= 3:
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + ("ie" if len(word) == 5 else "y")
    if word.endswith(("ches", "shes", "xes", "sses", "oes")):
        return word[:-2]
    return word[:-1]


def nouns(caption: str) -> list[str]:
    """The words that say what the thing is."""
    return [word for word in words(caption) if word not in _MODIFIERS]


def single_noun(caption: str) -> str | None:
    """The caption's only noun, if it has exactly one: "a red apple" → "apple", "a fire truck" → None."""
    found = nouns(caption)
    return found[0] if len(found) == 1 else None


def family(noun: str) -> frozenset[str]:
    """All names that count as this noun, itself included."""
    return frozenset({noun}).union(*(group for group in _FAMILY_SETS if noun in group))


def names_any(caption: str, held_out: Iterable[str]) -> bool:
    """Whether the caption names one of these nouns, alone or inside a compound ("seahorse", "apple-tree")."""
    present = words(caption)
    return any(noun == word or (len(noun) > 3 and noun in word) for noun in held_out for word in present)


_FAMILY_SETS = tuple(word_set(line) for line in _FAMILIES.strip().splitlines())
