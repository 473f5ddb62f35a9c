"""Conversations to token ids and labels.

A template renders a conversation as text segments (`templates.py`). The text is cut at the images, each piece is
tokenized whole, and a token is supervised when its first character stands in a supervised segment: no lengths are
compared, so no vocabulary can put labels and answers out of step. LLaVA derives its labels from differences of token
counts and drops the sample, printing a warning, where they do not add up.

The ids are those of LLaVA's `tokenizer_image_token`: pieces between images are tokenized separately, each with the
prefix space its tokenizer gives to the start of a text (Llama's also to a text that starts with a space itself, as in
transformers 4), and the begin-of-sequence token comes first only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llava_npu.data.conversation.special_tokens import opening_token, special_texts, swallows_first_space
from llava_npu.data.conversation.templates import Template, get_template, render
from llava_npu.data.conversation.turns import IMAGE_MARK, Segment, Turn, parse_turns
from llava_npu.data.formats.parsing import Record
from llava_npu.data.tools.defects import RecordError, require_encodable
from llava_npu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_PLACEHOLDER = -200
IGNORE_INDEX = -100

Conversation = Sequence[Turn | Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """Token ids with one `IMAGE_PLACEHOLDER` per image, and per id its label: the id itself or `IGNORE_INDEX`."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class ExpandedConversation:
    """As the model takes it: an image is a run of image tokens. Only the first `num_images` images are left in it."""

    input_ids: list[int]
    labels: list[int]
    num_images: int


def encode_conversation(
    conversations: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template = "v1",
    max_length: int | None = None,
    record: Record | str | None = None,
) -> EncodedConversation:
    """Token ids and labels of a whole conversation, for training.

    Supervised are the answers and their end tokens, nothing else (template 'v0' also trains its separators, as the
    original does). A last question without an answer stays in, unsupervised. An answer before the first question is
    dropped, as LLaVA does (except with 'v0'). `<unk>` in a text is read as the tokenizer reads it, with 'v1', 'llama_2'
    and 'mistral' `<s>` too; any other special token spelled out in a text ("</s>") is refused, except with 'plain' and
    'v0', which the original trains on so.

    Args:
        conversations: LLaVA turns, {"from": "human" | "gpt", "value": "…"}, or `Turn`s.
        max_length: cut the ids here; an image counts as one id, since its number of tokens is not known yet
            (`expand_images` cuts by the real length).
        record: what to call this conversation in messages.

    Raises:
        UserError: a malformed conversation, an unknown template, an empty answer, or nothing supervised after the cut.
    """
    form, turns, name = _prepare(conversations, template, record)
    _refuse_markup(turns, form, tokenizer, name)
    segments = render(turns, form, tokenizer, name)
    encoded = _encode_segments(segments, tokenizer, _opening(form, tokenizer), has_spaces=form.writes_bos)
    if not _is_supervised(encoded.labels):
        if any(turn.role == "gpt" for turn in turns):
            raise UserError(
                f"{name}: this tokenizer, of {len(tokenizer)} tokens, has none for its answers; is it the language "
                "model's, and loaded whole?"
            )
        raise RecordError(
            f"{name}: no answer, so there is nothing to learn; add a gpt turn or remove the record",
            "empty or unanswerable",
        )
    if max_length is None or len(encoded.input_ids) <= max_length:
        return encoded
    cut = EncodedConversation(encoded.input_ids[:max_length], encoded.labels[:max_length])
    _require_supervision(cut.labels, len(encoded.input_ids), max_length, name)
    return cut


def encode_prompt(
    conversations: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template = "v1",
    record: Record | str | None = None,
    system: str | None = None,
) -> list[int]:
    """Token ids up to where the next answer starts, for inference; the last turn is a human one.

    They are exactly the ids that training on the answered conversation has before that answer, unless `system` gives
    another system prompt than the template's; a blank one does not.
    """
    system = system if system and system.strip() else None
    form, turns, name = _prepare(conversations, template, record)
    if turns[-1].role != "human":
        raise UserError(f"{name}: the last turn is an answer; a prompt ends with a human turn")
    _refuse_markup(turns, form, tokenizer, name)
    if system is not None:
        _refuse_markup_in_system(system, form, tokenizer, name)
    segments = render(turns, form, tokenizer, name, prompt=True, system=system)
    return _encode_segments(segments, tokenizer, _opening(form, tokenizer), has_spaces=form.writes_bos).input_ids


