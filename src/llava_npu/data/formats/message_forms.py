"""The other shapes in which people keep conversations, brought into LLaVA's.

LLaVA, ShareGPT
    {"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", …}], "image": "1.jpg"}
messages
    {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", …}], "images": ["1.jpg"]}
messages with parts
    the same with "content": [{"type": "image"}, {"type": "text", "text": "What?"}]; an image is named in its part
    ("image", "path", "url", or "image_url": {"url": …}) or taken from "images" in order
question-answer pairs
    {"texts": [{"user": "What?", "assistant": "A cat."}], "images": […]}, as in The Cauldron; the images come before the
    first question

`conversations` and `messages` may be exchanged, and so may `from`/`value` and `role`/`content`. System messages are
refused: a template brings its own, the one it was trained with.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

from llava_npu.data.conversation.turns import IMAGE_MARK, join_parts
from llava_npu.data.tools.defects import RecordError, shown
from llava_npu.errors import nearest

CONVERSATION_KEYS = ("conversations", "messages", "texts")
# ShareGPT's own files say all of these.
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "chatgpt": "gpt"}
# Exclude answers from the loss in other projects' files: when false, and when true.
_LEARNED_KEYS = (
    "loss", "weight", "train", "training", "train_on_turn", "trainable", "learn", "supervise", "supervised",
    "calculate_loss", "compute_loss",
)  # fmt: skip
_EXCLUDED_KEYS = ("mask", "masked", "is_masked", "ignore", "ignored", "ignore_loss", "no_loss")
# Other names of the same, of which some say it of parts of an answer, or by how much.
_LOSS_KEY = (
    r"((is|in|use|with|no|not|do|should|has|to|sample|token|answer|response|turn|train|ignore|loss|mask)_)*"
    r"(loss(es)?|loss_?mask|weights?|masks?|masked|masking|train|trained|training|trainable|learn|learned|learnable"
    r"|supervised?|unsupervised|skip|skipped|excluded?|ignored?|ignore_index)(_(loss|mask|scale|weights?|flag|factor))*"
)
_EXCLUDING = r"no_\w+|not_\w+|(is_|to_)?(mask|ignore|skip|exclude|unsupervised)\w*"
_NO_MEDIA = "only images are read: remove the record, or keep frames of it as images"
_NO_LOSS_SCALE = "only whole answers can be excluded from the loss, by 'loss': false; remove it"
_NO_REASONING = "it would not be learned: put it into the answer's text, or remove it"
_NO_TOOLS = "tool calls are not learned: write them into the answer's text, or remove the record"
_NO_PREFERENCES = "preferences are not learned: keep the chosen answer, and remove it"
_NO_BAD_ANSWERS = "what is marked as bad would be learned as a good answer: remove the record"
_NO_ONE_ANSWER = "it would not be heeded: exclude answers one by one, by 'loss': false in their turns, or remove it"
_NO_SYSTEM = (
    "templates bring their own system prompt; move its words into the first question, or remove it (and choose a "
    "template whose system prompt suits)"
)
_SUFFIX = "(_(path|file|url|list|name|data|bytes|base64|b64)s?)?"
_IMAGE_KEY = rf"(images?|imgs?|pictures?|pics?|photos?|media|pixel_values){_SUFFIX}"
_Patterns = tuple[tuple[str, str], ...]  # of keys in snake case, and what to do about them
_IMAGE_KEYS: _Patterns = ((_IMAGE_KEY, "rename it to 'image'"),)
_MEDIA = (rf"(videos?|audios?|sounds?|speech|frames){_SUFFIX}", _NO_MEDIA)
_PREFERENCES = (
    r"(\w+_)?reject(ed|s)?(_\w+)?|chosen(_\w+)?|(non_|dis)?preferred(_\w+)?|preferences?|output_\d|kto_tag"
    r"|(positive|negative)_messages",
    _NO_PREFERENCES,
)
# TRL and ms-swift (KTO) have good and bad answers side by side.
_APPROVED = (r"label|(is_)?(correct|good|desirable|accepted|approved)", _NO_BAD_ANSWERS)
_MEDIA_NAME = re.compile(
    r"[^\n]{1,300}\.(jpe?g|png|gif|webp|bmp|tiff?|avif|mp4|avi|mov|mkv|webm|wav|mp3|flac|m4a|ogg)", re.IGNORECASE
)
_SYSTEM = (r"sys(tem)?_?(prompt|message|text|instructions?)|system", _NO_SYSTEM)
# Keys that matter and are not read.
_RECORD_KEYS: _Patterns = (
    _MEDIA,
    _SYSTEM,
    _PREFERENCES,
    _APPROVED,
    ("tools|functions|tool_calls?|function_calls?", _NO_TOOLS),
    (r"reasoning(_\w+)?|thinking(_\w+)?|cot|chain_of_thought", _NO_REASONING),
    ("loss|loss_mask|loss_scale|weights", _NO_ONE_ANSWER),
    (_LOSS_KEY, _NO_ONE_ANSWER),
    ("history", "turns outside of the conversation are not read: write them into it"),
    ("objects", "boxes and references to them are not read: write them into the text"),
)
_TURN_KEYS: _Patterns = (
    _MEDIA,
    _SYSTEM,
    _PREFERENCES,
    _APPROVED,
    ("tools?|tool_calls?|function_calls?", _NO_TOOLS),
    (r"reasoning(_\w+)?|thinking(_\w+)?|think|thoughts?|cot|chain_of_thought|rationale|refusal", _NO_REASONING),
    (rf"(?!({'|'.join((*_LEARNED_KEYS, *_EXCLUDED_KEYS))})$){_LOSS_KEY}|train_detail", _NO_LOSS_SCALE),
    (_IMAGE_KEY, f"list the record's images in 'images', with '{IMAGE_MARK}' in the text"),
)
_PART_KEYS: _Patterns = (*_TURN_KEYS, (_LOSS_KEY, _NO_LOSS_SCALE))


def as_llava(entry: Mapping[str, Any], name: str) -> tuple[Any, list[Any]]:
    """The conversation as a list of {"from", "value"}, still to be checked by `parse_turns`, and its images in order.

    Raises:
        RecordError: the conversation is missing, is given twice, or a part of it has no place in LLaVA's form.
    """
    given = [key for key in CONVERSATION_KEYS if entry.get(key) is not None]
    if not given:
        raise RecordError(
            f"{name} has no 'conversations'; its keys are {sorted(map(str, entry))}."
            f"{nearest('conversations', map(str, entry))}"
        )
    if len(given) > 1:
        raise RecordError(f"{name} has both {given[0]!r} and {given[1]!r}; keep one of them")
    _refuse_keys(entry, name, _RECORD_KEYS)
    images = _listed_images(entry, name)
    turns = entry[given[0]]
    if not isinstance(turns, list | tuple):
        return turns, images
    if given == ["texts"]:
        return _from_pairs(turns, len(images), name), images
    listed = iter(images)
    ordered: list[Any] = []
    converted = [
        _convert_turn(turn, f"{name}: {given[0]}[{i}]", listed, ordered) if isinstance(turn, Mapping) else turn
        for i, turn in enumerate(turns)
    ]
    return converted, [*ordered, *listed]  # too many, too few: `parse_record` compares them with the marks


def _listed_images(entry: Mapping[str, Any], name: str) -> list[Any]:
    if entry.get("image") is not None and entry.get("images") is not None:
        raise RecordError(f"{name} has both 'image' and 'images'; keep one of them")
    field = "images" if entry.get("images") is not None else "image"
    value = entry.get(field)
    if value is None:
        refuse_unread_media(entry, name)
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def refuse_unread_media(entry: Mapping[str, Any], name: str) -> None:
    """Raises `RecordError` if an entry without images names some all the same, or a video or a recording."""
    _refuse_keys(entry, name, (_MEDIA,))
    for key in entry:
        if _find(key, _IMAGE_KEYS) and _is_given(entry, key):
            raise RecordError(f"{name}: {key!r} is {shown(entry[key])}; {_find(key, _IMAGE_KEYS)}", "image count")
        # Of question-answer pairs no mark would miss the image.
        if key != "id" and (_names_media(entry[key]) or (_names_files(entry[key]) and _is_misspelt_image(key))):
            raise RecordError(
                f"{name}: {key!r} is {shown(entry[key])}; write 'image' or 'images' if it is meant, or remove it",
                "image count",
            )


def _convert_turn(turn: Mapping[str, Any], where: str, listed: Iterator[Any], ordered: list[Any]) -> dict[str, Any]:
    """Brings a turn into LLaVA's form; its images go from `listed`, or from its parts, to `ordered`."""
    role = turn.get("from", turn.get("role"))
    if role == "system":
        raise RecordError(f"{where} is a system message; {_NO_SYSTEM}")
    if isinstance(other := turn.get("role"), str) and _ROLES.get(other, other) != _ROLES.get(role, role):
        raise RecordError(f"{where} has both 'from' and 'role', which differ; keep one of them")
    _refuse_keys(turn, where, _TURN_KEYS)
    if turn.get("value") is not None and turn.get("content") not in (None, turn["value"]):
        raise RecordError(f"{where} has both 'value' and 'content', which differ; keep one of them")
    content = turn.get("value", turn.get("content"))
    if isinstance(content, list | tuple):
        content = _join_parts(content, where, listed, ordered)
    elif isinstance(content, str):
        ordered += islice(listed, content.count(IMAGE_MARK))
    converted: dict[str, Any] = {}
    if "from" in turn or "role" in turn:
        converted["from"] = _ROLES.get(role, role) if isinstance(role, str) else role
    if "value" in turn or "content" in turn:
        converted["value"] = content
    if not _is_learned(turn, where, is_answer=converted.get("from") == "gpt"):
        converted["supervised"] = False
    return converted


