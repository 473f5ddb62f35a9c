"""Putting answers to a judge model, where a benchmark needs one or may use one; what it said is kept and counted.

A judgement becomes one more reading of the answer, beside those of the extraction rules, and is scored like them. A
judge that fails leaves no reading: the answer counts as wrong, and the report says how many did. Nothing is random.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llava_npu.errors import UserError
from llava_npu.evaluation.files import write_text
from llava_npu.evaluation.judge_client import JudgeClient, JudgeError, Message, Reply
from llava_npu.evaluation.predictions import Prediction
from llava_npu.evaluation.questions import Question

JUDGEMENTS_FILE = "judgements.jsonl"
_ATTEMPTS = 3  # at a reply that can be read


@dataclass(frozen=True)
class JudgeRule:
    """What a judge is asked and how its reply is read.

    Attributes:
        rule: the extraction rule that its readings appear under.
        required: whether the benchmark has no score without it.
        ask: question and answer → the prompt; None if there is nothing to ask (the answer is then wrong).
        read: question and reply → the reading; None if the reply cannot be read.
        base: an extraction rule; answers that it reads are not put to the judge.
        system: the system message, if any.
        temperature, max_tokens: of the request.
    """

    rule: str
    required: bool
    ask: Callable[[Question, str], str | None]
    read: Callable[[Question, str], str | None]
    base: str | None = None
    system: str | None = None
    temperature: float = 0.0
    max_tokens: int = 1024


@dataclass(frozen=True)
class Judgement:
    """One answer as judged.

    Attributes:
        id: of the question.
        reading: what the judge's reply says; None if it failed.
        reply: its last words.
        error: why there is no reading.
        prompt_tokens, completion_tokens: of all attempts, cached ones included.
        cached: whether all of it came from the cache.
    """

    id: str
    reading: str | None
    reply: str
    error: str | None
    prompt_tokens: int
    completion_tokens: int
    cached: bool


def judge_predictions(
    rule: JudgeRule, questions: Sequence[Question], predictions: Sequence[Prediction], client: JudgeClient
) -> tuple[list[Prediction], list[Judgement]]:
    """Adds the judge's reading to every prediction.

    Returns:
        the predictions with their new readings, and the judgements of those that were put to the judge.

    Raises:
        UserError: the endpoint refuses to be asked at all.
    """
    by_id = {question.id: question for question in questions}
    readings: dict[str, str | None] = {}
    prompts: dict[str, str] = {}
    for prediction in predictions:
        settled = prediction.parsed.get(rule.base) if rule.base else None
        prompt = rule.ask(by_id[prediction.id], prediction.answer) if settled is None else None
        readings[prediction.id] = settled
        if prompt is not None:
            prompts[prediction.id] = prompt
    with ThreadPoolExecutor(client.settings.parallel) as pool:
        futures = [pool.submit(_judge, rule, by_id[name], prompt, client) for name, prompt in prompts.items()]
        try:
            judgements = [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)  # one refusal is enough
    readings.update({judgement.id: judgement.reading for judgement in judgements})
    judged = [
        replace(prediction, parsed={**prediction.parsed, rule.rule: readings[prediction.id]})
        for prediction in predictions
    ]
    return judged, judgements


def write_judgements(judgements: Sequence[Judgement], folder: Path) -> None:
    """Writes judgements.jsonl, atomically."""
    lines = (json.dumps(asdict(judgement), ensure_ascii=False) + "\n" for judgement in judgements)
    write_text(folder / JUDGEMENTS_FILE, "".join(lines))


def with_judgements(rule: JudgeRule, predictions: Sequence[Prediction], folder: Path) -> list[Prediction]:
    """Predictions as `judge_predictions` left them, from what `write_judgements` wrote; unchanged if it wrote nothing.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / JUDGEMENTS_FILE
    if not path.is_file():
        return list(predictions)
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        judged = {str(line["id"]): line["reading"] for line in lines}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}). Run the evaluation again: it only judges anew.") from error
    return [
        replace(each, parsed={**each.parsed, rule.rule: judged.get(each.id, each.parsed.get(rule.base or ""))})
        for each in predictions
    ]


def judge_notes(rule: JudgeRule, judgements: Sequence[Judgement], client: JudgeClient) -> list[str]:
    """What was asked, what it cost, what failed."""
    asked = [judgement for judgement in judgements if not judgement.cached]
    read, written = (sum(getattr(each, name) for each in asked) for name in ("prompt_tokens", "completion_tokens"))
    cost = "price unknown"
    if client.settings.prices is not None:
        dear = (read * client.settings.prices[0] + written * client.settings.prices[1]) / 1e6
        cost = f"cost {dear:.4f}"
    notes = [
        f"Judge {client.settings.model} at {client.settings.address} (rule {rule.rule}): {len(judgements)} answers, "
        f"{len(judgements) - len(asked)} from the cache; {read} tokens read and {written} written now, {cost}."
    ]
    failed = [judgement for judgement in judgements if judgement.reading is None]
    if failed:
        first = failed[0]
        notes.append(
            f"The judge failed for {len(failed)} of {len(judgements)} answers (first: {first.id}: {first.error}). They "
            f"have no reading; see {JUDGEMENTS_FILE}. Run again to repeat requests that got no reply."
        )
    return notes


def _judge(rule: JudgeRule, question: Question, prompt: str, client: JudgeClient) -> Judgement:
    messages: list[Message] = [{"role": "system", "content": rule.system}] if rule.system else []
    messages.append({"role": "user", "content": prompt})
    replies: list[Reply] = []
    reading: str | None = None
    error: str | None = None
    for attempt in range(_ATTEMPTS):
        try:
            replies.append(
                client.ask(messages, temperature=rule.temperature, max_tokens=rule.max_tokens, attempt=attempt)
            )
        except JudgeError as failure:
            error = str(failure)
            break
        reading = rule.read(question, replies[-1].text)
        if reading is not None:
            break
        error = f"unreadable reply {replies[-1].text[:80]!r} ({attempt + 1} attempts)"
    return Judgement(
        id=question.id,
        reading=reading,
        reply=replies[-1].text if replies else "",
        error=error if reading is None else None,
        prompt_tokens=sum(reply.prompt_tokens for reply in replies),
        completion_tokens=sum(reply.completion_tokens for reply in replies),
        cached=bool(replies) and all(reply.cached for reply in replies),
    )