def encode_rendered_prompt(
    text: str, tokenizer: PreTrainedTokenizerBase, template: str | Template = "v1", *, add_bos: bool = True
) -> list[int]:
    """Token ids of a prompt that is text already, with a template's markup and `<image>` in it, as a client of LLaVA's
    own server sends it. One `IMAGE_PLACEHOLDER` for each `<image>`.

    Args:
        template: whose markup it is.
        add_bos: where the tokenizer has sequences start with a begin-of-sequence token, it comes first once, whether
            the text has it or not; False: only if it has.
    """
    form = get_template(template) if isinstance(template, str) else template
    opening = opening_token(tokenizer, image_first=False)
    if text.startswith(opening):
        if form.writes_bos:  # then training has it in the text as well
            opening = ""
        text = text.removeprefix(opening)
    elif not add_bos:
        opening = ""
    return _encode_segments([Segment(text)], tokenizer, opening, has_spaces=True).input_ids


def expand_images(
    encoded: EncodedConversation,
    tokens_per_image: Sequence[int],
    image_token_id: int,
    max_length: int | None = None,
    record: Record | str | None = None,
) -> ExpandedConversation:
    """Makes each placeholder as many image tokens as its image has, unsupervised, and cuts the result.

    An image is never cut in half: where the cut would fall into one, the text ends before it, and the sample continues
    without this image and any later one. `num_images` says how many are left; give the model only these.

    Args:
        tokens_per_image: the number of tokens of each image, in order.
        max_length: the most tokens to keep, images included.

    Raises:
        UserError: placeholders and images differ in number, or the cut leaves nothing supervised.
    """
    name = _name(record)
    num_placeholders = encoded.input_ids.count(IMAGE_PLACEHOLDER)
    if num_placeholders != len(tokens_per_image):
        raise UserError(
            f"{name}: {num_placeholders} '{IMAGE_MARK}' in the text but {len(tokens_per_image)} image(s); "
            f"write one '{IMAGE_MARK}' per image"
        )
    input_ids: list[int] = []
    labels: list[int] = []
    images = iter(tokens_per_image)
    num_images = 0
    full_length = len(encoded.input_ids) - num_placeholders + sum(tokens_per_image)
    limit = full_length if max_length is None else max_length
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        width = next(images) if token == IMAGE_PLACEHOLDER else 1
        if len(input_ids) + width > limit:
            break
        if token == IMAGE_PLACEHOLDER:
            input_ids += [image_token_id] * width
            labels += [IGNORE_INDEX] * width
            num_images += 1
        else:
            input_ids.append(token)
            labels.append(label)
    _require_supervision(labels, full_length, limit, name)
    return ExpandedConversation(input_ids, labels, num_images)


def _prepare(
    conversations: Conversation, template: str | Template, record: Record | str | None
) -> tuple[Template, tuple[Turn, ...], str]:
    name = _name(record)
    form = get_template(template) if isinstance(template, str) else template
    turns = parse_turns(conversations, name)
    if turns[0].role == "gpt" and not form.keeps_opening_answer:
        turns = turns[1:]
    if not turns:
        raise RecordError(f"{name}: no human turn; a conversation starts with a question", "empty or unanswerable")
    return form, turns, name


def _name(record: Record | str | None) -> str:
    if record is None:
        return "conversation"
    return record if isinstance(record, str) else record.name