def _is_given(values: Mapping[str, Any], key: str) -> bool:
    """Tables have a column for every key of any row: what is empty is absent."""
    return key in values and values[key] not in (None, "", [], (), {})


def _refuse_keys(values: Mapping[str, Any], where: str, refused: _Patterns) -> None:
    for key in values:
        if (fix := _find(key, refused)) and _is_given(values, key) and not _is_neutral(key, values[key], fix):
            raise RecordError(f"{where}: {key!r} is {shown(values[key])}; {fix}")


def _is_neutral(key: Any, value: Any, fix: str) -> bool:
    """Whether a key says only what holds anyway: "weight": 1 or "masked": false of a record, "label": true."""
    name = _snake_case(key)
    if fix is _NO_BAD_ANSWERS:
        return value is not False  # others, the text "False" too, are classes
    if fix is not _NO_ONE_ANSWER or name == "loss":
        return False
    if name == "weight":
        return value != 0  # of the record among others, or of what it is about; 0 leaves it out
    keeps = 0 if re.fullmatch(_EXCLUDING, name) else 1
    return isinstance(value, bool | int | float) and value == keeps


def _names_files(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return bool(values) and all(isinstance(each, str) and re.search(r"\.\w{3,4}$", each) for each in values)


def _names_media(value: Any) -> bool:
    """Whether it is the name of an image, a video or a recording, several, or an image as `datasets` stores it."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_names_media, value))
    if isinstance(value, Mapping):
        return value.get("bytes") is not None
    return isinstance(value, str) and len(value) < 310 and bool(_MEDIA_NAME.fullmatch(value))


@lru_cache(10_000)
def _is_misspelt_image(key: Any) -> bool:
    name = str(key).lower()
    return name.isalpha() and bool(difflib.get_close_matches(name, ["image", "images"], n=1, cutoff=0.8))


@lru_cache(10_000)  # the same few keys in millions of records
def _find(key: Any, patterns: _Patterns) -> str:
    """What goes with the pattern that a key in snake case matches; "" if none does."""
    return next((found for pattern, found in patterns if re.fullmatch(pattern, _snake_case(key))), "")


@lru_cache(10_000)
def _snake_case(key: Any) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[-\s]", "_", str(key)).lower().strip("_")


def _is_learned(turn: Mapping[str, Any], where: str, *, is_answer: bool) -> bool:
    """Whether an answer is trained on, as ms-swift ("loss"), OpenAI ("weight"), axolotl ("train") and others do."""
    learned = True
    for key, value in turn.items():
        name = _snake_case(key)
        if value is None or name not in (*_LEARNED_KEYS, *_EXCLUDED_KEYS):
            continue
        if value not in (0, 1):  # True and False among them
            raise RecordError(f"{where}: {key!r} is {shown(value)}; allowed are true and false (or 1 and 0)")
        keeps = bool(value) is (name in _LEARNED_KEYS)
        if keeps and not is_answer:
            raise RecordError(f"{where}: {key!r} is {shown(value)}, but only answers are learned; leave it out here")
        learned = learned and keeps
    return learned or not is_answer


def _join_parts(parts: list[Any] | tuple[Any, ...], where: str, listed: Iterator[Any], ordered: list[Any]) -> str:
    texts: list[str | None] = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            _refuse_keys(part, f"{where}: part {i}", _PART_KEYS)
            texts.append(part["text"])
        elif kind in ("image", "image_url") and not part.get("text"):
            image = _named_image(part)
            if image is None:
                image = next(listed, None)
            if image is None:
                raise RecordError(
                    f"{where}: part {i} is an image without a name, and 'images' lists no more; name it there or here",
                    "image count",
                )
            ordered.append(image)
            texts.append(None)
        else:
            raise RecordError(
                f"{where}: part {i} is {shown(part)}; allowed are {{'type': 'text', 'text': '…'}} and "
                "{'type': 'image', 'image': 'PATH'}"
            )
    return join_parts(texts)


def _named_image(part: Mapping[str, Any]) -> Any:
    url = part.get("image_url")
    candidates = (
        part.get("image"),
        part.get("path"),
        part.get("url"),
        url.get("url") if isinstance(url, dict) else url,
    )
    return next((candidate for candidate in candidates if candidate is not None), None)


def _from_pairs(pairs: list[Any] | tuple[Any, ...], num_images: int, name: str) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, Mapping) or "user" not in pair or "assistant" not in pair:
            raise RecordError(f"{name}: texts[{i}] is {shown(pair)}; a pair is {{'user': '…', 'assistant': '…'}}")
        where = f"{name}: texts[{i}]"
        _refuse_keys(pair, where, _TURN_KEYS)
        learned = _is_learned(pair, where, is_answer=True)
        question = pair["user"]
        if i == 0 and isinstance(question, str) and IMAGE_MARK not in question:
            question = f"{IMAGE_MARK}\n" * num_images + question
        answer = {"from": "gpt", "value": pair["assistant"], "supervised": learned}
        turns += [{"from": "human", "value": question}, answer]
    return turns
