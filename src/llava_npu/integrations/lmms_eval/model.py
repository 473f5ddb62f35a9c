"""Our models as lmms-eval asks them: its requests become questions, and are answered as `llava-npu eval` answers.

Images come first in a prompt, as in LLaVA's training data, wherever a task has them; its own marks for them are
dropped. Decoding is greedy: where a task asks for sampling or beams, that is said once and not done.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image
from tqdm import tqdm

from llava_npu import devices
from llava_npu.data.conversation.turns import IMAGE_MARK
from llava_npu.data.image_sources import LoadedImage
from llava_npu.errors import UserError
from llava_npu.evaluation.answering import GenerateText, ModelAnswerer
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.run import order_questions
from llava_npu.inference.engine import offline_engine
from llava_npu.inference.features import FeatureCache
from llava_npu.inference.likelihood import AnsweredPrompt, answer_log_probabilities
from llava_npu.models import load

_WINDOW = 256  # requests whose images are held in memory at once
_MAX_NEW_TOKENS = 1024  # where a task names none, as in LLaVA's scripts


class Likelihood(GenerationResult):
    """A loss, and whether greedy decoding would have written it, as a pair.

    Release 0.7.3 makes a text of every pair that a model returns, in which tasks then do not find two numbers; what is
    in a `GenerationResult` goes through as it is. Unpacked, it is the pair that the interface asks for.
    """

    def __init__(self, pair: tuple[float, bool]):
        super().__init__(text=pair)

    def __iter__(self) -> Iterator[float | bool]:
        return iter(self.text)


class LlavaNpu(lmms):
    """For tasks that give a text and a list of images."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 8,
        dtype: str = "auto",
        max_batch_size: int | None = None,
    ):
        """
        Args:
            pretrained: model folder, run folder or hub id.
            device: as for `llava-npu eval`; by default an NPU, else a GPU, else the CPU.
            batch_size: questions answered at once.
            dtype: "auto" (16 bits where the device computes in them), "float32", "bfloat16" or "float16".
            max_batch_size: lmms-eval gives it; unused.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size {batch_size!r}: a whole number from 1 on is needed.")
        chosen = devices.select(device or "auto")
        self.batch_size = int(batch_size)
        self._loaded = load(pretrained, chosen.torch_device, _dtype(dtype, chosen))
        self.model, self.processor = self._loaded  # as other models of lmms-eval have them
        self.device = chosen.torch_device
        self._features = FeatureCache(self._loaded)
        self._engine = offline_engine(self._loaded, self.batch_size, self._features)
        self._warned: set[str] = set()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer for each request, in order."""
        answers: list[str] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for window in _windows(requests):
                answers += self._generate([self._asked(request.args) for request in window])
                bar.update(len(window))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Likelihood]:
        """The mean loss of each continuation as the assistant's answer (what lmms-eval takes the least of), and whether
        greedy decoding would have written it.
        """
        found: list[Likelihood] = []
        for window in _windows(requests):
            for start in range(0, len(window), self.batch_size):
                found += self._score([request.args for request in window[start : start + self.batch_size]])
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError("llava_npu answers one round at a time; choose a task without several rounds.")

    def _asked(self, args: tuple[Any, ...]) -> _Asked:
        context, settings, doc_to_visual, doc_id, task, split = args
        return _asked(context, doc_to_visual(self.task_dict[task][split][doc_id]), settings)

    def _generate(self, asked: Sequence[_Asked]) -> list[str]:
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, each in enumerate(asked):
            self._warn(each.settings)
            by_length[int(each.settings.get("max_new_tokens") or _MAX_NEW_TOKENS)].append(number)
        texts: dict[str, str] = {}
        for max_new_tokens, numbers in by_length.items():
            answerer = ModelAnswerer(self._loaded, GenerateText(max_new_tokens), features=self._features)
            questions = [asked[number].question(str(number)) for number in numbers]
            ordered = list(chain.from_iterable(order_questions(questions)))
            for start in range(0, len(ordered), self.batch_size):
                batch = ordered[start : start + self.batch_size]
                answers = answerer.answer(batch)
                texts.update({question.id: answer.text for question, answer in zip(batch, answers, strict=True)})
        return [_cut(texts[str(number)], each.settings.get("until")) for number, each in enumerate(asked)]

    def _score(self, batch: Sequence[tuple[Any, ...]]) -> list[Likelihood]:
        items = []
        for number, (context, target, doc_to_visual, doc_id, task, split) in enumerate(batch):
            doc = self.task_dict[task][split][doc_id]
            each = _asked(context, doc_to_visual(doc), {})
            answer = target if isinstance(target, str) else target(doc)
            turns = [{"from": "human", "value": each.prompt}, {"from": "gpt", "value": answer.strip()}]
            items.append(AnsweredPrompt(turns, each.images, f"request {number} of {task}"))
        features, _ = self._features.load([image for item in items for image in item.images])
        scores = answer_log_probabilities(self._engine, items, features)
        return [Likelihood((-score.mean, score.is_greedy)) for score in scores]

    def _warn(self, settings: Mapping[str, Any]) -> None:
        wanted = [name for name in ("temperature", "do_sample") if settings.get(name)]
        wanted += ["num_beams"] if (settings.get("num_beams") or 1) > 1 else []
        for name in wanted:
            if name not in self._warned:
                self._warned.add(name)
                logger.warning(f"a task asks for {name}={settings[name]}; llava_npu answers greedily, with one beam.")


class LlavaNpuChat(LlavaNpu):
    """For tasks that give a message with texts and images in it."""

    is_simple = False

    def _asked(self, args: tuple[Any, ...]) -> _Asked:
        _, doc_to_messages, settings, doc_id, task, split = args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        roles = [message["role"] for message in messages]
        if roles != ["user"]:
            raise UserError(f"task {task}: messages of {', '.join(roles)}; llava_npu answers one message of a user.")
        parts = messages[0]["content"]
        others = {part["type"] for part in parts} - {"text", "image"}
        if others:
            raise UserError(
                f"task {task}: a message holds {', '.join(sorted(others))}; llava_npu takes texts and images."
            )
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        return _asked(text, [part["url"] for part in parts if part["type"] == "image"], settings)


@dataclass(frozen=True)
class _Asked:
    """A request: its text without marks, its images, its generation settings."""

    text: str
    images: tuple[LoadedImage, ...]
    settings: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        return "\n".join([*[IMAGE_MARK] * len(self.images), self.text])

    def question(self, name: str) -> Question:
        return Question(id=name, text=self.text, prompt=self.text, images=self.images, group=name)


def _asked(text: str, images: Iterable[Any] | None, settings: Mapping[str, Any]) -> _Asked:
    return _Asked(text.replace(IMAGE_MARK, "").strip(), tuple(map(_loaded, images or ())), settings)


def _loaded(image: Any) -> LoadedImage:
    if not isinstance(image, Image.Image):
        raise UserError(f"a task gives {type(image).__name__} where an image is expected; llava_npu sees images.")
    content = hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes())
    return LoadedImage(content.hexdigest(), image)


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0] if stop else text
    return text.strip()


def _windows(requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(requests), _WINDOW):
        yield requests[start : start + _WINDOW]


def _dtype(name: str, device: devices.Device) -> torch.dtype:
    if name == "auto":
        return device.autocast_dtype or torch.float32
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype {name!r}: allowed are auto, float32, bfloat16, float16.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
