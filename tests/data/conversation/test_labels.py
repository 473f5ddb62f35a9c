from __future__ import annotations

from itertools import groupby
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizer, PreTrainedTokenizerBase

from llava_npu.data.conversation.labels import (
    IGNORE_INDEX,
    IMAGE_PLACEHOLDER,
    EncodedConversation,
    encode_conversation,
    encode_prompt,
    expand_images,
)
from llava_npu.data.conversation.turns import Turn
from llava_npu.errors import UserError

TEMPLATES = ("v1", "llama_2", "mistral", "chatml", "v0")
TOKENIZERS = ("llama", "llama_legacy", "bytes_bpe", "unigram")


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def supervised_texts(encoded: EncodedConversation, tokenizer: Any) -> list[str]:
    """The text of each supervised stretch, as what its tokens add to those before them."""
    texts: list[str] = []
    before: list[int] = []
    for is_supervised, group in groupby(
        zip(encoded.input_ids, encoded.labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX
    ):
        ids = [token for token, _ in group]
        if IMAGE_PLACEHOLDER in ids:
            last = len(ids) - 1 - ids[::-1].index(IMAGE_PLACEHOLDER)
            before, ids = [], ids[last + 1 :]
        if is_supervised:
            texts.append(tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :])
        before = before + ids
    return texts


class TestSupervisedText:
    """Exactly the answers and their end tokens."""

    @pytest.mark.parametrize(
        ("template", "form"),
        [("v1", " {}</s>"), ("llama_2", " {} </s>"), ("mistral", " {} </s>"), ("chatml", "{}<|im_end|>")],
    )
    @pytest.mark.parametrize(
        "answer",
        [
            "A cat.",
            "猫",
            "😀 yes",
            "\nA\n",
            "two  spaces   here",
            "  leading",
            "trailing  ",
            "it said USER: hi ASSISTANT: hello",
            "[INST] no [/INST] yes",
            "### Human: x",
            "{eos} and {value}",
            "a <unk> b",
        ],
    )
    def test_llama(self, template: str, form: str, answer: str, llama: PreTrainedTokenizerBase) -> None:
        encoded = encode_conversation([human("<image>\nq ASSISTANT: ?"), gpt(answer)], llama, template)
        assert supervised_texts(encoded, llama) == [form.replace("{}", answer)]

    def test_multi_turn(self, llama: PreTrainedTokenizerBase) -> None:
        turns = [human("<image>\na"), gpt("one"), human("b"), gpt("two"), human("c"), gpt("three")]
        assert supervised_texts(encode_conversation(turns, llama), llama) == [" one</s>", " two</s>", " three</s>"]

    @pytest.mark.parametrize("template", ["chatml", "tokenizer"])
    def test_byte_level_bpe(self, template: str, bytes_bpe: PreTrainedTokenizerBase) -> None:
        turns = [human("<image>\nWhat?"), gpt("\n\nA cat."), human("And?"), gpt("  猫 😀")]
        encoded = encode_conversation(turns, bytes_bpe, template)
        assert supervised_texts(encoded, bytes_bpe) == ["\n\nA cat.<|im_end|>", "  猫 😀<|im_end|>"]

    def test_template_ends_with_the_tokenizers_own_end_token(self, bytes_bpe: PreTrainedTokenizerBase) -> None:
        encoded = encode_conversation([human("q"), gpt("a")], bytes_bpe, "v1")
        assert supervised_texts(encoded, bytes_bpe) == [" a<|im_end|>"]
        assert encoded.labels[-1] == bytes_bpe.eos_token_id

    def test_plain_learns_the_caption_alone(self, llama: PreTrainedTokenizerBase) -> None:
        encoded = encode_conversation([human("Describe.\n<image>"), gpt("a red bus")], llama, "plain")
        assert encoded.input_ids[:2] == [1, IMAGE_PLACEHOLDER]
        assert encoded.labels[:2] == [IGNORE_INDEX] * 2
        assert llama.decode(encoded.labels[2:]) == "a red bus\n"

    def test_v0_also_trains_its_separators(self, llama: PreTrainedTokenizerBase) -> None:
        encoded = encode_conversation([human("q"), gpt("a"), human("r")], llama, "v0")
        assert supervised_texts(encoded, llama) == ["###", "### Assistant: a\n###", "### "]


