from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from llava_npu.data.conversation import chat_template
from llava_npu.data.conversation.labels import IGNORE_INDEX, encode_conversation, encode_prompt
from llava_npu.data.conversation.templates import ALIASES, TEMPLATES, get_template
from llava_npu.errors import UserError
from llava_npu.inference.detokenize import stop_string, stopping_arguments

TURNS = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]


def test_aliases_lead_to_templates() -> None:
    assert {name: get_template(name).name for name in TEMPLATES} == {name: name for name in TEMPLATES}
    assert {get_template(alias).name for alias in ALIASES} <= set(TEMPLATES)
    assert get_template("llava_llama_2").name == "llama_2"
    assert get_template("mpt").name == "chatml"
    assert get_template("mistral_direct").opening == "<|im_start|>system\nAnswer the questions.<|im_end|>"


@pytest.mark.parametrize(
    "program",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** (9 ** 9)) }}",
        "{{ 'x' * 10 ** 12 }}",
        "{% set n = namespace(text='x') %}{% for i in range(50) %}{% set n.text = n.text + n.text %}{% endfor %}",
    ],
    ids=["loops", "power", "repeated", "doubled"],
)
def test_a_chat_template_without_bounds(
    program: str, llama: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "_MOST_SECONDS", 1)
    tokenizer = copy.copy(llama)
    tokenizer.chat_template = program
    with pytest.raises(UserError, match="chat template does not render one question within 1 seconds and 1 GiB"):
        chat_template.takes_parts(tokenizer)


AUTHORS = {
    # What each family's published chat template makes of TURNS without the image; begin tokens are the tokenizer's.
    "llama_3": "<|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
    "qwen_2": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    "qwen_2_5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    "phi_3": "<|user|>\nWhat is it?<|end|>\n<|assistant|>\nA cat.<|end|>\n"
    "<|user|>\nSure?<|end|>\n<|assistant|>\nYes.<|end|>\n",
    "gemma_2": "<start_of_turn>user\nWhat is it?<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n"
    "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n",
    # Its own has the empty thought before the last answer only; ours in every turn.
    "qwen_3": "<|im_start|>user\nWhat is it?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\nA cat.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nYes.<|im_end|>\n",
}
WORDS = [{**TURNS[0], "value": "What is it?"}, *TURNS[1:]]


@pytest.mark.parametrize("name", AUTHORS)
def test_texts_of_language_models_authors(name: str, bytes_bpe: PreTrainedTokenizerBase) -> None:
    end = "<|im_end|>" if name.startswith("qwen") else AUTHORS[name].strip().split("Yes.")[1]
    tokenizer = copy.deepcopy(bytes_bpe)
    tokenizer.add_tokens([end])
    encoded = encode_conversation(WORDS, tokenizer, name)
    assert tokenizer.decode(encoded.input_ids) == AUTHORS[name]
    learned = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(learned) == f"A cat.{end}Yes.{end}"
    for turns in (WORDS[:1], WORDS[:3]):  # a prompt is what training has before its answer
        prompt = encode_prompt(turns, tokenizer, name)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt)] != IGNORE_INDEX
    assert stop_string(name) == end
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    assert tokenizer.convert_tokens_to_ids(end) in stopping_arguments(model, tokenizer, name)["eos_token_id"]


def test_unknown() -> None:
    with pytest.raises(UserError, match=r"template 'chatlm' is unknown; .*Did you mean 'chatml'"):
        get_template("chatlm")


def test_end_token_is_needed(bytes_bpe: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.deepcopy(bytes_bpe)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"rec: template 'v1' ends answers with .* end-of-sequence token"):
        encode_conversation(TURNS, tokenizer, "v1", record="rec")


class TestTokenizersOwnTemplate:
    def with_template(self, tokenizer: PreTrainedTokenizerBase, jinja: str | None) -> Any:
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = jinja
        return changed

    def test_same_as_apply_chat_template(self, bytes_bpe: PreTrainedTokenizerBase) -> None:
        messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
        encoded = encode_conversation(turns, bytes_bpe, "tokenizer")
        assert encoded.input_ids == bytes_bpe.apply_chat_template(messages, return_dict=False)
        prompt = bytes_bpe.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        assert encode_prompt(turns[:1], bytes_bpe, "tokenizer") == prompt

    def test_newline_after_the_end_token_is_not_learned(self, bytes_bpe: PreTrainedTokenizerBase) -> None:
        encoded = encode_conversation(TURNS, bytes_bpe, "tokenizer")
        assert encoded.labels[-1] == IGNORE_INDEX
        assert encoded.labels[-2] == bytes_bpe.eos_token_id

    def test_template_that_strips(self, llama: PreTrainedTokenizerBase) -> None:
        """As Llama 2's own: answers are stripped and set between spaces, with BOS before each question."""
        tokenizer = self.with_template(
            llama,
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
            "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        )
        turns = [*TURNS[:3], {"from": "gpt", "value": " Yes. \n"}]
        encoded = encode_conversation(turns, tokenizer, "tokenizer")
        assert encoded.input_ids.count(tokenizer.bos_token_id) == 2  # the template's own two, none added
        assert tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX]) == "A cat. </s> Yes. </s>"

    def test_template_that_thinks_first(self, bytes_bpe: PreTrainedTokenizerBase) -> None:
        """As Qwen 3's: an empty thought before the last answer is part of what the model has to say."""
        tokenizer = self.with_template(
            bytes_bpe,
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
            "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n</think>\n' }}{% endif %}"
            "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        )
        encoded = encode_conversation(TURNS, tokenizer, "tokenizer")
        said = tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])
        assert said == "A cat.<|im_end|><think>\n</think>\nYes.<|im_end|>"

    @pytest.mark.parametrize(
        ("jinja", "message"),
        [
            (None, "needs a tokenizer that has a chat template"),
            ("{{ raise_exception('no images please') }}", "refuses these turns: no images please"),
            ("{% for m in messages %}", "refuses these turns"),
            ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "ends an answer without a special token"),
            (
                "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}",
                "drops or repeats '<image>'",
            ),
            (
                "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else 'x' }}<|im_end|>{% endfor %}",
                "changes the answer's text",
            ),
            (
                "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
                "differently once the answer follows",
            ),
            (
                "{% for m in messages %}{{ m['content'] }} over <|im_end|>{% endfor %}",
                "puts ' over ' between an answer and its end token",
            ),
        ],
    )
    def test_unusable(self, jinja: str | None, message: str, bytes_bpe: PreTrainedTokenizerBase) -> None:
        with pytest.raises(UserError, match=f"^rec.*{message}.*use a named template"):
            encode_conversation(TURNS, self.with_template(bytes_bpe, jinja), "tokenizer", record="rec")
