"""The demo's captioned pictures, read from the unpacked packages: photographs, 3D-rendered emoji, coloured shapes.

Each source is one function from a package's folder to a sorted list of `Picture`, so that everything built on them is
a pure function of the packages and a seed. Files are opened here only to be listed; `save_square` prepares them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_npu.errors import UserError


@dataclass(frozen=True)
class Picture:
    """One captioned picture.

    Attributes:
        key: unique and stable across machines, as in "stamps/animals/mammals/equines/zebra".
        path: of the file.
        caption: a noun phrase, as in "a zebra".
        topic: what kind of thing, as in "animals".
        source: short name of the asset, as in "stamps".
    """

    key: str
    path: Path
    caption: str
    topic: str
    source: str


# --- Tux Paint stamps: photographs and drawings, each with a line of description --------------------------------------

# What is no picture of a thing: letters, digits, coins, musical notation, road signs with their rules.
_STAMP_TOPICS_LEFT_OUT = ("symbols", "town/roadsigns", "town/flags", "seasonal/hanukkah/dreydl-")


def stamps(package: Path) -> list[Picture]:
    root = _folder(package, "usr/share/tuxpaint/stamps")
    found = []
    for path in sorted(root.rglob("*.png")):
        name = path.relative_to(root).with_suffix("").as_posix()
        text = path.with_suffix(".txt")
        if name.startswith(_STAMP_TOPICS_LEFT_OUT) or not text.is_file():
            continue
        caption = noun_phrase(text.read_text(encoding="utf-8").split("\n", 1)[0])
        if caption:
            found.append(Picture(f"stamps/{name}", path, caption, name.split("/", 1)[0], "stamps"))
    return found


# --- Fluent emoji: 3D renderings named by Unicode ---------------------------------------------------------------------

_EMOJI_TOPICS = {3: "animals", 4: "food", 5: "places", 6: "activities", 7: "objects"}  # emojibase's group numbers
# Names that say how the emoji differs from others, not what is to be seen.
_EMOJI_NAMES_LEFT_OUT = re.compile(
    r"o’clock|-thirty|oncoming|globe showing|moon|speaker|mailbox|envelope|volume|Japan|yen|button|not done|chart|"
    r"locked|phone with arrow|with slash|index|arrow|face$|tray|page|bookmark|receipt|money|dragon|high voltage|"
    r"tilted|love hotel|departure|arrival|medal|cloud|house with|diya|link|placard|nazar|hamsa"
)


def emoji(images: Path, names: Path) -> list[Picture]:
    labels = json.loads(_file(names, "en/data.json").read_text(encoding="utf-8"))
    folder = _folder(images, "assets")
    found = []
    for entry in labels:
        code = entry["hexcode"].lower()
        path = next(
            (folder / name for name in (f"{code}.webp", f"{code}-fe0f.webp") if (folder / name).is_file()), None
        )
        topic = _EMOJI_TOPICS.get(entry.get("group", -1))
        if topic is None or path is None or _EMOJI_NAMES_LEFT_OUT.search(entry["label"]):
            continue
        found.append(Picture(f"emoji/{code}", path, with_article(entry["label"]), topic, "emoji"))
    return sorted(found, key=lambda picture: picture.key)


# --- Captions ---------------------------------------------------------------------------------------------------------

_ARTICLES = ("a ", "an ", "the ", "some ", "two ", "another ", "our ")
_MASS_OR_PLURAL = re.compile(
    r"(?<!s)s$|^(bread|fire|garlic|ginger|broccoli|corn|rice|wood|ice|yarn|thread|confetti|knitting|soap|hair|butter|salt|"
    r"popcorn|bacon|spaghetti|sushi|sake|cooking|rock)$"
)
_LONGEST_CAPTION = 6  # words; longer ones tell a story


def noun_phrase(line: str) -> str:
    """The thing that a stamp's description names: "A mug.  Say Cheese!" → "a mug"; "" if it names none."""
    line = line.strip().replace("’", "'").replace("“", "").replace("”", "").strip()
    line = re.sub(r"^(An? \w+), (?=\w+ \w+[.!]?$)", r"\1 ", line)  # "A ripe, red tomato!"
    first = re.split(r"(?<=[a-z]{2})[.!?—;:]| \(|, | – ", line, maxsplit=1)[0].strip(" .!?")
    first = re.sub(
        r" (is|are|lets|carry|carries|resembles|pushes|used|for|said|worn|from|of stones|making) .*$", "", first
    )
    words = first.split()
    if not words or len(words) > _LONGEST_CAPTION or not re.fullmatch(r"[A-Za-z0-9' \-]+", first):
        return ""
    lowered = first[0].lower() + first[1:]
    if not lowered.startswith(_ARTICLES) and line[:1].isupper() and words[0].lower() in _VERBS:
        return ""  # "Eat your broccoli!"
    return with_article(lowered)


_VERBS = frozenset({"eat", "say", "remember", "enter", "down", "we", "this", "it's", "because", "left", "right", "big"})


def with_article(name: str) -> str:
    """ "zebra" → "a zebra", "owl" → "an owl"; plurals, mass nouns and names with an article stay as they are."""
    name = name.strip().rstrip(".").replace("’", "'")
    if name.lower().startswith(_ARTICLES) or _MASS_OR_PLURAL.search(name.lower()):
        return name
    return f"{'an' if name[0].lower() in 'aeio' or name.startswith('um') else 'a'} {name}"


# --- Pixels -----------------------------------------------------------------------------------------------------------

_MOST_PIXELS = 40_000_000


def load_square(path: Path, side: int, margin: bool = True) -> Image.Image:
    """The picture on a white square of `side` pixels, fitted inside, with a small margin if asked for."""
    with Image.open(path) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise UserError(f"{path}: {image.width}×{image.height} pixels is more than the demo opens.")
        picture = image.convert("RGBA")
    if box := picture.getchannel("A").getbbox():  # transparent borders tell nothing
        picture = picture.crop(box)
    inside = side - 2 * (side // 16) if margin else side
    scale = inside / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Shrinking with premultiplied alpha keeps hidden colours of transparent pixels from bleeding in.
    picture = picture.convert("RGBa").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).convert("RGBA")
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    return canvas.convert("RGB")


# --- Packages ---------------------------------------------------------------------------------------------------------


def _folder(package: Path, ending: str) -> Path:
    return _one(package, [path for path in package.rglob(Path(ending).name) if path.is_dir()], ending)


def _file(package: Path, ending: str) -> Path:
    return _one(package, [path for path in package.rglob(Path(ending).name) if path.is_file()], ending)


def _one(package: Path, candidates: list[Path], ending: str) -> Path:
    found = [path for path in candidates if path.as_posix().endswith(f"/{ending}")]
    if len(found) != 1:
        raise UserError(f"{package}: expected {ending} once, found it {len(found)} times. Delete the folder and rerun.")
    return found[0]