class TestImages:
    def test_one_image_comes_first_wherever_it_stood(self, llama: PreTrainedTokenizerBase) -> None:
        first = encode_conversation([human("<image>\nfoo  bar"), gpt("a")], llama)
        assert encode_conversation([human("foo <image> bar"), gpt("a")], llama) == first

    def test_an_image_alone_is_a_question(self, llama: PreTrainedTokenizerBase) -> None:
        assert encode_conversation([human("<image>"), gpt("a")], llama).input_ids.count(IMAGE_PLACEHOLDER) == 1

    def test_several_images_keep_their_places(self, llama: PreTrainedTokenizerBase) -> None:
        """The original makes them one, and gives the second image to another sample."""
        encoded = encode_conversation(
            [human("Is <image> newer than <image>?"), gpt("No."), human("And <image>?"), gpt("Yes.")], llama
        )
        positions = [i for i, token in enumerate(encoded.input_ids) if token == IMAGE_PLACEHOLDER]
        assert len(positions) == 3
        assert llama.decode(encoded.input_ids[positions[0] + 1 : positions[1]]) == " newer than "
        assert supervised_texts(encoded, llama) == [" No.</s>", " Yes.</s>"]

    def test_plain_keeps_all_images(self, llama: PreTrainedTokenizerBase) -> None:
        encoded = encode_conversation([human("<image> and <image>"), gpt("a")], llama, "plain")
        assert encoded.input_ids[:3] == [1, IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER]

    def test_image_in_an_answer(self, llama: PreTrainedTokenizerBase) -> None:
        with pytest.raises(UserError, match=r"here: conversations\[1\].value: an answer contains '<image>'"):
            encode_conversation([human("q"), gpt("look: <image>")], llama, record="here")


class TestBadConversations:
    @pytest.mark.parametrize("template", ["v1", "llama_2", "mistral", "tokenizer"])
    def test_empty_answer(self, template: str, bytes_bpe: PreTrainedTokenizerBase) -> None:
        with pytest.raises(UserError, match=r"r 7: conversations\[1\].value: the answer is empty"):
            encode_conversation([human("q"), gpt("")], bytes_bpe, template, record="r 7")

    def test_empty_answer_in_a_longer_chatml_conversation(self, bytes_bpe: PreTrainedTokenizerBase) -> None:
        with pytest.raises(UserError, match=r"conversations\[1\].value: the answer is empty"):
            encode_conversation([human("q"), gpt(""), human("q"), gpt("a")], bytes_bpe, "chatml")

    @pytest.mark.parametrize("where", [0, 1])
    @pytest.mark.parametrize("template", ["v1", "llama_2", "mistral", "chatml"])
    def test_special_token_spelled_out(self, template: str, where: int, llama: PreTrainedTokenizerBase) -> None:
        """Read as text by the author, as the end of the answer by the tokenizer."""
        turns = [human("q"), gpt("a")]
        turns[where]["value"] = "use </s> in HTML"
        with pytest.raises(UserError, match=rf"rec: conversations\[{where}\].value contains '</s>'"):
            encode_conversation(turns, llama, template, record="rec")

    def test_markup_that_is_no_special_token(self, llama: PreTrainedTokenizerBase) -> None:
        with pytest.raises(UserError, match=r"contains '<\|im_end\|>'"):
            encode_conversation([human("q"), gpt("a<|im_end|>")], llama, "chatml")

    @pytest.mark.parametrize("template", ["plain", "v0"])
    def test_special_token_where_the_original_reads_it(self, template: str, llama: PreTrainedTokenizerBase) -> None:
        encoded = encode_conversation([human("<image>"), gpt("a </s> b")], llama, template)
        assert llama.eos_token_id in encoded.labels

    @pytest.mark.parametrize("template", TEMPLATES)
    def test_trailing_question_keeps_its_image(self, template: str, llama: PreTrainedTokenizerBase) -> None:
        turns = [human("<image>\nq"), gpt("a"), human("<image>\nbye")]
        encoded = encode_conversation(turns, llama, template)
        assert encoded.input_ids.count(IMAGE_PLACEHOLDER) == 2
        assert "bye" not in "".join(supervised_texts(encoded, llama))

    def test_leading_answer_is_dropped(self, llama: PreTrainedTokenizerBase) -> None:
        with_greeting = encode_conversation([gpt("Hi!"), human("q"), gpt("a")], llama)
        assert with_greeting == encode_conversation([human("q"), gpt("a")], llama)

    @pytest.mark.parametrize(
        ("turns", "message"),
        [
            ([], "'conversations' is empty"),
            ("text", "not a list"),
            ([human("a"), human("b")], r"conversations\[1\].from is 'human', as in the turn before"),
            ([{"from": "humna", "value": "a"}], "'humna'.*Did you mean 'human'"),
            ([{"from": "system", "value": "a"}], r"conversations\[0\].from is 'system'"),
            ([{"from": ["human"], "value": "a"}], r"conversations\[0\].from is \['human'\]"),
            ([{"value": "a"}], "has no 'from'"),
            ([{"from": "human"}], "has no 'value'"),
            ([{"from": "human", "value": 3}], r"value is 3 \(int\)"),
            (["hello"], r"conversations\[0\] is 'hello'"),
            ([human("  ")], "human turn is empty"),
            ([human("q")], "nothing to learn"),
            ([gpt("a")], "no human turn"),
            ([human("\ud83d"), gpt("a")], "lone surrogate"),
        ],
    )
    def test_malformed(self, turns: Any, message: str, llama: PreTrainedTokenizerBase) -> None:
        with pytest.raises(UserError, match=f"^d.json:record 2.*{message}"):
            encode_conversation(turns, llama, record="d.json:record 2")

    def test_tokenizer_without_a_vocabulary(self) -> None:
        """What transformers 5 makes of `LlamaTokenizer(vocab_file=…)`, silently."""
        with pytest.raises(UserError, match="here: this tokenizer, of 3 tokens, has none for its answers"):
            encode_conversation([human("q"), gpt("a")], LlamaTokenizer(legacy=False), "chatml", record="here")

    def test_unknown_template(self, llama: PreTrainedTokenizerBase) -> None:
        with pytest.raises(
            UserError, match=r"'vicuna_v2' is unknown; the templates are plain, v1.*Did you mean 'vicuna_v"
        ):
            encode_conversation([human("q"), gpt("a")], llama, "vicuna_v2")

    @pytest.mark.parametrize(
        "turns", [[human("q"), gpt("a")], [human("<image>"), gpt("a"), human("<image>"), gpt("b")]]
    )
    def test_plain_is_for_captions(self, turns: Any, llama: PreTrainedTokenizerBase) -> None:
        with pytest.raises(UserError, match="template 'plain' pairs images with"):
            encode_conversation(turns, llama, "plain")

    def test_prompt_that_ends_with_an_answer(self, llama: PreTrainedTokenizerBase) -> None:
        with pytest.raises(UserError, match="a prompt ends with a human turn"):
            encode_prompt([human("q"), gpt("a")], llama)


