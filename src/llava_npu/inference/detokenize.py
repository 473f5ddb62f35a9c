"""Where an answer ends, and its token ids as text while they come: what is shown adds up to the answer decoded at once.

An answer is its decoded text without special tokens, cut before the first stop text, and without white space around it
unless that is asked for. So white space is held back until something follows it, and the beginning of a possible stop
text until it turns out to be one or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_npu.data.conversation.templates import EOS, VALUE, get_template

Markup = tuple[str, str]  # before and after an answer

_INCOMPLETE = "\ufffd"  # what decoders give for a character of which not all bytes are there yet


def finished_text(text: str, stops: Sequence[str]) -> str:
    """The answer in a whole decoded text; empty stop texts are ignored."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()


class AnswerText:
    """The text of one answer.

    Attributes:
        stopped: whether a stop text has come; nothing after it counts.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, min_tokens: int = 0, markup: Markup | None = None):
        """
        Args:
            stops: texts that end the answer; empty ones are ignored.
            min_tokens: how many tokens come before stop texts count; what they say is not searched.
            markup: white space that the template writes around an answer; only that is removed then. None removes all
                white space around it.
        """
        self._decoder = _Decoder(tokenizer)
        self._stops = [stop for stop in stops if stop]
        self._min_tokens = min_tokens
        self._markup = markup
        self._text = ""
        self._searched = 0  # characters that hold no stop text
        self._shown = 0  # characters of the answer, which starts behind the text's leading white space
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes the next token; returns what may be shown of the answer now and was not before."""
        piece = self._decoder.add(token)
        self._min_tokens -= 1
        if not piece or self.stopped:
            return ""
        self._text += piece
        if self._min_tokens >= 0:
            self._searched = len(self._text)
            return self._show(self._text)
        if self._cut():
            return self._show(self._text)
        return self._show(self._text[: max(self._searched, len(self._text) - self._held_back())])

    def finish(self) -> str:
        """No token follows: the rest of the answer."""
        if self.stopped:
            return ""
        self._text += self._decoder.rest()
        if not self._cut() and self._markup is not None:
            self._text = self._text.removesuffix(self._markup[1])
        return self._show(self._text)

    def _cut(self) -> bool:
        """Cuts the text before the first stop text in it, if there is one."""
        ends = [at for stop in self._stops if (at := self._text.find(stop, self._searched)) >= 0]
        if ends:
            self.stopped = True
            self._text = self._text[: min(ends)]
        else:
            longest = max(map(len, self._stops), default=1)
            self._searched = max(self._searched, len(self._text) - longest + 1)
        return self.stopped

    def _held_back(self) -> int:
        """Characters at the end that may be markup, or the beginning of a stop text."""
        if self._markup is not None and self._markup[1] and self._text.endswith(self._markup[1]):
            return len(self._markup[1])
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._text.endswith(stop[:n])),
            default=0,
        )

    def _show(self, text: str) -> str:
        answer = text.strip() if self._markup is None else text.removeprefix(self._markup[0])
        new = answer[self._shown :]
        self._shown = max(self._shown, len(answer))
        return new


class _Decoder:
    """Decodes a window of the latest tokens only, so that a long answer costs no more per token than a short one.

    The tokens of the latest complete text stay in front of the window: many tokenizers write a word at the start of a
    text differently (without its space) than the same word inside. (Llama's decoder takes a run of single-byte tokens
    as all valid or all broken, however long: a model that writes broken UTF-8 may look different piece by piece.)
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # their text was given out already
        self._context_text = ""
        self._new: list[int] = []

    def add(self, token: int) -> str:
        self._new.append(token)
        text = self._decode(self._context + self._new)
        if text.endswith(_INCOMPLETE) or len(text) <= len(self._context_text):
            return ""
        return self._give(text)

    def rest(self) -> str:
        return self._give(self._decode(self._context + self._new)) if self._new else ""

    def _give(self, text: str) -> str:
        piece = text[len(self._context_text) :]
        alone = self._decode(self._new)
        if alone:  # enough of a context by itself; special tokens alone are none
            self._context, self._context_text = self._new, alone
        else:
            self._context, self._context_text = self._context + self._new, text
        self._new = []
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def stopping_arguments(model: Any, tokenizer: Any, template_name: str) -> dict[str, Any]:
    """Arguments for `generate`: the end tokens of model and tokenizer, and the template's own end mark, if any."""
    configured = model.generation_config.eos_token_id
    stop = stop_string(template_name)
    mark = tokenizer.get_added_vocab().get(stop)  # as one token: "<|eot_id|>" need not be the tokenizer's own end
    ends = {tokenizer.eos_token_id, mark, *(configured if isinstance(configured, list) else [configured])} - {None}
    return {
        "eos_token_id": sorted(ends) or None,
        "pad_token_id": tokenizer.pad_token_id,
        **({"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}),
    }


def stop_string(template_name: str) -> str:
    """What the template writes after an answer and its end token: "\\n" after a caption, "<|im_end|>", or ""."""
    template = get_template(template_name)
    texts = [segment.text for segment in (*template.answer, *template.closing) if segment.supervised]
    after = texts[texts.index(VALUE) + 1 :] if VALUE in texts else []
    return "".join(after).replace(EOS, "").strip(" ")


def surrounding_space(tokenizer: Any, template_name: str) -> tuple[str, str]:
    """White space that the template writes before and after an answer, as far as decoding shows it."""
    texts = [segment.text.replace(EOS, "") for segment in get_template(template_name).answer]
    if VALUE not in texts:
        return "", ""
    place = texts.index(VALUE)
    before, after = "".join(texts[:place]), "".join(texts[place + 1 :])
    if before:  # Llama's tokenizer drops the first space when it decodes
        begun = tokenizer("a", add_special_tokens=False).input_ids
        rest = tokenizer(f"a{before}b", add_special_tokens=False).input_ids[len(begun) :]
        before = before if tokenizer.decode(rest).startswith(before) else ""
    return before if before.isspace() else "", after if after == " " else ""
