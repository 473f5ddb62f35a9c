"""The folder of an evaluation: whose it is, and what an earlier or interrupted run left in it.

    run.json            what is being evaluated: benchmark, data, model, settings; and every session that worked on it
    predictions.jsonl   one line a question, appended batch by batch
    predictions-*.jsonl the same of each of several processes, until they are put together

Whoever works in a folder has it locked, so that two runs cannot mix. The lock goes with its process, however that ends.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_npu.data.image_sources import ImageFile
from llava_npu.errors import UserError
from llava_npu.evaluation.fingerprints import fingerprint_images
from llava_npu.evaluation.predictions import (
    Prediction,
    append_predictions,
    cut_torn_line,
    read_predictions,
    replace_predictions,
)
from llava_npu.evaluation.processes import Processes
from llava_npu.evaluation.questions import Question
from llava_npu.files.atomic import write_text
from llava_npu.files.locks import LOCK, locked
from llava_npu.files.output_folder import changes, claim_folder
from llava_npu.version import __version__

RUN_FILE, PREDICTIONS_FILE = "run.json", "predictions.jsonl"
_PARTS = "predictions-*.jsonl"
_PACKAGES = ("torch", "torch-npu", "transformers", "tokenizers", "pillow", "numpy")

Identity = Mapping[str, Any]
Session = Mapping[str, Any]


def new_session(device: str, processes: Processes, command: str | None) -> dict[str, Any]:
    """What this session is: when and how it was started, and on what."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command or shlex.join(sys.argv),
        "device": device,
        "processes": processes.count,
        "versions": versions(),
    }


@contextmanager
def open_run(output: Path, identity: Identity, session: Session, fresh: bool) -> Iterator[list[Session]]:
    """Claims the folder for a run and locks it; gives the run's sessions, this one last.

    Raises:
        UserError: the folder holds something else, or another run, or is in use.
    """
    claim_folder(output, RUN_FILE, "output", "`llava-npu eval`")
    busy = f"output: {output} is in use by another run. Wait for it, stop it, or give another folder."
    with locked(output / LOCK, busy=busy):
        sessions = [*_earlier_sessions(output, identity, fresh), session]
        text = json.dumps({"identity": identity, "sessions": sessions}, indent=2, ensure_ascii=False)
        write_text(output / RUN_FILE, text + "\n")
        yield sessions


def predictions_path(output: Path, processes: Processes) -> Path:
    """Where a process appends its predictions."""
    return output / (PREDICTIONS_FILE if processes.count == 1 else f"predictions-{processes.rank}.jsonl")


def collect_predictions(output: Path, questions: Iterable[str]) -> tuple[list[Prediction], list[str]]:
    """Puts what several processes have written into the one file, and reads it.

    Args:
        output: the run's folder.
        questions: ids that predictions may have.

    Returns:
        the predictions, and notes on torn last lines.

    Raises:
        UserError: a file is damaged, or a prediction is of no such question, or two differ about one question.
    """
    whole, torn = _read_whole(output / PREDICTIONS_FILE)
    known = {prediction.id: prediction for prediction in whole}
    parts = sorted(output.glob(_PARTS))
    new = []
    for part in parts:
        predictions, torn_here = _read_whole(part)
        torn += torn_here
        for prediction in predictions:
            earlier = known.setdefault(prediction.id, prediction)
            if earlier is prediction:
                new.append(prediction)
            elif earlier.answer != prediction.answer:  # equal ones: an earlier collecting was interrupted
                raise UserError(
                    f"{part}: question {prediction.id} was answered {prediction.answer!r} here and {earlier.answer!r} "
                    "elsewhere in the folder. Did two runs write here at once? Start over with --fresh."
                )
    unknown = known.keys() - set(questions)
    if unknown:
        where = output / PREDICTIONS_FILE
        raise UserError(f"{where}: question {min(unknown)} is not in the data. Start over with --fresh.")
    if new:
        append_predictions(output / PREDICTIONS_FILE, new)
    for part in parts:
        part.unlink()
    notes = [f"An interrupted run had left a torn last line ({torn} bytes); it was answered again."] if torn else []
    return [*whole, *new], notes


def keep_unchanged(
    output: Path, questions: Iterable[Question], predictions: list[Prediction]
) -> tuple[list[Prediction], list[str]]:
    """Those predictions whose images are what the model saw.

    Where an image could not be read and has changed since, the question is to be asked again: its prediction is taken
    out of the file.

    Args:
        output: the run's folder.
        questions: as they are put to the model now.
        predictions: what earlier sessions left.

    Returns:
        the predictions that stay, and notes.

    Raises:
        UserError: answers were given about other images.
    """
    asked = {prediction.id: prediction for prediction in predictions if prediction.image_files is not None}
    changed = [
        question
        for question in questions
        if question.id in asked and asked[question.id].image_files != fingerprint_images(question.images)
    ]
    answered = [question for question in changed if asked[question.id].error is None]
    if answered:
        first = answered[0]
        names = ", ".join(str(image.path) for image in first.images if isinstance(image, ImageFile))
        raise UserError(
            f"output {output}: of {len(answered)} of {len(predictions)} answered questions the image files have "
            f"changed since (first: question {first.id}, {names or 'which has no image now'}). Put the former ones "
            "back; or give another folder, or --fresh to answer everything again."
        )
    if not changed:
        return predictions, []
    again = {question.id for question in changed}
    kept = [prediction for prediction in predictions if prediction.id not in again]
    replace_predictions(output / PREDICTIONS_FILE, kept)
    return kept, [f"{len(again)} questions whose images could not be read before, and have changed, are asked again."]


def session_notes(sessions: list[Session]) -> list[str]:
    """What a reader should know about how a run came to be."""
    notes = []
    if len(sessions) > 1:
        notes.append(f"The run took {len(sessions)} sessions.")
    for what in ("device", "versions"):
        if any(session[what] != sessions[0][what] for session in sessions):
            notes.append(f"Its sessions differ in {what}: answers may differ in the last bits. See {RUN_FILE}.")
    return notes


def _earlier_sessions(output: Path, identity: Identity, fresh: bool) -> list[Session]:
    run_file = output / RUN_FILE
    if not run_file.exists():
        return []
    if fresh:
        for path in (output / PREDICTIONS_FILE, *output.glob(_PARTS)):
            path.unlink(missing_ok=True)
        return []
    earlier = _read_run(run_file)
    _check_identity(output, earlier["identity"], identity)
    sessions: list[Session] = earlier["sessions"]
    return sessions


def _read_run(run_file: Path) -> dict[str, Any]:
    try:
        run = json.loads(run_file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{run_file} is damaged: {error}. Start over with --fresh, or give another folder.") from error
    expected = {"identity": dict, "sessions": list}
    if not isinstance(run, dict) or any(not isinstance(run.get(key), kind) for key, kind in expected.items()):
        raise UserError(f"{run_file} was not written by llava-npu. Give another folder.")
    return run


def _check_identity(output: Path, earlier: Identity, now: Identity) -> None:
    if changed := changes(earlier, now):
        lines = "\n".join(changed)
        raise UserError(
            f"output {output} holds a run with other settings:\n{lines}\n"
            "Give another folder to keep both, or --fresh to throw the earlier one away."
        )


def _read_whole(path: Path) -> tuple[list[Prediction], int]:
    """The whole lines of a file, which is cut behind them; and how many bytes went."""
    predictions, whole = read_predictions(path)
    return predictions, cut_torn_line(path, whole)


def versions() -> dict[str, str]:
    """Of this program and of what it computes with."""
    versions = {"llava-npu": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # torch-npu is there on an NPU machine only
    return versions
