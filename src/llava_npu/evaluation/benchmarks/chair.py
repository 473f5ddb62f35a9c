"""CHAIR: objects in captions that are not in the image (Rohrbach et al. 2018, arXiv:1809.02156).

Scored as in LisaAnne/Hallucination at 6e4d33c, utils/chair.py (see `extraction.coco_objects`): an object is there if
COCO's segments or any of its five captions have it. CHAIRs is the share of captions that name an absent object, CHAIRi
the share of mentions that do: lower is better. Which images, and how the model is asked, no paper agrees on (often 500
of val2014, "Please describe this image in detail."): the question file is yours.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import LOCALLY, Benchmark, Description, Parsed, register
from llava_npu.evaluation.extraction.coco_objects import CocoObjects, coco_objects
from llava_npu.evaluation.formats.json_files import (
    JsonRecord,
    combined_digest,
    members,
    read_json_object,
    read_jsonl,
    read_text,
)
from llava_npu.evaluation.formats.locating import QuestionImages, require_companion
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import Score, Unit, extraction_rules, hit, tabulate

_RULE = "chair"
_PROMPT = "Please describe this image in detail."
_IMAGE_NUMBER = re.compile(r"(\d+)\.\w+$")
_SEPARATOR = ", "
_NOTHING = "(no object)"


def _read(path: Path) -> Dataset:
    records, digest = read_jsonl(path)
    synonyms_file = require_companion(path, ("synonyms.txt", "data/synonyms.txt"), "CHAIR's list of synonyms")
    synonyms = read_text(synonyms_file)[1]
    folder = QuestionImages(path, ("val2014", "images", "."))
    wanted = {_image_number(record) for record in records}
    present, digests = _present_objects(path, wanted, coco_objects(synonyms))
    questions = []
    for place, record in enumerate(records):
        objects = sorted(present[_image_number(record)])
        text = record.get("text") or _PROMPT
        questions.append(
            Question(
                id=record.get("question_id") or str(place),
                text=text,
                prompt=text,
                images=(folder.image(record),),
                answer=_SEPARATOR.join(objects),
                references=tuple(objects),
                group=record.need("image"),
                facts={"synonyms": synonyms},
            )
        )
    return Dataset(path, combined_digest([digest, *digests]), tuple(questions))


def _image_number(record: JsonRecord) -> int:
    match = _IMAGE_NUMBER.search(record.need("image"))
    if match is None:
        raise record.error("image", "COCO's number is expected at the name's end, as in COCO_val2014_000000000042.jpg.")
    return int(match[1])


def _present_objects(path: Path, wanted: set[int], known: CocoObjects) -> tuple[dict[int, set[str]], list[str]]:
    """Image → what COCO's annotations of 2014 have in it, and the files' checksums."""
    present: dict[int, set[str]] = defaultdict(set)
    digests = []
    described: set[int] = set()
    folder = require_companion(path, ("annotations", "coco/annotations"), "COCO's annotations of 2014")
    for split in ("val", "train"):  # the authors' take both, but most images are of val
        names = [folder / f"{kind}_{split}2014.json" for kind in ("instances", "captions")]
        if split == "train" and (wanted <= described or not all(name.is_file() for name in names)):
            continue
        instances, instances_digest = read_json_object(names[0])
        captions, captions_digest = read_json_object(names[1])
        digests += [instances_digest, captions_digest]
        categories = {_number(each, "id"): each for each in members(instances, "categories")}
        for segment in members(instances, "annotations"):
            if (number := _number(segment, "image_id")) in wanted:
                category = categories.get(_number(segment, "category_id"))
                if category is None:
                    raise segment.error("category_id", "no category of the file has this number.")
                present[number].add(_object_of(category, known))
        for caption in members(captions, "annotations"):
            if (number := _number(caption, "image_id")) in wanted:
                described.add(number)
                present[number].update(known.of_caption(caption.need("caption")))
    if missing := sorted(wanted - described):
        raise UserError(f"{folder} has no captions of {len(missing)} images (first: {missing[0]}).")
    return present, digests


def _number(record: JsonRecord, field: str) -> int:
    try:
        return int(record.need(field))
    except ValueError as error:
        raise record.error(field, f"{record.get(field)[:60]!r} is not a whole number.") from error


def _object_of(category: JsonRecord, known: CocoObjects) -> str:
    name = category.need("name")
    if name not in known.names:
        raise category.error("name", f"{name!r} is not in the list of synonyms.")
    return known.names[name]


def _parse(question: Question, answer: str) -> Parsed:
    found = coco_objects(question.facts["synonyms"]).of_caption(answer)
    return {_RULE: _SEPARATOR.join(found) or _NOTHING}


def _mentions(question: Question, reading: str | None) -> tuple[int, int]:
    """Mentions of absent objects, and of all."""
    named = reading.split(_SEPARATOR) if reading and reading != _NOTHING else []
    return sum(each not in question.references for each in named), len(named)


def _credit(question: Question, rule: str, reading: str | None) -> float | None:
    return float(reading is not None and not _mentions(question, reading)[0])


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    scores = []
    for rule in extraction_rules(parsed):
        counts = [(question, _mentions(question, parsed.get(question.id, {}).get(rule))) for question in questions]
        scores += tabulate([hit(question, float(absent > 0)) for question, (absent, _) in counts], "CHAIRs", rule)
        mentions = [Unit(question, (absent, named), named) for question, (absent, named) in counts]
        scores += tabulate(mentions, "CHAIRi", rule)
    return scores


def _review(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[str]:
    empty = sum(not _mentions(each, parsed.get(each.id, {}).get(_RULE))[1] for each in questions)
    notes = ["CHAIRs and CHAIRi count errors: lower is better, and a caption that names nothing has none."]
    return [*notes, f"{empty} of {len(questions)} captions name no object of COCO."] if empty else notes


register(
    Benchmark(
        name="chair",
        title="CHAIR",
        description=Description(
            source="https://github.com/LisaAnne/Hallucination (synonyms.txt); https://cocodataset.org (annotations and "
            "images of 2014)",
            form="a .jsonl of yours (image: COCO_val2014_….jpg; optional: question_id, text) with synonyms.txt, "
            "annotations/ (instances_val2014.json, captions_val2014.json; train2014 if its images are used) and "
            "val2014/",
            licence="the list of synonyms comes without a licence; COCO annotations CC BY 4.0, images under Flickr's "
            "terms",
            prompt=f"text, or “{_PROMPT}”",
            metric="CHAIRs: share of captions that name an absent object; CHAIRi: share of such mentions (both: lower "
            "is better)",
            scored=(LOCALLY,),
        ),
        files=("chair/questions.jsonl", "chair_questions.jsonl"),
        read=_read,
        parse=_parse,
        score=_score,
        credit=_credit,
        review=_review,
        max_new_tokens=512,
        rules={_RULE: "the authors' script: words and pairs of words that are synonyms of COCO's objects"},
    )
)
