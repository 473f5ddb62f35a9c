"""Ids and labels against LLaVA's own code (haotian-liu/LLaVA c121f04, transformers 4.37.2), run once on these cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaTokenizer, PreTrainedTokenizerBase

from llava_npu.data.conversation.labels import IGNORE_INDEX, encode_conversation
from llava_npu.errors import UserError

CASES = json.loads((Path(__file__).parents[2] / "golden" / "labels.json").read_text())


def _title(case: dict[str, Any]) -> str:
    return f"{case['version']}-{case['case']}{'-legacy' if case['legacy'] else ''}"


def _same_vocabulary(case: dict[str, Any]) -> bool:
    """transformers 5 gives other ids for text after "<unk>" with legacy=True: no second space, as 4.37's had."""
    return not (case["legacy"] and case["case"] == "unk" and case["version"] != "plain")


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


LABELLED = [case for case in CASES if case["warning"] is None and _same_vocabulary(case)]
DROPPED = [case for case in CASES if case["warning"] is not None and _same_vocabulary(case)]


def test_golden_file_is_whole() -> None:
    assert (len(CASES), len(LABELLED), len(DROPPED)) == (90, 57, 28)


@pytest.mark.parametrize("case", LABELLED, ids=_title)
def test_equals_the_original(
    case: dict[str, Any], llama: PreTrainedTokenizerBase, llama_legacy: PreTrainedTokenizerBase
) -> None:
    tokenizer = llama_legacy if case["legacy"] else llama
    encoded = encode_conversation(case["conversations"], tokenizer, template=case["version"])
    assert encoded.input_ids == case["ids"]
    assert encoded.labels == case["labels"]


@pytest.mark.parametrize("case", DROPPED, ids=_title)
def test_learns_from_what_the_original_drops(
    case: dict[str, Any], llama: PreTrainedTokenizerBase, llama_legacy: PreTrainedTokenizerBase
) -> None:
    """The same ids, with labels; an empty answer is an error that names the record."""
    tokenizer = llama_legacy if case["legacy"] else llama
    if case["case"] == "empty_answer":
        with pytest.raises(UserError, match=r"train.json:record 3.*conversations\[1\].*empty"):
            encode_conversation(case["conversations"], tokenizer, case["version"], record="train.json:record 3")
        return
    encoded = encode_conversation(case["conversations"], tokenizer, template=case["version"])
    assert encoded.input_ids == case["ids"]
    supervised = [label for label in encoded.labels if label != IGNORE_INDEX]
    decoded = tokenizer.decode(supervised)
    for turn in case["conversations"]:
        if turn["from"] == "gpt":
            assert turn["value"].strip() in decoded
        else:
            assert turn["value"].replace("<image>\n", "") not in decoded.replace(" ", "  ")


# Further cases run through the same code: number of ids, the last ids, and of these the supervised.
FURTHER = [
    ("mistral", [human("<image>\na <s> b"), gpt("<s> c")], 21, [25580, 29962, 29871, 1, 274, 29871, 2], 5),
    ("v1", [human("<image>\na <s> b"), gpt("<s> c")], 51, [13566, 29901, 29871, 1, 274, 2], 4),
    ("llama_2", [human("<image>\na <s> b"), gpt("<s> c")], 68, [25580, 29962, 29871, 1, 274, 29871, 2], 5),
    ("mistral", [human("<image>\nq"), gpt(" \n")], 17, [25580, 29962, 259, 13, 29871, 2], 4),
    ("v1", [human("<image>\nq"), gpt(" \n")], 47, [13566, 29901, 259, 13, 2], 3),
    ("v1", [human("<image>"), gpt("A cat.")], 45, [-200, 259, 22933, 9047, 13566, 29901, 319, 6635, 29889, 2], 4),
    ("mistral", [human("<image>"), gpt("A cat.")], 16, [29961, 29914, 25580, 29962, 319, 6635, 29889, 29871, 2], 5),
    ("plain", [human("<image>"), gpt(" a cat")], 6, [1, -200, 259, 29874, 6635, 13], 4),
    ("plain", [human("<image>"), gpt("▁a")], 5, [1, -200, 259, 29874, 13], 3),
]  # fmt: skip


@pytest.mark.parametrize(("template", "conversations", "length", "last", "supervised"), FURTHER)
def test_what_the_original_reads_as_it_is(
    template: str,
    conversations: list[dict[str, str]],
    length: int,
    last: list[int],
    supervised: int,
    llama: PreTrainedTokenizerBase,
) -> None:
    """`<s>` is a token, blanks are an answer, and behind an image is a space token, even before a space."""
    encoded = encode_conversation(conversations, llama, template)
    assert len(encoded.input_ids) == length
    assert encoded.input_ids[-len(last) :] == last
    assert encoded.labels == [IGNORE_INDEX] * (length - supervised) + last[-supervised:]


def test_v0_trains_an_answer_before_the_first_question(llama: PreTrainedTokenizerBase) -> None:
    encoded = encode_conversation([gpt("Hi"), human("<image>\nq"), gpt("a")], llama, "v0")
    assert len(encoded.input_ids) == 60
    first = [2277, 29937, 4007, 22137, 29901, 6324, 13, 2277, 29937]  # "### Assistant: Hi\n###"
    second = [2277, 29937, 4007, 22137, 29901, 263, 13, 2277, 29937, 29871]
    assert [label for label in encoded.labels if label != IGNORE_INDEX] == first + second


@pytest.mark.slow
def test_bos_is_the_same_whether_stated_or_left_to_the_default(llama_folder: Any, llama: Any) -> None:
    """transformers 5 leaves `<s>` out when it builds a Llama tokenizer from a bare tokenizer.model."""
    conversations = CASES[0]["conversations"]
    stated = LlamaTokenizer.from_pretrained(llama_folder, legacy=False, add_bos_token=True)
    without = LlamaTokenizer.from_pretrained(llama_folder, legacy=False, add_bos_token=False)
    ids = encode_conversation(conversations, llama).input_ids
    assert encode_conversation(conversations, stated).input_ids == ids
    assert encode_conversation(conversations, without).input_ids == ids[1:]