class TestLength:
    def test_cut_text(self, llama: PreTrainedTokenizerBase) -> None:
        turns = [human("q"), gpt("a " * 50)]
        whole = encode_conversation(turns, llama)
        cut = encode_conversation(turns, llama, max_length=60)
        assert cut.input_ids == whole.input_ids[:60]
        assert cut.labels == whole.labels[:60]

    def test_cut_without_an_answer_left(self, llama: PreTrainedTokenizerBase) -> None:
        with pytest.raises(UserError, match=r"rec: \d+ tokens, and the first 20 \(max_length\) hold no word"):
            encode_conversation([human("word " * 50), gpt("a")], llama, max_length=20, record="rec")

    def test_expand(self) -> None:
        encoded = EncodedConversation([1, -200, 5, -200, 6], [-100, -100, 5, -100, 6])
        expanded = expand_images(encoded, [2, 3], image_token_id=9)
        assert expanded.input_ids == [1, 9, 9, 5, 9, 9, 9, 6]
        assert expanded.labels == [-100, -100, -100, 5, -100, -100, -100, 6]
        assert expanded.num_images == 2

    @pytest.mark.parametrize(("limit", "length", "num_images"), [(8, 8, 2), (7, 7, 2), (6, 4, 1), (5, 4, 1), (4, 4, 1)])
    def test_an_image_is_never_cut_in_half(self, limit: int, length: int, num_images: int) -> None:
        encoded = EncodedConversation([1, -200, 5, -200, 6], [-100, -100, 5, -100, 6])
        expanded = expand_images(encoded, [2, 3], 9, limit)
        assert (len(expanded.input_ids), len(expanded.labels)) == (length, length)
        assert expanded.num_images == num_images
        assert expanded.input_ids.count(9) == [0, 2, 5][num_images]

    @pytest.mark.parametrize("limit", [0, 1, 2, 3])
    def test_nothing_supervised_left(self, limit: int) -> None:
        encoded = EncodedConversation([1, -200, 5], [-100, -100, 5])
        with pytest.raises(UserError, match=f"rec: 4 tokens, and the first {limit} "):
            expand_images(encoded, [2], 9, limit, record="rec")

    @pytest.mark.parametrize("tokens", [[], [2, 2]])
    def test_image_count(self, tokens: list[int]) -> None:
        with pytest.raises(UserError, match=f"1 '<image>' in the text but {len(tokens)} image"):
            expand_images(EncodedConversation([-200, 5], [-100, 5]), tokens, 9)


# No markup of any tokenizer or template, and no "▁", which Llama's vocabulary cannot tell from a space.
_words = st.text(
    st.one_of(
        st.sampled_from(" \n\tabA.:#1[/猫😀é"), st.characters(exclude_categories=["Cs"], exclude_characters="▁<")
    ),
    max_size=12,
)
_answers = _words.map(lambda text: f"{text}x")
_questions = st.tuples(st.integers(0, 2), _words).map(lambda pair: "<image> " * pair[0] + f"q{pair[1]}")


