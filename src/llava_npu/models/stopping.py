"""Where a generated answer begins and ends."""

from __future__ import annotations

from typing import Any

from llava_npu.data.conversation.templates import EOS, VALUE, get_template


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
