"""Small data folders in the forms of LLaVA's evaluation scripts, of our own making."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.evaluation_samples import image_bytes, plain_image, write_parquet

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def save_image(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain_image((shade % 256, 80, 40), size=8).save(path)
    return path


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


POPE_CATEGORIES = ("adversarial", "popular", "random")


def pope(root: Path, labels: Sequence[Sequence[str]], images: int = 2) -> Path:
    """labels[category][question]; questions go round the images."""
    folder = root / "pope"
    questions, number = [], 0
    for category, of_category in zip(POPE_CATEGORIES, labels, strict=False):
        lines = []
        for place, label in enumerate(of_category):
            number += 1
            image = f"COCO_val2014_{place % images:012}.png"
            save_image(folder / "val2014" / image, place)
            text = f"Is there a thing {place} in the image?"
            questions.append({"question_id": number, "image": image, "text": f"{text}\n{SHORT}", "category": category})
            lines.append({"question_id": place + 1, "image": image, "text": text, "label": label})
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", lines)
    return write_jsonl(folder / "llava_pope_test.jsonl", questions)


def mme(root: Path, tasks: Mapping[str, int]) -> Path:
    """So many images a task, the first question of each with the answer Yes, the second with No."""
    folder = root / "MME"
    release = folder / "MME_Benchmark_release_version"
    lines = []
    for task, images in tasks.items():
        apart = task in ("artwork", "landmark")  # these have folders of their own for images and questions
        for number in range(images):
            image = f"{task}/images/{number:04}.png" if apart else f"{task}/{number:04}.png"
            save_image(release / image, number)
            asked = [f"Is it {number}?  Please answer yes or no.", f"Is it not {number}? Please answer yes or no."]
            file = release / task / ("questions_answers_YN" if apart else "") / f"{number:04}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{asked[0]}\tYes\n{asked[1]}\tNo\n", encoding="utf-8")
            # LLaVA's file has one question without the suffix.
            forms = [asked[0].replace("  Please answer yes or no.", ""), asked[1]]
            lines += [
                {
                    "question_id": f"{task}/{number:04}.png",
                    "image": image,
                    "text": f"{form}\n{SHORT}",
                    "category": task,
                }
                for form in forms
            ]
    return write_jsonl(folder / "llava_mme.jsonl", lines)


def scienceqa(root: Path, with_image: Sequence[bool], choices: int = 3) -> Path:
    """Question n (from 1) has its answer at place n modulo choices."""
    folder = root / "scienceqa"
    problems, questions = {}, []
    for number, seen in enumerate(with_image, start=1):
        name = str(number)
        options = " ".join(f"({'ABCDE'[place]}) option {place}" for place in range(choices))
        text = f"What is {number}?\nContext: none\nOptions: {options}"
        question: dict[str, Any] = {
            "id": name,
            "conversations": [
                {"from": "human", "value": f"{text}\n<image>" if seen else text},
                {"from": "gpt", "value": "The answer is A."},
            ],
        }
        if seen:
            question["image"] = f"{name}/image.png"
            save_image(folder / "images" / "test" / name / "image.png", number)
        questions.append(question)
        problems[name] = {
            "choices": [f"option {place}" for place in range(choices)],
            "answer": number % choices,
            "subject": "natural science",
            "topic": "physics",
        }
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": [*problems, "999"], "train": []})
    return write_json(folder / "llava_test_CQM-A.json", questions)


def textvqa(root: Path) -> Path:
    folder = root / "textvqa"
    save_image(folder / "train_images" / "abc.png")
    answers = ["cola"] * 3 + ["Coca Cola"] * 6 + ["pepsi"]
    data = [
        {"image_id": "abc", "question": "What brand is IT?", "answers": answers},
        {"image_id": "abc", "question": "what colour?", "answers": ["red"] * 10},
    ]
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": data})
    lines = [
        ("abc", f"What brand is it?\nReference OCR token: COLA, 1886\n{SHORT}"),
        ("abc", f"what colour?\n{SHORT}"),
    ]
    records = [{"question_id": name, "image": "abc.png", "text": text, "category": "default"} for name, text in lines]
    return write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", records)


def vqav2(root: Path) -> Path:
    folder = root / "vqav2"
    save_image(folder / "test2015" / "a.png")
    lines = [{"question_id": n, "image": "a.png", "text": f"What is {n}?\n{SHORT}"} for n in (1, 2, 3)]
    write_jsonl(folder / "llava_vqav2_mscoco_test2015.jsonl", [{"question_id": 7}, *lines])
    return write_jsonl(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", lines[:2])


def vizwiz(root: Path) -> Path:
    folder = root / "vizwiz"
    save_image(folder / "test" / "VizWiz_test_0.png")
    text = "What?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n" + SHORT
    lines = [{"question_id": 0, "image": "VizWiz_test_0.png", "text": text}]
    return write_jsonl(folder / "llava_test.jsonl", lines)


def gqa(root: Path) -> Path:
    folder = root / "gqa"
    save_image(folder / "data" / "images" / "n1.png")
    lines = [{"question_id": f"20{n}", "image": "n1.png", "text": f"Is it {n}?\n{SHORT}"} for n in (1, 2)]
    annotations = {
        f"20{n}": {"answer": answer, "types": {"semantic": "attr", "structural": "query"}}
        for n, answer in ((1, "dining table"), (2, "no"))
    }
    write_json(folder / "data" / "testdev_balanced_questions.json", annotations)
    return write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", lines)


def seedbench(root: Path) -> Path:
    folder = root / "seed_bench"
    annotations, lines = [], []
    for number, (kind, answer) in enumerate([("image", "A"), ("image", "C"), ("video", "B")]):
        name: int | str = number if kind == "image" else f"v{number}"
        annotations.append(
            {"question_id": str(name), "data_type": kind, "question_type_id": 1 + number % 2, "answer": answer}
            | {"question": f"What is {number}?"}
            | {f"choice_{letter}": f"thing {letter}" for letter in "abcd"}
        )
        image = f"SEED-Bench-{kind}/{number}.png"
        save_image(folder / image, number)
        options = "\n".join(f"{letter.upper()}. thing {letter}" for letter in "abcd")
        lines.append({"question_id": name, "image": image, "text": f"What is {number}?\n{options}\n{LETTER}"})
    types = {"Scene Understanding": 1, "Instance Identity": 2}
    write_json(folder / "SEED-Bench.json", {"questions": annotations, "question_type": types})
    return write_jsonl(folder / "llava-seed-bench.jsonl", lines)


def qbench(root: Path, name: str = "llvisionqa_dev.json") -> Path:
    folder = root / "qbench"
    save_image(folder / "images_llvisionqa" / "a.png")
    record = {
        "img_path": "a.png",
        "question": "How sharp is it?",
        "candidates": ["Sharp", "Blurred"],
        "type": 2,
        "concern": 0,
    }
    return write_json(folder / name, [{**record, "correct_ans": "Blurred"}, record])


def mmvet(root: Path, questions: int = 3) -> Path:
    folder = root / "mm-vet"
    lines, annotations = [], {}
    for number in range(questions):
        abilities = (["ocr", "math"], ["rec"], ["ocr"])[number % 3]
        save_image(folder / "images" / f"v1_{number}.png", number)
        lines.append({"question_id": number, "image": f"v1_{number}.png", "text": f"What is x in {number}?"})
        annotations[f"v1_{number}"] = {"answer": f"-{number}<AND>5", "capability": abilities}
    write_json(folder / "mm-vet.json", annotations)
    return write_jsonl(folder / "llava-mm-vet.jsonl", lines)


def llavabench(root: Path) -> Path:
    folder = root / "llava-bench-in-the-wild"
    questions, references = [], []
    for number, category in enumerate(("conv", "detail", "complex")):
        questions.append(
            {"question_id": number, "image": "001.png", "text": f"Describe {number}.", "category": category}
        )
        references.append({"question_id": number, "text": f"Reference {number}.", "answer_id": "x"})
    save_image(folder / "images" / "001.png")
    write_jsonl(folder / "context.jsonl", [{"id": "001", "image": "001.png", "caption": "A red square."}])
    write_jsonl(folder / "answers_gpt4.jsonl", references)
    return write_jsonl(folder / "questions.jsonl", questions)


def hub_datasets(root: Path) -> None:
    """One question of each benchmark that is read from a data set of Hugging Face, and CHAIR's files."""
    image = image_bytes()
    ask = {"question": "Which?", "image": image}
    choice = {**ask, "prompt": "Which?\n(A) x\n(B) y", "choices": ["x", "y"], "answer": "(A)"}
    document = {**ask, "questionId": "1", "answers": ["x"]}
    region = {"question_id": "1", "image": image, "answer": ["dog"], "bbox": [1.0, 2.0, 3.0, 4.0]}
    problem = {"question_type": "free_form", "answer_type": "integer", "answer": "3", "decoded_image": image}
    shard = "00000-of-00001"
    rows: dict[str, Mapping[str, Any]] = {
        f"ChartQA/data/test-{shard}": {**ask, "answer": "5", "type": "human_test"},
        f"DocVQA/validation-{shard}": document,
        f"InfographicVQA/validation-{shard}": document,
        f"OCRBench/data/test-{shard}": {**ask, "answer": ["x"], "question_type": "Doc-oriented VQA"},
        **{f"{name}/data/val-{shard}": region for name in ("RefCOCO", "RefCOCOplus", "RefCOCOg")},
        f"RealWorldQA/data/test-{shard}": {"question": "Where?\nA. x\nB. y", "answer": "A", "image": image},
        "CV-Bench/test_2d": {**choice, "idx": 0, "type": "2D", "task": "Count", "source": "COCO"},
        f"MathVista/data/testmini-{shard}-0123456789abcdef": {"pid": "1", "question": "How many?", **problem},
        f"BLINK/Art_Style/val-{shard}": {**choice, "idx": "val_Art_Style_1", "sub_task": "Art_Style", "image_1": image},
    }
    for name, row in rows.items():
        write_parquet(root / f"{name}.parquet", [row])
    chair(root / "chair")


CHAIR_SYNONYMS = """\
person, girl, man, woman, people, child
bus, minibus, trolley
dog, puppy
wine glass
skis, ski
toilet
chair, seat
tie
traffic light, street light
bear, panda
teddy bear, teddybear
"""


def chair(folder: Path) -> Path:
    """Two images: of a dog and a girl, and of a bear and buses."""
    names = {1: "COCO_val2014_000000000001.jpg", 2: "COCO_val2014_000000000002.jpg"}
    for number, name in names.items():
        save_image(folder / "val2014" / name, number)
    (folder / "synonyms.txt").write_text(CHAIR_SYNONYMS)
    segments = [{"image_id": 1, "category_id": 18}, {"image_id": 3, "category_id": 18}]
    captions = [{"image_id": n, "caption": text} for n, text in ((1, "A girl"), (2, "A bear"), (2, "Two buses"))]
    categories = [{"id": 18, "name": "dog"}]
    write_json(folder / "annotations" / "instances_val2014.json", {"annotations": segments, "categories": categories})
    write_json(folder / "annotations" / "captions_val2014.json", {"annotations": captions})
    return write_jsonl(folder / "questions.jsonl", [{"image": name} for name in names.values()])
