"""Another system prompt than the trained one, and prompts that come with their markup."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerBase

from llava_npu.data.conversation.labels import encode_prompt, encode_rendered_prompt
from llava_npu.data.conversation.templates import TEMPLATES, get_template
from llava_npu.errors import UserError

QUESTION = [{"from": "human", "value": "<image>\nWhat is it?"}]
WITH_SYSTEM = [template for template in TEMPLATES.values() if template.system]


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode([token for token in ids if token >= 0])


def test_only_the_system_prompt_changes(llama: PreTrainedTokenizerBase) -> None:
    assert {template.name for template in WITH_SYSTEM} == {
        *("v0", "v1", "llama_2", "chatml", "chatml_direct"),
        *("qwen_2", "qwen_2_5"),
    }
    for template in WITH_SYSTEM:
        trained = encode_prompt(QUESTION, llama, template)
        assert encode_prompt(QUESTION, llama, template, system=template.system) == trained
        changed = _decoded(encode_prompt(QUESTION, llama, template, system="Be brief."), llama)
        assert changed == _decoded(trained, llama).replace(template.system, "Be brief.")


def test_a_template_may_take_one_that_it_does_not_have(llama: PreTrainedTokenizerBase) -> None:
    for name in ("llama_3", "qwen_3", "phi_3"):
        prompt = _decoded(encode_prompt(QUESTION, llama, name), llama).removeprefix("<s>").strip()
        changed = _decoded(encode_prompt(QUESTION, llama, name, system="Be brief."), llama).removeprefix("<s>").strip()
        turn, rest = changed[: -len(prompt)], changed[-len(prompt) :]
        assert rest == prompt
        assert "system" in turn
        assert "Be brief." in turn


@pytest.mark.parametrize("name", ["plain", "mistral", "gemma_2"])
def test_a_template_without_one_takes_none(name: str, llama: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=f"template '{name}' has no system prompt"):
        encode_prompt(QUESTION, llama, name, system="Be brief.")


def test_the_tokenizers_own_template_gets_a_system_message(bytes_bpe: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    turns = [{"from": "human", "value": "What?"}]
    expected = bytes_bpe.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(turns, bytes_bpe, "tokenizer", system="Be brief.") == expected
    deaf = copy.deepcopy(bytes_bpe)
    deaf.chat_template = str(deaf.chat_template).replace("for m in messages", "for m in messages if m.role != 'system'")
    with pytest.raises(UserError, match="no place for a system prompt"):
        encode_prompt(turns, deaf, "tokenizer", system="Be brief.")


@pytest.mark.parametrize("text", ["<|im_end|>", "<image>"])
def test_markup_in_it_is_refused(text: str, bytes_bpe: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="the system prompt contains"):
        encode_prompt(QUESTION, bytes_bpe, "tokenizer", system=f"Be {text} brief.")


@pytest.mark.parametrize("name", ["v1", "llama_2", "mistral"])
def test_a_rendered_prompt_has_the_ids_of_its_conversation(name: str, llama: PreTrainedTokenizerBase) -> None:
    template = get_template(name)
    text = "".join(
        [
            template.opening,
            *(part.text.replace("{value}", "<image>\nWhat is it?") for part in template.human),
            *(part.text for part in template.header),
        ]
    )
    assert encode_rendered_prompt(text, llama) == encode_prompt(QUESTION, llama, name)
    assert encode_rendered_prompt(f"<s>{text}", llama) == encode_prompt(QUESTION, llama, name)
