"""TextVQA: reading text in images (Singh et al. 2019, arXiv:1904.08920), the validation split.

LLaVA's question file has the image's id as question id, and prompts that carry OCR tokens. Its script finds a
question's annotation by image and lower-case question, which it takes from the prompt's lines; so do we.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from llava_npu.evaluation.benchmarks import LOCALLY, Description, register
from llava_npu.evaluation.extraction.open_answers import OpenBenchmark, most_frequent, read_open_table
from llava_npu.evaluation.formats.json_files import JsonRecord, combined_digest, members, read_json_object, read_jsonl
from llava_npu.evaluation.formats.llava_files import SHORT, llava_question
from llava_npu.evaluation.formats.locating import QuestionImages, require_companion
from llava_npu.evaluation.questions import Dataset, Question

_OCR = "Reference OCR token:"
_OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        return read_open_table(path)
    records, digest = read_jsonl(path)
    images = QuestionImages(path, ("train_images", "images", "."))
    file = require_companion(path, ("TextVQA_0.5.1_val.json",), "TextVQA's annotations")
    whole, annotations_digest = read_json_object(file)
    annotations = {
        (each.need("image_id"), each.need("question").lower()): each.texts("answers") for each in members(whole, "data")
    }
    seen: Counter[str] = Counter()
    questions = []
    for record in records:
        image = record.need("question_id")
        seen[image] += 1
        question = _annotated(record, images, annotations)
        questions.append(replace(question, id=f"{image}/{seen[image]}", group=image))
    return Dataset(path, combined_digest([digest, annotations_digest]), tuple(questions))


def _annotated(
    record: JsonRecord, images: QuestionImages, annotations: dict[tuple[str, str], tuple[str, ...]]
) -> Question:
    asked = _asked(record)
    key = (record.need("question_id"), asked.lower())
    if not annotations.get(key):
        raise record.error("text", f"no answers in the annotations for image {key[0]!r}, question {asked[:80]!r}.")
    return llava_question(
        record, images, text=asked, references=annotations[key], answer=most_frequent(annotations[key])
    )


def _asked(record: JsonRecord) -> str:
    """The question in a prompt, by the rules of `llava/eval/eval_textvqa.py`."""
    prompt = record.need("text")
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = _OLD_PROMPT.search(prompt)
        if match:
            return match[1]
    elif _OCR in prompt and len(lines) == 3:
        return lines[1] if prompt.startswith(_OCR) else lines[0]
    elif len(lines) == 2:
        return lines[0]
    raise record.error("text", "not a prompt of LLaVA's: question, “Reference OCR token: …” (or none), instruction.")


register(
    OpenBenchmark(
        name="textvqa",
        title="TextVQA (val)",
        description=Description(
            source="https://textvqa.org (TextVQA_0.5.1_val.json, train_val_images.zip), questions as LLaVA's eval.zip "
            "has them; VLMEvalKit: TextVQA_VAL.tsv",
            form="llava_textvqa_val_v051_ocr.jsonl (question_id = image id, image, text with OCR tokens) with "
            "TextVQA_0.5.1_val.json (data: image_id, question, ten answers) and train_images/; or TextVQA_VAL.tsv "
            "(index, question, answer as a list, image; no OCR tokens)",
            licence="CC BY 4.0",
            prompt=f"question, “{_OCR} …” (LLaVA's file), “{SHORT}”",
            metric="VQA accuracy over ten annotators",
            scored=(LOCALLY,),
        ),
        files=("textvqa/llava_textvqa_val_v051_ocr.jsonl", "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_VAL.tsv"),
        read=_read,
        checksums={"TextVQA_VAL.tsv": "b233b31f551bbf4056f2f955da3a92cd"},
    )
)
