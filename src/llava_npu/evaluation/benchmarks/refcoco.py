"""RefCOCO, RefCOCO+ and RefCOCOg: where is what an expression names? (Kazemzadeh et al. 2014; Yu et al. 2016,
arXiv:1608.00272)

What papers report (Shikra, MiniGPT-v2, Qwen-VL, InternVL, Ferret) is the share of expressions whose box has an IoU of
at least one half with the true one: "accuracy@0.5" or "precision@1". lmms-eval's other task, captions of boxes scored
by CIDEr, is not here. Boxes are read by three published rules (see `extraction.boxes`); LLaVA's answers have
the form of the first, in fractions of the image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from llava_npu.data.image_sources import ImageSource
from llava_npu.evaluation.benchmarks import LOCALLY, Description, Parsed, register
from llava_npu.evaluation.extraction import boxes
from llava_npu.evaluation.extraction.open_answers import OpenBenchmark
from llava_npu.evaluation.formats.json_files import JsonRecord, read_jsonl
from llava_npu.evaluation.formats.locating import QuestionImages
from llava_npu.evaluation.formats.parquet import read_parquet, record_image
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import Score, score_credits

_ENOUGH = 0.5
_INSTRUCTION = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the "
    "region this sentence describes: "
)


def _read(path: Path) -> Dataset:
    if path.suffix == ".jsonl":
        records, digest = read_jsonl(path)
        folder = QuestionImages(path, ("images", "."))
        questions = [
            _question(str(place), record, "sent", folder.image(record), _size(record))
            for place, record in enumerate(records)
        ]
        return Dataset(path, digest, tuple(questions))
    records, digest = read_parquet(path)
    return Dataset(path, digest, tuple(each for record in records for each in _of_row(record)))


def _of_row(record: JsonRecord) -> list[Question]:
    """One question for each expression; the row's box is left, top, width, height."""
    image = record_image(record)
    try:
        with Image.open(io.BytesIO(image.data)) as opened:  # its header alone
            size = opened.size
    except (OSError, ValueError, SyntaxError) as error:
        raise record.error("image", "no image, or a damaged one; a box needs its size.") from error
    left, top, width, height = _box(record)
    expressions = record.texts("answer")
    if not expressions:
        raise record.error("answer", "no expression.")
    box = [left, top, left + width, top + height]
    return [
        _question(
            f"{record.need('question_id')}/{number}",
            JsonRecord({"sent": expression, "bbox": box}, record.file, record.place),
            "sent",
            image,
            size,
        )
        for number, expression in enumerate(expressions, start=1)
    ]


def _question(name: str, record: JsonRecord, column: str, image: ImageSource, size: tuple[int, int]) -> Question:
    text = record.need(column)
    pixels = _box(record)
    fractions = [pixel / side for pixel, side in zip(pixels, (*size, *size), strict=True)]
    return Question(
        id=name,
        text=text,
        prompt=_INSTRUCTION + text,
        images=(image,),
        answer=_written(fractions),
        group=image.key,
        facts={"width": str(size[0]), "height": str(size[1])},
    )


def _box(record: JsonRecord) -> tuple[float, ...]:
    numbers = record.values.get("bbox")
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(isinstance(each, int | float) for each in numbers):
        raise record.error("bbox", f"four numbers are expected, not {str(numbers)[:60]!r}.")
    if not all(map(math.isfinite, numbers)):
        raise record.error("bbox", f"{numbers} are not all finite.")
    return tuple(map(float, numbers))


def _size(record: JsonRecord) -> tuple[int, int]:
    try:
        width, height = (int(record.need(field)) for field in ("width", "height"))
    except ValueError:
        width = height = 0
    if width <= 0 or height <= 0:
        raise record.error("width", "the image's width and height in pixels are expected.")
    return width, height


def _written(box: Sequence[float]) -> str:
    return ",".join(map(repr, box))


def _parse(question: Question, answer: str) -> Parsed:
    size = float(question.facts["width"]), float(question.facts["height"])
    found = {
        "lmms-eval": boxes.lmms_eval(answer),
        "qwen-vl": boxes.qwen_vl(answer),
        "vlmevalkit": boxes.vlmevalkit(answer, *size),
    }
    return {rule: _written(box) if box else None for rule, box in found.items()}


def _iou(question: Question, rule: str, reading: str | None) -> float | None:
    if question.answer is None:
        return None
    if reading is None:
        return 0.0
    one, other = (list(map(float, text.split(","))) for text in (reading, question.answer))
    return boxes.iou(one, other)


def _credit(question: Question, rule: str, reading: str | None) -> float | None:
    overlap = _iou(question, rule, reading)
    return None if overlap is None else float(overlap >= _ENOUGH)


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    return [
        *score_credits(questions, parsed, "accuracy@0.5", _credit),
        *score_credits(questions, parsed, "mean IoU", _iou),
    ]


def _register(name: str, title: str, folder: str, splits: str) -> None:
    register(
        OpenBenchmark(
            name=name,
            title=title,
            description=Description(
                source=f"https://github.com/lichengunc/refer; Hugging Face: lmms-lab/{folder} ({splits})",
                form="….parquet of one split (question_id, image, answer: the expressions, bbox: left, top, width, "
                "height); or .jsonl as Qwen-VL and InternVL have them (image, sent, bbox: left, top, right, bottom, "
                "width, height), images below its folder. Name the file of another split",
                licence="Apache-2.0 (annotations); COCO images under Flickr's terms",
                prompt=f"“{_INSTRUCTION}”, the expression (as lmms-eval's refcoco_bbox_rec)",
                metric="share of boxes with an IoU of at least 0.5; mean IoU",
                scored=(LOCALLY,),
            ),
            files=(
                f"{folder}/data/val-00000-of-*.parquet",
                f"{folder.lower()}/{folder.lower()}_val.jsonl",
                f"{folder.lower()}_val.jsonl",
            ),
            read=_read,
            parse=_parse,
            score=_score,
            credit=_credit,
            rules=boxes.ABOUT,
        )
    )


_register("refcoco", "RefCOCO (val)", "RefCOCO", "val, test, testA, testB")
_register("refcoco_plus", "RefCOCO+ (val)", "RefCOCOplus", "val, testA, testB")
_register("refcocog", "RefCOCOg (val)", "RefCOCOg", "val, test")
