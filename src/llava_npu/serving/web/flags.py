"""Conversations that a visitor wants kept, in a local folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from llava_npu.errors import UserError
from llava_npu.inference.request import Sampling
from llava_npu.serving.web.conversation import ChatHistory, ServedModel


def flag_conversation(models: Sequence[ServedModel], history: ChatHistory, sampling: Sampling, folder: Path) -> Path:
    """Keeps a conversation in a local file, one JSON value a line, its images next to it; nothing about the visitor.

    Returns:
        The file.

    Raises:
        UserError: the conversation is empty, or the file cannot be written.
    """
    if not history.exchanges:
        raise UserError("There is nothing to flag yet.")
    path = folder / "flagged.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "models": [model.name for model in models],
            "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p},
            "exchanges": [
                {
                    "question": each.question,
                    "images": [_keep(each_image.image, folder) for each_image in each.images],
                    "answers": list(each.answers),
                }
                for each in history.exchanges
            ],
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _keep(image: Image.Image, folder: Path) -> str:
    name = f"{hashlib.sha256(image.tobytes()).hexdigest()[:16]}.png"
    if not (folder / name).exists():
        image.save(folder / name)
    return name
