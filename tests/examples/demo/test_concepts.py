"""What counts as naming a concept; the rules by which a concept is kept out of training."""

import pytest

from demo.concepts import family, names_any, single_noun, singular
from demo.pictures import noun_phrase, with_article


@pytest.mark.parametrize(
    ("plural", "expected"),
    [
        ("mice", "mouse"), ("cherries", "cherry"), ("peaches", "peach"), ("tomatoes", "tomato"), ("boxes", "box"),
        ("glasses", "glass"), ("pants", "pants"), ("octopus", "octopus"), ("cats", "cat"), ("dress", "dress"),
        ("wizard's", "wizard"), ("pies", "pie"), ("leaves", "leaf"),
    ],
)  # fmt: skip
def test_singular(plural, expected):
    assert singular(plural) == expected


@pytest.mark.parametrize(
    ("caption", "noun"),
    [
        ("a zebra", "zebra"), ("a yellow lemon", "lemon"), ("a pair of cherries", "cherry"), ("two wild boars", "boar"),
        ("a fire truck", None), ("a cup of coffee", None), ("some flowers", None),
    ],
)  # fmt: skip
def test_single_noun(caption, noun):
    assert single_noun(caption) == noun


@pytest.mark.parametrize("caption", ["a horse", "two horses", "a seahorse", "a white horse in a field", "a horse-shoe"])
def test_naming_a_concept_in_any_form(caption):
    assert names_any(caption, {"horse"})


def test_short_names_count_as_whole_words_only():
    assert names_any("a bat", {"bat"})
    assert not names_any("an acrobat", {"bat"})


def test_families_hold_together():
    assert "rooster" in family("hen")
    assert family("zebra") == {"zebra"}


@pytest.mark.parametrize(
    ("line", "phrase"),
    [
        ("A mug.", "a mug"),
        ("A camera.  Say Cheese!", "a camera"),
        ("An albino peahen (a female peafowl, or peacock).", "an albino peahen"),
        ("A candy cane is a traditional Christmas treat in the United States.", "a candy cane"),
        ("A “Granny Smith” apple.", "a Granny Smith apple"),
        ("Eat your broccoli!", ""),
        ("We remember those who have died.", ""),
        ("A ripe, red tomato!", "a ripe red tomato"),
        ("Hibiscus", "hibiscus"),
        ("", ""),
        ("– Because a brain is a terrible thing to waste…", ""),
    ],
)
def test_noun_phrase_of_a_stamp(line, phrase):
    assert noun_phrase(line) == phrase


@pytest.mark.parametrize(
    ("name", "phrase"), [("zebra", "a zebra"), ("owl", "an owl"), ("grapes", "grapes"), ("the moon", "the moon"),
                         ("unicorn", "a unicorn"), ("umbrella", "an umbrella"), ("bread", "bread")]
)  # fmt: skip
def test_article(name, phrase):
    assert with_article(name) == phrase