PAIRS = [*((template, name) for template in TEMPLATES for name in TOKENIZERS), ("tokenizer", "bytes_bpe")]


class TestProperties:
    @pytest.mark.parametrize(("template", "name"), PAIRS)
    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(rounds=st.lists(st.tuples(_questions, _answers), min_size=1, max_size=3))
    def test_prompts_are_prefixes_and_labels_are_ids(
        self, template: str, name: str, rounds: list[tuple[str, str]], request: pytest.FixtureRequest
    ) -> None:
        tokenizer = request.getfixturevalue(name)
        turns = [turn for question, answer in rounds for turn in (human(question), gpt(answer))]
        encoded = encode_conversation(turns, tokenizer, template)
        assert all(
            label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True)
        )
        assert encoded.input_ids.count(IMAGE_PLACEHOLDER) == sum(question.count("<image>") for question, _ in rounds)
        for i in range(1, len(turns), 2):
            prompt = encode_prompt(turns[:i], tokenizer, template)
            assert encoded.input_ids[: len(prompt)] == prompt
            assert encoded.labels[len(prompt)] == encoded.input_ids[len(prompt)]  # the answer's first token

    @pytest.mark.parametrize("name", ["llama", "bytes_bpe"])
    @pytest.mark.parametrize(
        ("template", "before", "after"), [("v1", " ", ""), ("mistral", " ", " "), ("chatml", "", None)]
    )
    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(rounds=st.lists(st.tuples(_questions, _answers), min_size=1, max_size=3))
    def test_supervised_text_is_the_answers(
        self, template: str, before: str, after: str | None, rounds: Any, name: str, request: pytest.FixtureRequest
    ) -> None:
        tokenizer = request.getfixturevalue(name)
        turns = [turn for question, answer in rounds for turn in (human(question), gpt(answer))]
        encoded = encode_conversation(turns, tokenizer, template)
        end = "<|im_end|>" if after is None else after + tokenizer.eos_token
        texts = supervised_texts(encoded, tokenizer)
        expected = [f"{before}{answer}{end}" for _, answer in rounds]
        if (name, template) == ("llama", "chatml"):  # "><" is one token of Llama's, half of it the answer's end mark
            texts = [text.removesuffix("<") for text in texts]
        assert texts == expected

    @settings(max_examples=50)
    @given(
        parts=st.lists(st.one_of(st.integers(1, 5), st.booleans()), min_size=1, max_size=12),
        limit=st.integers(0, 30),
    )
    def test_expansion(self, parts: list[int | bool], limit: int) -> None:
        """A bool is a token, supervised or not; a number is an image of so many tokens."""
        ids = [7 if isinstance(part, bool) else IMAGE_PLACEHOLDER for part in parts]
        labels = [7 if part is True else IGNORE_INDEX for part in parts]
        widths = [part for part in parts if not isinstance(part, bool)]
        try:
            expanded = expand_images(EncodedConversation(ids, labels), widths, 9, limit)
        except UserError:
            whole = [token for part in parts for token in ([part] if isinstance(part, bool) else ["image"] * part)]
            assert True not in whole[:limit]
            return
        assert len(expanded.input_ids) == len(expanded.labels) <= limit
        assert expanded.input_ids.count(9) == sum(widths[: expanded.num_images])
        assert 7 in expanded.labels


class TestTokenizersWithoutOffsets:
    """A tokenizer in Python knows no character offsets: the edges of the supervised text stand in for them."""

    turns: ClassVar = [human("<image>\nWhat is it?"), gpt("A cat."), human("Sure?"), gpt("Yes.")]

    @pytest.mark.parametrize("template", ["v1", "chatml"])
    def test_same_as_with_offsets(self, template: str, bytes_bpe: PreTrainedTokenizerBase) -> None:
        slow: Any = _WithoutOffsets(bytes_bpe)
        assert encode_conversation(self.turns, slow, template) == encode_conversation(self.turns, bytes_bpe, template)

    def test_token_across_an_edge_is_cut(self, bytes_bpe: PreTrainedTokenizerBase) -> None:
        """ "\n\n" ends v0's system prompt; before "###" it is two tokens, alone one."""
        slow: Any = _WithoutOffsets(bytes_bpe)
        encoded = encode_conversation(self.turns, slow, "v0")
        expected = ["###", "### Assistant: A cat.\n###", "### Assistant: Yes.\n### "]
        assert supervised_texts(encoded, bytes_bpe) == expected


class _WithoutOffsets:
    is_fast = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str, return_offsets_mapping: bool = False, **options: Any) -> Any:
        assert not return_offsets_mapping
        return self.inner(text, **options)


def test_turns_may_be_objects(llama: PreTrainedTokenizerBase) -> None:
    turns = (Turn("human", "q"), Turn("gpt", "a"))
    assert encode_conversation(turns, llama) == encode_conversation([human("q"), gpt("a")], llama)
