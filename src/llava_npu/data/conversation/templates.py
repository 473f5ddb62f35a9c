"""Conversation templates: the markup around the turns, and which of it is trained on.

A template is data. Rendering one gives text segments, each marked as supervised or not; `labels.py` tokenizes them. The
texts are those of LLaVA's *training* code (github.com/haotian-liu/LLaVA, llava/conversation.py and train.py): its
serving code uses another system prompt for v1 ("curious human"), here training and inference always share one.

`tokenizer` stands for the language model's own chat template (see `chat_template.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from llava_npu.data.conversation.chat_template import render_chat_template, takes_parts
from llava_npu.data.conversation.special_tokens import begins_with_bos
from llava_npu.data.conversation.turns import IMAGE_MARK, Segment, Turn
from llava_npu.data.tools.defects import RecordError
from llava_npu.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stand-ins inside template data; the turn's text and the tokenizer's own special tokens replace them.
VALUE, BOS, EOS = "{value}", "{bos}", "{eos}"


@dataclass(frozen=True)
class Template:
    """How turns become text.

    Args:
        name: as written in configs.
        opening: the text before the first turn.
        system: the system prompt in `opening`; "" if the template has none.
        system_turn: of a template that has none, the text around one that is given; "" if it takes none.
        separator: the text between one answer and the next question.
        human: segments of a question; the one whose text is `VALUE` becomes the question.
        header: segments between a question and its answer; a prompt ends with them.
        answer: segments of an answer and its end mark.
        closing: segments after the last turn.
        empty_answer: what an answer "" is. 'error': refused. 'keep': rendered as any other, its end mark still teaches
            something. 'open': allowed as the only answer, the turn stays open after the header and the header's last
            character is trained (what LLaVA's mpt code does).
        keeps_opening_answer: an answer before the first question is rendered like any other instead of dropped.
        markup: strings that must not occur in the turns, besides the tokenizer's special tokens.
        reads_special_tokens: which special tokens written out in a turn are read as those tokens, as LLaVA's code reads
            them: 'all' ("</s>" too) only where the template gives them no meaning of their own; 'begin': the
            begin-of-sequence token ("<s>"); others are refused.
        captions: the template pairs image and caption: exactly one question, whose words are dropped, and one answer.
        writes_bos: the rendered text holds the begin-of-sequence token itself.
    """

    name: str
    opening: str = ""
    system: str = ""
    system_turn: str = ""
    separator: str = ""
    human: tuple[Segment, ...] = ()
    header: tuple[Segment, ...] = ()
    answer: tuple[Segment, ...] = ()
    closing: tuple[Segment, ...] = ()
    empty_answer: Literal["error", "keep", "open"] = "error"
    keeps_opening_answer: bool = False
    markup: tuple[str, ...] = ()
    reads_special_tokens: Literal["none", "begin", "all"] = "none"
    captions: bool = False
    writes_bos: bool = False

    def with_system(self, system: str) -> Template:
        """The template with another system prompt than it was trained with.

        Raises:
            UserError: it has no place for one.
        """
        if self.system_turn and not self.system:
            return replace(self, system=system, opening=self.system_turn.replace(VALUE, system) + self.opening)
        if not self.system:
            raise UserError(f"template {self.name!r} has no system prompt, so none can be given; leave it out")
        return replace(self, system=system, opening=self.opening.replace(self.system, system))


def _masked(*texts: str) -> tuple[Segment, ...]:
    return tuple(Segment(text) for text in texts)


def _trained(*texts: str) -> tuple[Segment, ...]:
    return tuple(Segment(text, supervised=True) for text in texts)


_VICUNA_SYSTEM = (
    "A chat between a curious {person} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)

PLAIN = Template(
    "plain",
    human=_masked(VALUE),
    answer=_trained(VALUE, "\n"),
    empty_answer="keep",
    reads_special_tokens="all",
    captions=True,
)
V1 = Template(
    "v1",
    opening=_VICUNA_SYSTEM.format(person="user") + " ",
    system=_VICUNA_SYSTEM.format(person="user"),
    human=_masked("USER: ", VALUE, " "),
    header=_masked("ASSISTANT:"),
    answer=_trained(" ", VALUE, EOS),
    reads_special_tokens="begin",
)
LLAMA_2 = Template(
    "llama_2",
    opening=f"[INST] <<SYS>>\n{_LLAMA_2_SYSTEM}\n<</SYS>>\n\n",
    system=_LLAMA_2_SYSTEM,
    separator=f"{BOS}[INST] ",
    human=_masked(VALUE, " [/INST]"),
    answer=_trained(" ", VALUE, f" {EOS}"),
    reads_special_tokens="begin",
)
MISTRAL = Template(
    "mistral",
    opening="[INST] ",
    separator="[INST] ",
    human=_masked(VALUE, " [/INST]"),
    answer=_trained(" ", VALUE, f" {EOS}"),
    reads_special_tokens="begin",
)
CHATML = Template(
    "chatml",
    opening=f"<|im_start|>system\n{_MPT_SYSTEM}<|im_end|>",
    system=_MPT_SYSTEM,
    human=_masked("<|im_start|>user\n", VALUE, "<|im_end|>"),
    header=_masked("<|im_start|>assistant", "\n"),
    answer=_trained(VALUE, "<|im_end|>"),
    empty_answer="open",
    markup=("<|im_start|>", "<|im_end|>"),
)
CHATML_DIRECT = replace(CHATML.with_system("Answer the questions."), name="chatml_direct")
# The first LLaVA's format trains the separators too: the "###" that ends a turn is how its models stop.
V0 = Template(
    "v0",
    opening=_VICUNA_SYSTEM.format(person="human") + "\n\n",
    system=_VICUNA_SYSTEM.format(person="human"),
    human=(*_trained("###"), *_masked(" Human: ", VALUE, "\n")),
    header=_trained("### Assistant:"),
    answer=_trained(" ", VALUE, "\n"),
    closing=_trained("### "),
    empty_answer="keep",
    keeps_opening_answer=True,
    reads_special_tokens="all",
)
# From here on the formats of language models' own authors, for data and prompts in the form in which those were tuned.


def _role_turns(name: str, user: str, assistant: str, end: str, *, between: str = "\n", **more: Any) -> Template:
    """Turns that begin with a role's header and end with a token; only an answer and its end are trained."""
    return Template(
        name,
        separator=between,
        human=_masked(user, VALUE, end + between),
        header=_masked(assistant),
        answer=_trained(VALUE, end),
        closing=_masked(between) if between else (),
        **more,
    )


_CHATML_SYSTEM = f"<|im_start|>system\n{VALUE}<|im_end|>\n"
_CHATML_MARKUP = ("<|im_start|>", "<|im_end|>")


def _qwen(name: str, system: str) -> Template:
    return _role_turns(
        name,
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
        "<|im_end|>",
        opening=_CHATML_SYSTEM.replace(VALUE, system),
        system=system,
        markup=_CHATML_MARKUP,
    )


LLAMA_3 = _role_turns(  # 3.1 and later put dates in front, if the tokenizer's own template is used
    "llama_3",
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
    between="",
    system_turn=f"<|start_header_id|>system<|end_header_id|>\n\n{VALUE}<|eot_id|>",
    markup=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
QWEN_2 = _qwen("qwen_2", "You are a helpful assistant.")
QWEN_2_5 = _qwen("qwen_2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
# Qwen3 thinks unless an empty thought stands before its answer. Its own template writes one before the last answer
# only, so that a conversation would be trained on other texts than are prompted; here every answer has one, as in its
# prompts with `enable_thinking=False`.
QWEN_3 = _role_turns(
    "qwen_3",
    "<|im_start|>user\n",
    "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "<|im_end|>",
    system_turn=_CHATML_SYSTEM,
    markup=(*_CHATML_MARKUP, "<think>", "</think>"),
)
PHI_3 = _role_turns(
    "phi_3",
    "<|user|>\n",
    "<|assistant|>\n",
    "<|end|>",
    system_turn=f"<|system|>\n{VALUE}<|end|>\n",
    markup=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)
GEMMA = _role_turns(  # 1, 2 and 3
    "gemma_2",
    "<start_of_turn>user\n",
    "<start_of_turn>model\n",
    "<end_of_turn>",
    markup=("<start_of_turn>", "<end_of_turn>"),
)
TOKENIZER = Template("tokenizer", writes_bos=True)

TEMPLATES = {
    template.name: template
    for template in (
        *(PLAIN, V1, LLAMA_2, MISTRAL, CHATML, CHATML_DIRECT, V0),
        *(LLAMA_3, QWEN_2, QWEN_2_5, QWEN_3, PHI_3, GEMMA),
        TOKENIZER,
    )
}
ALIASES = {
    "v0_plain": "plain",
    "vicuna": "v1",
    "vicuna_v1": "v1",
    "llava_v1": "v1",
    "vicuna_v0": "v0",
    "llava_v0": "v0",
    "llama2": "llama_2",
    "llava_llama_2": "llama_2",
    "mistral_instruct": "mistral",
    "mpt": "chatml",
    "mistral_direct": "chatml_direct",
    "qwen_1_5": "qwen_2",
    "gemma": "gemma_2",
    "gemma_3": "gemma_2",
    "llama_3_1": "llama_3",
    "chat_template": "tokenizer",
}


# By the type of the language model; all others are asked as Vicuna is.
_FAMILIES = {"mistral": "mistral", "qwen2": "chatml", "qwen3": "chatml"}


def get_template(name: str) -> Template:
    """Looks a template up by its name or one of the names other projects give it.

    Raises:
        UserError: there is none of that name. LLaVA itself trains on with v1 instead.
    """
    template = TEMPLATES.get(ALIASES.get(name, name))
    if template is None:
        hint = nearest(name, [*TEMPLATES, *ALIASES])
        raise UserError(f"template {name!r} is unknown; the templates are {', '.join(TEMPLATES)}.{hint}")
    return template


def default_template(tokenizer: PreTrainedTokenizerBase, language_model: str) -> str:
    """The template of a model that names none: the tokenizer's own chat template, else its family's.

    A chat template that loses words or images, fails or does not end, is left aside with a remark.

    Args:
        language_model: transformers' `model_type` of the language model.
    """
    family = _FAMILIES.get(language_model, "v1")
    if not tokenizer.chat_template:
        return family
    try:
        usable = takes_parts(tokenizer) is not None
    except UserError:  # it does not end
        usable = False
    if not usable:
        print(
            f"remark: the tokenizer's chat template fails, does not end, or loses words or images; template {family!r} "
            "is used instead (--template gives another)",
            file=sys.stderr,
        )
    return "tokenizer" if usable else family


def render(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    prompt: bool = False,
    system: str | None = None,
) -> list[Segment]:
    """Renders checked, alternating turns that start with a human one.

    Args:
        name: the record, for messages.
        prompt: stop where the next answer starts; the turns then end with a human one. Otherwise a last human turn
            without an answer is rendered too, unsupervised, so that its images keep their place.
        system: in place of the template's own system prompt.

    Raises:
        UserError: the template cannot hold these turns.
    """
    if template is TOKENIZER:
        settled = [_settle_images(turn) for turn in turns]
        return render_chat_template(settled, tokenizer, name, prompt=prompt, system=system)
    if system is not None:
        template = template.with_system(system)
    if template.captions:
        turns = _caption_turns(turns, name, prompt=prompt)
    template = _bind(template, tokenizer, name)
    segments = [Segment(template.opening)]
    for i, turn in enumerate(turns):
        if turn.role == "human":
            text = turn.text if template.captions else _settle_images(turn).text
            if i:
                segments.append(Segment(template.separator))
            segments.extend(_fill(template.human, text))
        else:
            answer = _render_answer(template, turn.text, f"{name}: conversations[{i}]", is_only=len(turns) <= 2)
            segments.extend(answer if turn.supervised else [replace(part, supervised=False) for part in answer])
    segments.extend(template.header if prompt else template.closing)
    return segments


def is_empty(answer: str, template: Template) -> bool:
    """Whether an answer has nothing to learn. Blanks are one, which LLaVA trains on; chat templates strip them."""
    return not (answer.strip() if template is TOKENIZER else answer)


def _render_answer(template: Template, text: str, where: str, *, is_only: bool) -> list[Segment]:
    if is_empty(text, template) and template.empty_answer != "keep":
        if template.empty_answer == "error" or not is_only:
            raise RecordError(
                f"{where}.value: the answer is empty; write the answer or remove this round", "empty or unanswerable"
            )
        return [*template.header[:-1], replace(template.header[-1], supervised=True)]
    first, *rest = _fill(template.answer, text)
    return [*template.header, replace(first, starts_answer=True), *rest]


def _fill(parts: Sequence[Segment], text: str) -> list[Segment]:
    return [replace(part, text=text) if part.text == VALUE else part for part in parts]


def _settle_images(turn: Turn) -> Turn:
    """Where LLaVA puts the image of a question: one image comes first, on a line of its own.

    With several the author's order and places are kept ("Is <image> newer than <image>?"); LLaVA would collapse them
    into one (preprocess_multimodal).
    """
    if turn.role != "human" or turn.text.count(IMAGE_MARK) != 1:
        return turn
    words = turn.text.replace(IMAGE_MARK, "").strip()
    return replace(turn, text=f"{IMAGE_MARK}\n{words}".strip())


def _caption_turns(turns: Sequence[Turn], name: str, *, prompt: bool) -> tuple[Turn, ...]:
    """The question reduced to its images: a caption is learned from the image alone."""
    expected = ["human"] if prompt else ["human", "gpt"]
    if [turn.role for turn in turns] != expected:
        raise UserError(
            f"{name}: template 'plain' pairs images with one caption, but there are {len(turns)} turns; it needs "
            f"{' then '.join(expected)}: use a conversation template such as 'v1'"
        )
    marks = turns[0].text.count(IMAGE_MARK)
    if not marks:
        raise UserError(
            f"{name}: template 'plain' pairs images with captions, but conversations[0] has no '{IMAGE_MARK}'; add the "
            "image, or use a conversation template such as 'v1' for text"
        )
    return (Turn("human", IMAGE_MARK * marks), *turns[1:])


def _bind(template: Template, tokenizer: PreTrainedTokenizerBase, name: str) -> Template:
    """Puts the tokenizer's own end and begin tokens into the markup: for Llama and Vicuna `</s>` and `<s>`."""
    eos, bos = tokenizer.eos_token, tokenizer.bos_token if begins_with_bos(tokenizer) else ""
    if eos is None and any(EOS in part.text for part in template.answer):
        raise UserError(
            f"{name}: template {template.name!r} ends answers with the tokenizer's end-of-sequence token, and this "
            "tokenizer has none; set its eos_token, or use the template 'chatml'"
        )
    return replace(
        template,
        separator=template.separator.replace(BOS, bos),
        answer=tuple(replace(part, text=part.text.replace(EOS, eos or "")) for part in template.answer),
    )
