"""Names of weights: official LLaVA's, the four spellings of Hugging Face's LLaVA, and what vLLM reads.

All conversion goes through one spelling, that of the models on the hub (`llava-hf/llava-1.5-7b-hf`):
`language_model.model.*`, `language_model.lm_head.*`, `multi_modal_projector.*`, `vision_tower.vision_model.*`,
`image_newline`. transformers reads it, and vLLM reads no other.
"""

from __future__ import annotations

import re

PROJECTOR = "multi_modal_projector."
VISION_TOWER = "vision_tower."
LM_HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
IMAGE_NEWLINE = "image_newline"

OFFICIAL_PROJECTOR = "model.mm_projector."
OFFICIAL_TOWER = "model.vision_tower.vision_tower."
# Follow from the configuration; old checkpoints hold them all the same.
_DERIVED = re.compile(r"(rotary_emb\.inv_freq|position_ids)$")
_WRAPPED = ("clip", "siglip")  # towers whose weights stand under `vision_model.` on the hub

_TO_HUB = (
    (re.compile(r"(?:language_model\.)?lm_head\."), "language_model.lm_head."),
    (re.compile(r"(?:model\.)?language_model\.(?:model\.)?"), "language_model.model."),
    (re.compile(r"(?:model\.)?multi_modal_projector\."), PROJECTOR),
    (re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?"), VISION_TOWER),
    (re.compile(r"(?:model\.)?image_newline$"), IMAGE_NEWLINE),
)
_FROM_OFFICIAL = (
    (re.compile(r"model\.(embed_tokens|layers|norm)\."), r"language_model.model.\1."),
    (re.compile(r"lm_head\."), "language_model.lm_head."),
    (re.compile(r"model\.mm_projector\."), PROJECTOR),
    (re.compile(r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?"), VISION_TOWER),
    (re.compile(r"model\.image_newline$"), IMAGE_NEWLINE),
)


def hub_name(name: str, tower_kind: str) -> str | None:
    """A weight's name on the hub, from any spelling of Hugging Face's; None for what a configuration gives.

    An unknown name is returned as it is: whoever compares with the model's names reports it.
    """
    return _renamed(name, _TO_HUB, tower_kind)


def from_official(name: str, tower_kind: str) -> str | None:
    """As `hub_name`, from official LLaVA's names; a projector's weight keeps its own name behind the prefix."""
    return _renamed(name, _FROM_OFFICIAL, tower_kind)


def to_official(name: str) -> str:
    """Inverse of `from_official`."""
    for ours, theirs in (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        (PROJECTOR, OFFICIAL_PROJECTOR),
        (VISION_TOWER, OFFICIAL_TOWER),
        (IMAGE_NEWLINE, f"model.{IMAGE_NEWLINE}"),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def tower_weight(name: str, tower_kind: str) -> str:
    """The hub's name of a weight that the tower by itself calls `name`."""
    wrapped = "vision_model." if tower_kind.startswith(_WRAPPED) else ""
    return f"{VISION_TOWER}{wrapped}{name.removeprefix('vision_model.')}"


def _renamed(name: str, rules: tuple[tuple[re.Pattern[str], str], ...], tower_kind: str) -> str | None:
    if _DERIVED.search(name):
        return None
    for pattern, replacement in rules:
        if match := pattern.match(name):
            renamed = match.expand(replacement) + name[match.end() :]
            if renamed.startswith(VISION_TOWER):
                return tower_weight(renamed.removeprefix(VISION_TOWER), tower_kind)
            return renamed
    return name
