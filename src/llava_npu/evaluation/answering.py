"""How a model answers questions: by writing, or by finding one option likelier than the others.

`GenerateText` is what published scores use: greedy generation, one beam, the whole prompt with options and
instruction.

`ChooseLikeliest` asks for no obedience to "answer with the letter", which small or barely tuned models lack. It
scores each option as the assistant's answer and takes the likeliest, by the mean log-probability of its tokens, so that
long options are not at a disadvantage. It has two forms (Robinson et al. 2023,
arXiv:2210.12353, compare them):
    "text"    the options' texts, end token included, under the question alone. The options are not shown, so their
              order cannot matter: circular and vanilla accuracy agree, up to ties.
    "letter"  the letters alone, under the whole prompt.
Its answer is the letter, which every extraction rule reads alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from llava_npu.data.conversation.labels import encode_conversation
from llava_npu.data.conversation.turns import IMAGE_MARK
from llava_npu.errors import UserError, nearest
from llava_npu.evaluation.fingerprints import fingerprint_model, fingerprint_processor
from llava_npu.evaluation.questions import Answer, Question
from llava_npu.inference.engine import InferenceEngine, longest, offline_engine
from llava_npu.inference.features import FeatureCache, ImageFeatures, image_inputs
from llava_npu.inference.likelihood import AnsweredPrompt, answer_log_probabilities
from llava_npu.inference.prompts import place_images
from llava_npu.inference.request import Prompt, Request, Sampling
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.processing import LlavaNpuProcessor

ANSWER_MODES = ("generate", "likelihood", "likelihood-letter")

Settings = dict[str, str | int | float | bool | None]
Features = dict[str, ImageFeatures]  # by image key


class Method(Protocol):
    """A way of answering questions whose images are all readable."""

    @property
    def settings(self) -> Settings: ...

    def scored(self, question: Question) -> list[list[dict[str, str]]]:
        """The conversations, each with an answer, that the model reads to answer a question."""
        ...

    def answer(self, engine: InferenceEngine, questions: Sequence[Question], features: Features) -> list[Answer]: ...


class ModelAnswerer:
    """A model that answers by one method. Each image's features are computed once for all its questions."""

    def __init__(self, loaded: LoadedModel, method: Method, device: str = "", features: FeatureCache | None = None):
        """
        Args:
            loaded: the model, as `llava_npu.load` returns it: in eval mode, on its device.
            method: `GenerateText` or `ChooseLikeliest`.
            device: its product name, for the record.
            features: shared by several answerers whose tower and preprocessing are the same.
        """
        self._loaded = loaded
        self._method = method
        self._engine: InferenceEngine | None = None
        self._features = features or FeatureCache(loaded)
        self.device = device or str(loaded.model.device)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_model(self._loaded.model)

    @cached_property
    def settings(self) -> Settings:
        return {
            **self._method.settings,
            "template": self._loaded.processor.template,
            "processor": fingerprint_processor(self._loaded.processor),
            "dtype": str(self._loaded.model.dtype).removeprefix("torch."),
        }

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer for each question; one with an unreadable image, too long a prompt or text that cannot be
        asked gets an error instead.

        Raises:
            UserError: the batch does not fit the device's memory.
        """
        try:
            return self._answer(questions)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            raise UserError(
                f"a batch of {len(questions)} questions does not fit the memory of {self.device}: "
                f"{str(error).splitlines()[0]} Give a smaller --batch-size; what was answered is kept."
            ) from error

    def _engine_for(self, max_batch: int) -> InferenceEngine:
        """Kept from batch to batch, with what it has computed."""
        if self._engine is None or self._engine.max_batch < max_batch:
            self._engine = offline_engine(self._loaded, max_batch, self._features)
        return self._engine

    def _answer(self, questions: Sequence[Question]) -> list[Answer]:
        features, unreadable = self._features.load([image for question in questions for image in question.images])
        errors: dict[str, str] = {}
        for question in questions:
            missing = [unreadable[image.key] for image in question.images if image.key in unreadable]
            scored = self._method.scored(question)
            error = missing[0] if missing else _defect(self._loaded, question, scored, features)
            if error:
                errors[question.id] = error
        readable = [question for question in questions if question.id not in errors]
        found = self._method.answer(self._engine_for(len(readable)), readable, features) if readable else []
        answers = {question.id: answer for question, answer in zip(readable, found, strict=True)}
        answers |= {
            question.id: Answer(_full_prompt(question), "", error=errors[question.id])
            for question in questions
            if question.id in errors
        }
        return [answers[question.id] for question in questions]


@dataclass(frozen=True)
class GenerateText:
    """Greedy generation; what prompts begin with alike is computed once.

    Attributes:
        max_new_tokens: maximum length of an answer.
    """

    max_new_tokens: int

    @property
    def settings(self) -> Settings:
        return {"answer": "generate", "max_new_tokens": self.max_new_tokens}

    def scored(self, question: Question) -> list[list[dict[str, str]]]:
        return []

    def answer(self, engine: InferenceEngine, questions: Sequence[Question], features: Features) -> list[Answer]:
        """Generates an answer to each question."""
        texts = [_full_prompt(question) for question in questions]
        requests = []
        for prompt in _encode_prompts(engine.loaded.processor, texts, questions, features):
            room = engine.max_length - len(prompt.input_ids)
            requests.append(Request(prompt, Sampling(min(self.max_new_tokens, room))))
        return [Answer(text, answer) for text, answer in zip(texts, engine.run(requests), strict=True)]


@dataclass(frozen=True)
class ChooseLikeliest:
    """The option that is likeliest as the assistant's answer, all options of a batch in one forward.

    Attributes:
        form: of the candidates, "text" or "letter"; see the module's description.
    """

    form: str

    @property
    def settings(self) -> Settings:
        return {"answer": "likelihood", "candidates": self.form, "end_token": self.form == "text"}

    def scored(self, question: Question) -> list[list[dict[str, str]]]:
        prompt, candidates = _CANDIDATES[self.form](question)
        return [_turns(prompt, candidate) for candidate in candidates.values()]

    def answer(self, engine: InferenceEngine, questions: Sequence[Question], features: Features) -> list[Answer]:
        """Scores the options of each question."""
        forms = [_CANDIDATES[self.form](question) for question in questions]
        # Rotations of a question ask for the same texts under the same prompt and image: each is scored once.
        items: dict[_Asked, AnsweredPrompt] = {}
        for question, (prompt, candidates) in zip(questions, forms, strict=True):
            for letter, candidate in candidates.items():
                name = f"question {question.id}, option {letter}"
                item = AnsweredPrompt(_turns(prompt, candidate), question.images, name)
                items.setdefault(_asked(question, prompt, candidate), item)
        ends = self.form == "text"  # behind a letter the end says nothing
        found = answer_log_probabilities(engine, list(items.values()), features, ends=ends)
        means = {asked: score.mean for asked, score in zip(items, found, strict=True)}
        answers = []
        for question, (prompt, candidates) in zip(questions, forms, strict=True):
            scores = {letter: means[_asked(question, prompt, candidate)] for letter, candidate in candidates.items()}
            answers.append(Answer(prompt, max(scores, key=scores.__getitem__), scores=scores))
        return answers


_Asked = tuple[tuple[str, ...], str, str]  # image keys, prompt, candidate answer


def _asked(question: Question, prompt: str, candidate: str) -> _Asked:
    return tuple(image.key for image in question.images), prompt, candidate


def build_answerer(
    mode: str,
    loaded: LoadedModel,
    *,
    max_new_tokens: int,
    device: str = "",
    features: FeatureCache | None = None,
) -> ModelAnswerer:
    """A model that answers by the method of that name, one of `ANSWER_MODES`; the rest as `ModelAnswerer` takes it."""
    methods: dict[str, Method] = {
        "generate": GenerateText(max_new_tokens),
        "likelihood": ChooseLikeliest("text"),
        "likelihood-letter": ChooseLikeliest("letter"),
    }
    if mode not in methods:
        raise UserError(f"answer: {mode!r} is unknown.{nearest(mode, methods)} Known: {', '.join(methods)}.")
    return ModelAnswerer(loaded, methods[mode], device, features)


def no_options(question: Question) -> UserError:
    """The error for a question that offers nothing to choose from."""
    return UserError(f"question {question.id} has no options to choose from: it is to be answered with generate.")


# --- prompts ----------------------------------------------------------------------------------------------------------


def _full_prompt(question: Question) -> str:
    return _with_marks(question, question.prompt)


def _with_marks(question: Question, text: str) -> str:
    # The image comes first, on a line of its own, as in LLaVA's training data; without images there is none.
    return "\n".join([*[IMAGE_MARK] * len(question.images), text])


def _encode_prompts(
    processor: LlavaNpuProcessor, texts: Sequence[str], questions: Sequence[Question], features: Features
) -> list[Prompt]:
    # As `prepare_prompt`, but without pixels: the images' features are known.
    return [
        place_images(
            processor,
            processor.encode_prompt(_turns(text), [each.size for each in images], f"question {question.id}"),
            images,
        )
        for text, question in zip(texts, questions, strict=True)
        for images in [image_inputs(question.images, features)]
    ]


def _defect(
    loaded: LoadedModel, question: Question, scored: Sequence[list[dict[str, str]]], features: Features
) -> str | None:
    """What is wrong with a question that cannot be asked: too long a prompt, or text that spells special tokens."""
    processor, name = loaded.processor, f"question {question.id}"
    positions = longest(loaded.model)
    try:
        (prompt,) = _encode_prompts(processor, [_full_prompt(question)], [question], features)
        for conversation in scored:
            encode_conversation(conversation, processor.tokenizer, processor.template, record=name)
    except UserError as error:
        reason = str(error).removeprefix(f"{name}: ")
        return reason.replace("conversations[0].value", "its text").replace("conversations[1].value", "its text")
    if len(prompt.input_ids) < positions:
        return None
    return f"its prompt has {len(prompt.input_ids)} tokens, images included; the model has positions for {positions}"


def _turns(prompt: str, answer: str | None = None) -> list[dict[str, str]]:
    turns = [{"from": "human", "value": prompt}]
    return turns if answer is None else [*turns, {"from": "gpt", "value": answer}]


def _options(question: Question) -> dict[str, str]:
    if not question.options:
        raise no_options(question)
    return dict(question.options)


def _texts(question: Question) -> tuple[str, dict[str, str]]:
    return _with_marks(question, question.text), _options(question)


def _letters(question: Question) -> tuple[str, dict[str, str]]:
    return _full_prompt(question), {letter: letter for letter in _options(question)}


_CANDIDATES: dict[str, Callable[[Question], tuple[str, dict[str, str]]]] = {"text": _texts, "letter": _letters}
