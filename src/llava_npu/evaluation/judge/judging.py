"""Putting answers to a judge model, where a benchmark needs one or may use one; what it said is kept and counted.

A judgement becomes one more reading of the answer, next to those of the extraction rules, and is scored like them. A
reply that cannot be read leaves no reading: the answer counts as wrong, and the report says how many did. Nothing is
random. Where there was no reply at all, the model is not to blame: then the judge gives no score, what was
judged is kept in the cache, and the next run asks for the rest. A judge that is down is not asked hundreds of times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llava_npu.errors import UserError
from llava_npu.evaluation.judge.client import JudgeClient, JudgeError, Message, RefusedError, Reply
from llava_npu.evaluation.predictions import Prediction
from llava_npu.evaluation.questions import Question
from llava_npu.files.atomic import write_text

JUDGEMENTS_FILE = "judgements.jsonl"
_ATTEMPTS = 3  # at a reply that can be read
_FEW = 3  # answers, all of which a judge may refuse for what is in them


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
        error: why a reading is missing.
        pending: whether there was no reply, so that it is worth asking again.
        prompt_tokens, completion_tokens: of all attempts, cached ones included.
        new_prompt_tokens, new_completion_tokens: of the attempts that were made this time.
        cached: whether all of it came from the cache.
    """

    id: str
    reading: str | None
    reply: str
    error: str | None
    pending: bool
    prompt_tokens: int
    completion_tokens: int
    new_prompt_tokens: int
    new_completion_tokens: int
    cached: bool


def judge_predictions(
    rule: JudgeRule,
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    client: JudgeClient,
    on_judged: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Prediction], list[Judgement]]:
    """Adds the judge's reading to every prediction.

    Args:
        rule: what is asked.
        questions, predictions: of a benchmark.
        client: the judge.
        on_judged: told after each judgement how many there are, and how many there will be.

    Returns:
        the predictions with their new readings (or as they were, if the judge gave no reply to some of them), and the
        judgements of those that were put to the judge.

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
        judgements = []
        try:
            for future in futures:
                judgements.append(future.result())
                on_judged(len(judgements), len(futures))
        finally:
            pool.shutdown(cancel_futures=True)  # one refusal is enough
    if any(judgement.pending for judgement in judgements):
        return list(predictions), judgements
    if len(judgements) >= _FEW and not any(judgement.reply for judgement in judgements):
        raise UserError(
            f"judge {client.settings.model} at {client.settings.address} refuses every answer, the first so: "
            f"{judgements[0].error}"
        )
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
        if any(line["pending"] for line in lines):
            return list(predictions)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}). Run the evaluation again: it only judges again.") from error
    return [
        replace(each, parsed={**each.parsed, rule.rule: judged.get(each.id, each.parsed.get(rule.base or ""))})
        for each in predictions
    ]


def judge_notes(rule: JudgeRule, judgements: Sequence[Judgement], client: JudgeClient) -> list[str]:
    """What was asked, what it cost, what failed."""
    cached = sum(judgement.cached for judgement in judgements)
    now = _tokens(judgements, "new_prompt_tokens", "new_completion_tokens", client)
    in_all = _tokens(judgements, "prompt_tokens", "completion_tokens", client)
    notes = [
        f"Judge {client.settings.model} at {client.settings.address} (rule {rule.rule}): {len(judgements)} answers, "
        f"{cached} from the cache; now {now}" + (f"; with the cache {in_all}." if now != in_all else ".")
    ]
    pending = [judgement for judgement in judgements if judgement.pending]
    if pending:
        first = pending[0]
        notes.append(
            f"The judge gave no reply for {len(pending)} of {len(judgements)} answers (first: {first.id}: "
            f"{first.error}), so the rule {rule.rule} gives no score. Run again to continue: its replies are kept."
        )
    if "temperature" in client.refused_parameters:
        notes.append(
            "The judge does not take a temperature: it replied with its own, and may reply otherwise next time."
        )
    failed = [judgement for judgement in judgements if judgement.reading is None and not judgement.pending]
    if failed:
        first = failed[0]
        notes.append(
            f"The judge failed for {len(failed)} of {len(judgements)} answers (first: {first.id}: {first.error}). They "
            f"have no reading; see {JUDGEMENTS_FILE}."
        )
    return notes


def _tokens(judgements: Sequence[Judgement], read_name: str, written_name: str, client: JudgeClient) -> str:
    read, written = (sum(getattr(each, name) for each in judgements) for name in (read_name, written_name))
    prices = client.settings.prices
    cost = "price unknown" if prices is None else f"cost {(read * prices[0] + written * prices[1]) / 1e6:.4f}"
    return f"{read} tokens read and {written} written, {cost}"


def _judge(rule: JudgeRule, question: Question, prompt: str, client: JudgeClient) -> Judgement:
    messages: list[Message] = [{"role": "system", "content": rule.system}] if rule.system else []
    messages.append({"role": "user", "content": prompt})
    replies: list[Reply] = []
    reading: str | None = None
    error: str | None = None
    pending = False
    for attempt in range(_ATTEMPTS):
        try:
            replies.append(
                client.ask(messages, temperature=rule.temperature, max_tokens=rule.max_tokens, attempt=attempt)
            )
        except JudgeError as failure:
            error, pending = str(failure), True
            break
        except RefusedError as refusal:
            error = str(refusal)
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
        pending=pending,
        prompt_tokens=sum(reply.prompt_tokens for reply in replies),
        completion_tokens=sum(reply.completion_tokens for reply in replies),
        new_prompt_tokens=sum(reply.prompt_tokens for reply in replies if not reply.cached),
        new_completion_tokens=sum(reply.completion_tokens for reply in replies if not reply.cached),
        cached=bool(replies) and all(reply.cached for reply in replies),
    )
