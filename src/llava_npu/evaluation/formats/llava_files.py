"""Question files of LLaVA's evaluation scripts: one JSON object a line, its text the whole prompt.

    {"question_id": …, "image": "image.jpg", "text": "Question?\\nInstruction", "category": "…"}

(`llava/eval/model_vqa_loader.py` and `model_vqa.py` put "<image>" and a line break before the text, as we do.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llava_npu.evaluation.formats.json_files import JsonRecord
from llava_npu.evaluation.formats.locating import QuestionImages
from llava_npu.evaluation.questions import Question

SHORT = "Answer the question using a single word or phrase."


def llava_question(record: JsonRecord, images: QuestionImages, **more: Any) -> Question:
    """The question of a line.

    Args:
        record: the line.
        images: the folder of its image.
        more: other attributes of the question, or replacements of those that the line gives.

    Raises:
        UserError: a field is missing or damaged.
    """
    prompt = record.need("text")
    given = {
        "id": record.need("question_id"),
        "text": bare(prompt),
        "prompt": prompt,
        "images": (images.image(record),),
        "group": more.get("id", record.need("question_id")),
        "category": record.get("category"),
    }
    return Question(**{**given, **more})


def with_instruction(text: str, instruction: str = SHORT) -> str:
    """A question and, on a line of its own, how to answer; as it is if it says that already."""
    stripped = text.rstrip()
    if stripped.endswith(instruction):
        return text
    return f"{bare(stripped) if stripped.endswith(SHORT) else text}\n{instruction}"


def bare(prompt: str) -> str:
    """The question without the instruction for short answers."""
    return prompt.removesuffix(SHORT).rstrip()


def check_unique(records: Iterable[JsonRecord], field: str = "question_id") -> None:
    """Raises `UserError` if two records share an id."""
    seen: dict[str, JsonRecord] = {}
    for record in records:
        value = record.need(field)
        if value in seen:
            raise record.error(field, f"{value!r} is there twice: first in {seen[value].place}.")
        seen[value] = record