def _refuse_markup(turns: Sequence[Turn], template: Template, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """A turn that spells out a special token or the template's markup would end itself, or begin another turn."""
    forbidden = _markup(template, tokenizer)
    for i, turn in enumerate(turns):
        for text in forbidden:
            if text in turn.text:
                raise UserError(
                    f"{name}: conversations[{i}].value contains {text!r}, which template {template.name!r} with this "
                    "tokenizer reads as markup, not as text; remove it or write it differently"
                )


def _refuse_markup_in_system(system: str, template: Template, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    require_encodable(system, f"{name}: the system prompt")
    for text in [*_markup(template, tokenizer), IMAGE_MARK]:
        if text in system:
            raise UserError(
                f"{name}: the system prompt contains {text!r}, which template {template.name!r} with this tokenizer "
                "reads as markup, not as text; remove it or write it differently"
            )


def _markup(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a text must not contain, apart from images."""
    if template.reads_special_tokens == "all":
        return []
    special = special_texts(tokenizer)
    if template.reads_special_tokens == "begin" and tokenizer.bos_token != tokenizer.eos_token:
        special -= {tokenizer.bos_token}
    return sorted({*special, *template.markup} - {IMAGE_MARK})


def _opening(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    return "" if template.writes_bos else opening_token(tokenizer, image_first=template.captions)


def _encode_segments(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, opening: str, *, has_spaces: bool = False
) -> EncodedConversation:
    """`has_spaces`: a chat template wrote the text, prefix spaces and all (`jinja_template.py`)."""
    input_ids: list[int] = []
    labels: list[int] = []
    if opening:
        input_ids.append(tokenizer.convert_tokens_to_ids(opening))
        labels.append(IGNORE_INDEX)
    for i, piece in enumerate(_split_at_images(segments)):
        if i:
            input_ids.append(IMAGE_PLACEHOLDER)
            labels.append(IGNORE_INDEX)
        ids, starts = _tokenize(piece, tokenizer, has_spaces=has_spaces)
        input_ids += ids
        labels += _label(ids, starts, piece)
    return EncodedConversation(input_ids, labels)


def _split_at_images(segments: Sequence[Segment]) -> list[list[Segment]]:
    """The segments between images: one list more than there are images."""
    pieces: list[list[Segment]] = [[]]
    for segment in segments:
        first, *later = segment.text.split(IMAGE_MARK)
        pieces[-1].append(Segment(first, segment.supervised, segment.starts_answer))
        pieces += [[Segment(text, segment.supervised)] for text in later]
    return pieces


def _tokenize(
    piece: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, *, has_spaces: bool
) -> tuple[list[int], list[int]]:
    """Token ids of a piece of text and the character at which each token starts.

    The piece is tokenized whole, but no token may cross from the prompt into an answer ("\\n" + "\\nYes" where the
    vocabulary has a token "\\n\\n"): the prompt alone, all that inference has, would get other tokens. So the text is
    tokenized up to each answer's start, and where the tokens so far would change by what follows, it is cut there.
    """
    text = "".join(segment.text for segment in piece)
    swallows = not has_spaces and text.startswith((" ", "▁")) and swallows_first_space(tokenizer)
    prefix = " " if swallows else ""
    text = prefix + text
    cuts = set()
    end, supervised = len(prefix), False
    for segment in piece:
        # Without character offsets, an edge at every change of supervision tells which tokens lie on which side.
        if segment.starts_answer or (not tokenizer.is_fast and segment.supervised != supervised):
            cuts.add(end)
        end, supervised = end + len(segment.text), segment.supervised
    cuts.discard(len(prefix))  # nothing before it

    done_ids: list[int] = []
    done_starts: list[int] = []
    ids: list[int] = []
    starts: list[int] = []
    base = 0
    for left, right in pairwise(sorted({0, *cuts, len(text)})):
        new_ids, offsets = _tokenize_text(text[base:right], tokenizer)
        if new_ids[: len(ids)] != ids:
            done_ids += ids
            done_starts += starts
            base, ids, starts = left, [], []
            new_ids, offsets = _tokenize_text(text[base:right], tokenizer)
        starts = starts + [left] * (len(new_ids) - len(ids)) if offsets is None else [base + at for at in offsets]
        ids = new_ids
    return done_ids + ids, [max(0, start - len(prefix)) for start in done_starts + starts]


def _tokenize_text(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int] | None]:
    """Ids, and where the tokenizer can tell, the first character of each."""
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=tokenizer.is_fast,
        return_attention_mask=False,
        verbose=False,  # no warning about length: images and truncation come later
    )
    offsets = encoding["offset_mapping"] if tokenizer.is_fast else None
    return list(encoding["input_ids"]), None if offsets is None else [start for start, _ in offsets]


def _label(ids: Sequence[int], starts: Sequence[int], piece: Sequence[Segment]) -> list[int]:
    """Each token's id where its first character is supervised."""
    supervised = [segment.supervised for segment in piece for _ in segment.text]
    return [token if supervised[start] else IGNORE_INDEX for token, start in zip(ids, starts, strict=True)]


def _is_supervised(labels: Sequence[int]) -> bool:
    return any(label != IGNORE_INDEX for label in labels)


def _require_supervision(labels: Sequence[int], length: int, limit: int, name: str) -> None:
    if not _is_supervised(labels):
        raise RecordError(
            f"{name}: {length} tokens, and the first {limit} (max_length) hold no word of an answer; raise max_length, "
            "shorten the question or remove the record",
            "answers cut off",
        )
