"""What a tokenizer does with its special tokens: whether a text begins with one, and how they are spelled."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a sequence of this tokenizer starts with its begin-of-sequence token.

    The tokenizer is asked by example, since having such a token does not mean using it (GPT-2, SmolLM2, Qwen). One case
    it answers wrongly: a Llama tokenizer that transformers 5 builds from a bare vocabulary (a `tokenizer.model` without
    `tokenizer_config.json`) leaves it out, though Llama starts with `<s>` unless `add_bos_token` says otherwise.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    if tokenizer("a").input_ids[:1] == [bos]:
        return True
    described = tokenizer.name_or_path and not getattr(tokenizer, "vocab_file", None)  # it came with a tokenizer.json
    is_llama = any(base.__name__ == "LlamaTokenizer" for base in type(tokenizer).__mro__)
    return is_llama and not described and "add_bos_token" not in tokenizer.init_kwargs


def swallows_first_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text's own first space takes the place of the one that this tokenizer puts before every text.

    Llama's in transformers 5 does so; sentencepiece itself, with which LLaVA was trained, puts its space before that
    one too. Asked by example: a saved model's tokenizer has no class that tells.
    """
    one, two, three = (tokenizer(spaces + "a", add_special_tokens=False).input_ids for spaces in ("", " ", "  "))
    return one == two != three


def settle_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Has the tokenizer itself put its begin-of-sequence token first, where `begins_with_bos` says that it comes first.

    A tokenizer is saved as it is, without the doubt about it: one that transformers 5 made of a vocabulary whose
    configuration does not mention `add_bos_token` would come back as one that uses none.
    """
    if begins_with_bos(tokenizer) and tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        tokenizer.add_bos_token = True


def opening_token(tokenizer: PreTrainedTokenizerBase, *, image_first: bool) -> str:
    """The token that a sequence starts with, as text, or "".

    Where a tokenizer adds none but the sequence would start with an image (captions), its begin- or end-of-sequence
    token stands in front all the same. Language models park attention on the first position; if an image stands there,
    gradients through it are huge and the projector hardly learns (SmolLM2, first steps: gradient norm 285 against 58,
    loss after 16 steps 7.7 against 3.7).
    """
    if begins_with_bos(tokenizer):
        return str(tokenizer.bos_token)
    return str(tokenizer.bos_token or tokenizer.eos_token or "") if image_first else ""


def special_texts(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The strings that this tokenizer reads as special tokens wherever they occur in a text.

    The unknown token is left out: written in a text ("<unk>" in a web page) it only stands for a word.
    """
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added - {tokenizer.unk_token, ""})
