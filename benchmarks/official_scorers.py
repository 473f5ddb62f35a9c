"""Our scores next to those of the code that published scores come from, on made answers.

    python benchmarks/official_scorers.py CLONES [--answers 4000] [--write]

CLONES holds clones of the repositories of `COMMITS`; the functions are taken from them at those commits and run: none
of their code is here. CHAIR's also needs NLTK. Printed is, for each benchmark and rule, how many answers were
compared and how many were scored differently; --write puts the table where docs/evaluation.md has it from
(src/llava_npu/evaluation/reports/official_scorers.json).

Answers are made from the truth (as it is, in other case, in sentences, in brackets, with units, cut, mistyped), from
other options' texts and letters, and from random characters.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import string
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_npu.evaluation.benchmarks import available
from llava_npu.evaluation.benchmarks.mathvista import extract, normalise
from llava_npu.evaluation.extraction.coco_objects import coco_objects
from llava_npu.evaluation.questions import Question

COMMITS = {
    "BLINK_Benchmark": "2d6a779",
    "cambrian": "539ffc3",
    "Hallucination": "6e4d33c",
    "LLaVA": "c121f04",
    "lmms-eval": "75571cf",
    "MathVista": "53d5258",
    "MMMU": "bb0b95a",
    "MultimodalOCR": "794c36d",
    "pattern": "d25511f",
    "Qwen-VL": "aa00ed0",
    "VLMEvalKit": "e8e78f0",
}
TABLE = Path(__file__).parents[1] / "src/llava_npu/evaluation/reports/official_scorers.json"

TEXTS = ("Left", "hot dog", "a red car", "Downhill", "2019", "12%", "0.5", "1,200", "$45", "straße", "北京", "yes", "0")
FORMS = (
    *("{}", " {} ", "{}.", "({})", "The answer is {}.", "the answer is: {}", "Answer: {}", "{}, because it is so."),
    *(
        "**{}**",
        "It is {}",
        "{}\nBecause.",
        "“{}”",
        "I choose {} or so",
        "not {}",
        "{} {}",
        "[{}]",
        "选{}",
        'The answer is "{}".',
    ),
)


class Official:
    """Functions of other projects, by repository and path."""

    def __init__(self, clones: Path):
        self.clones = clones

    def source(self, repository: str, path: str) -> str:
        command = ["git", "-C", str(self.clones / repository), "show", f"{COMMITS[repository]}:{path}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def names(self, repository: str, path: str, *wanted: str, **given: Any) -> SimpleNamespace:
        """The functions, classes and constants `wanted`, run with `given` in place of what they import."""
        tree = ast.parse(self.source(repository, path))
        kept = [node for node in tree.body if _names_of(node) & set(wanted)]
        space: dict[str, Any] = {"re": re, "json": json, "Optional": None, "List": list, "Dict": dict, **given}
        module = ast.Module([ast.parse("from __future__ import annotations").body[0], *kept], [])
        exec(compile(ast.fix_missing_locations(module), path, "exec"), space)
        return SimpleNamespace(**{name: space[name] for name in wanted})

    def loop(self, repository: str, path: str, over: str) -> Callable[[dict[str, Any]], None]:
        """The loop of a script whose target and range read `over`, to be run in a namespace."""
        loops = [
            node
            for node in ast.walk(ast.parse(self.source(repository, path)))
            if isinstance(node, ast.For) and f"{ast.unparse(node.target)} in {ast.unparse(node.iter)}" == over
        ]
        code = compile(ast.Module([loops[0]], []), path, "exec")
        return lambda space: exec(code, space)


def _names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    return {each.id for each in getattr(node, "targets", []) if isinstance(each, ast.Name)}


class Count:
    """Answers compared, and those scored differently."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], list[Any]] = defaultdict(lambda: [0, []])

    def add(self, benchmark: str, rule: str, scorer: str, ours: Any, theirs: Any, about: Any) -> None:
        row = self.rows[benchmark, rule, scorer]
        row[0] += 1
        if ours != theirs:
            row[1].append((about, ours, theirs))


def made(random_: random.Random, truths: list[str], count: int) -> Iterator[str]:
    """Answers, about a third of them right in some sense."""
    for _ in range(count):
        text = random_.choice(truths) if random_.random() < 0.6 else random_.choice(TEXTS)
        match random_.randrange(8):
            case 0:
                text = text.upper()
            case 1:
                text = text.swapcase()
            case 2 if text:
                place = random_.randrange(len(text))
                text = text[:place] + random_.choice(string.printable) + text[place + 1 :]
            case 3:
                text = text[: random_.randint(0, len(text))]
        form = random_.choice(FORMS)
        answer = form.format(*[text] * form.count("{}"))
        if random_.random() < 0.05:
            answer = "".join(random_.choices(string.printable + "ßÉİ北", k=random_.randint(0, 12)))
        yield answer


def credit(benchmark: str, question: Question, answer: str, rule: str) -> float | None:
    known = available()[benchmark]
    return known.credit(question, rule, known.parse(question, answer)[rule])


def open_question(references: tuple[str, ...], **more: Any) -> Question:
    return Question("1", "?", "?", answer=references[0], references=references, **more)


def charts(official: Official, count: Count, random_: random.Random, answers: int) -> None:
    path = "eval_mm/evaluate_vqa.py"
    theirs = official.names("Qwen-VL", path, "relaxed_correctness", Optional=SimpleNamespace(__getitem__=None))
    numbers = [str(round(random_.uniform(-5, 3000), random_.randint(0, 3))) for _ in range(50)]
    truths = [*TEXTS, *numbers, "nan", "inf", "1e3", "0", "0.0", "-2"]
    for answer in made(random_, truths, answers):
        near = [truth for truth in truths if truth in answer] or [random_.choice(truths)]
        truth = random_.choice(near)
        if re.fullmatch(r"-?\d+(\.\d+)?", truth) and random_.random() < 0.5:
            answer = str(float(truth) * random_.choice([0.95, 1.05, 0.9499, 1.0501, 1.01])) + random_.choice(
                ["", "%", " "]
            )
        ours = credit("chartqa", open_question((truth,)), answer, "relaxed")
        expected = float(theirs.relaxed_correctness(truth, answer.strip()))
        count.add("chartqa", "relaxed", f"Qwen-VL, {path}", ours, expected, (truth, answer))


def documents(official: Official, count: Count, random_: random.Random, answers: int) -> None:
    path = "eval_mm/infographicsvqa_eval.py"
    constants = ("question_ids_to_exclude", "answer_types", "evidence_types", "reasoning_requirements")
    theirs = official.names(
        "Qwen-VL", path, *constants, "levenshtein_distance", "evaluate_method", print=lambda *_: None
    )
    rows, given = [], []
    for number, answer in enumerate(made(random_, list(TEXTS), answers)):
        references = random_.sample(TEXTS, random_.randint(1, 3))
        rows.append({"questionId": number, "question": "?", "answers": references})
        given.append({"questionId": number, "answer": answer})
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("truth.json", "said.json")]
        for file, value in zip(files, ({"data": rows}, given), strict=True):
            file.write_text(json.dumps(value))
        settings = SimpleNamespace(answer_types=False, anls_threshold=0.5)
        found = theirs.evaluate_method(*files, settings)["per_sample_result"]
    for row, said in zip(rows, given, strict=True):
        for name in ("docvqa", "infovqa"):
            ours = credit(name, open_question(tuple(row["answers"])), said["answer"], "anls")
            expected = float(found[str(row["questionId"])]["score"])
            count.add(name, "anls", f"Qwen-VL, {path} (the RRC's)", ours, expected, (row["answers"], said["answer"]))


def characters(official: Official, count: Count, random_: random.Random, answers: int) -> None:
    path = "OCRBench/example.py"
    loop = official.loop("MultimodalOCR", path, "i in range(len(data))")
    kinds = {"HME100k": "Handwritten Mathematical Expression Recognition", "svt": "Regular Text Recognition"}
    for answer in made(random_, list(TEXTS), answers):
        source = random_.choice(list(kinds))
        references = random_.sample(TEXTS, random_.randint(1, 3))
        record = {"type": kinds[source], "dataset_name": source, "answers": references, "predict": answer}
        loop(space := {"data": [record]})
        question = open_question(tuple(references), category=kinds[source])
        ours = credit("ocrbench", question, answer, "contains")
        expected = float(space["data"][0].get("result", 0))
        count.add("ocrbench", "contains", f"MultimodalOCR, {path}", ours, expected, (references, answer))


def boxes(official: Official, count: Count, random_: random.Random, answers: int) -> None:
    import numpy
    import torch

    lmms_path, qwen_path = "lmms_eval/tasks/refcoco/utils_rec.py", "eval_mm/evaluate_grounding.py"
    kit_path = "vlmeval/dataset/refcoco.py"
    lmms = official.names("lmms-eval", lmms_path, "parse_float_sequence_within", "compute_iou", "compute_accuracy")
    area = lambda box: (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])  # noqa: E731 - torchvision's
    qwen = official.names("Qwen-VL", qwen_path, "box_iou", torch=torch, box_area=area)
    qwen_loop = official.loop("Qwen-VL", qwen_path, "(i, output) in enumerate(merged_outputs)")
    kit = official.names(
        "VLMEvalKit", kit_path, "RefCOCODataset", ImageBaseDataset=object, np=numpy, pd=None, Optional=dict, List=dict
    ).RefCOCODataset
    for _ in range(answers):
        width, height = random_.randint(50, 640), random_.randint(50, 640)
        left, top = random_.randint(0, width - 20), random_.randint(0, height - 20)
        pixels = [left, top, random_.randint(left + 5, width), random_.randint(top + 5, height)]
        answer = _box_answer(random_, pixels, width, height)
        fractions = [pixel / side for pixel, side in zip(pixels, (width, height) * 2, strict=True)]
        question = Question(
            "1", "?", "?", answer=",".join(map(repr, fractions)), facts={"width": str(width), "height": str(height)}
        )
        ours = {rule: credit("refcoco", question, answer, rule) for rule in ("lmms-eval", "qwen-vl", "vlmevalkit")}
        about = (pixels, width, height, answer)
        predicted = lmms.parse_float_sequence_within(answer)
        try:
            right = float(lmms.compute_accuracy(fractions, predicted))
        except ZeroDivisionError:
            right = 0.0
        count.add("refcoco", "lmms-eval", f"lmms-eval, {lmms_path}", ours["lmms-eval"], right, about)
        output = {"answer": answer, "gt_bbox": pixels, "hw": (height, width)}
        pattern = re.compile(r"\((.*?)\),\((.*?)\)")
        space = {"merged_outputs": [output], "PATTERN": pattern, "re": re, "torch": torch, "box_iou": qwen.box_iou}
        qwen_loop(space := {**space, "correct": 0, "total_cnt": 0})
        count.add("refcoco", "qwen-vl", f"Qwen-VL, {qwen_path}", ours["qwen-vl"], float(space["correct"]), about)
        found = kit._parse_prediction(answer)
        found = None if found is None else kit._to_absolute(found, width, height)
        right = 0.0 if found is None else float(kit._compute_iou(found, numpy.array(pixels, float)) >= 0.5)
        count.add("refcoco", "vlmevalkit", f"VLMEvalKit, {kit_path}", ours["vlmevalkit"], right, about)


def _box_answer(random_: random.Random, pixels: list[int], width: int, height: int) -> str:
    scale = random_.choice([1, 999, 1000, None])
    said = [pixel + random_.randint(-15, 15) * random_.randint(0, 1) for pixel in pixels]
    numbers = [pixel / side * scale if scale else pixel for pixel, side in zip(said, (width, height) * 2, strict=True)]
    texts = [str(round(number, 3 if scale == 1 else 0)) for number in numbers]
    if random_.random() < 0.2:
        texts = texts[: random_.randint(0, 4)]
    if random_.random() < 0.1:
        random_.shuffle(texts)
    joined = random_.choice([", ", ",", " ", " , "]).join(texts)
    forms = ["[{}]", "({})", "{}", "The box is [{}].", "[ {} ]", "<box>({})</box>", "{} and [0.1, 0.2, 0.3, 0.4]"]
    if len(texts) == 4 and random_.random() < 0.4:
        return f"<box>({texts[0]},{texts[1]}),({texts[2]},{texts[3]})</box>"
    return random_.choice(forms).format(joined)


def letters(official: Official, count: Count, random_: random.Random, answers: int) -> None:
    ranked_path, first_path = "lmms_eval/tasks/_task_utils/mcq_extract.py", "lmms_eval/tasks/{}/utils.py"
    constants = ("_DEFAULT_CHOICES", "_ANSWER_PHRASES", "_FORMAT_PRIORITY")
    ranked = official.names("lmms-eval", ranked_path, *constants, "extract_mcq_answer")
    cambrian = official.names("cambrian", "eval/eval/realworldqa/realworldqa_test.py", "extract_single_answer")
    ade = official.names("cambrian", "eval/eval/ade/ade_test.py", "extract_mcq_answer")
    options = {"A": "Left", "B": "hot dog", "C": "a red car", "D": "0.5"}
    for answer in made(random_, [*options, *"abcd", "E", *options.values()], answers):
        about = (options, answer)
        truth = random_.choice(list(options))
        asked = Question("1", "?", "?", options=options, answer=truth)
        said = ranked.extract_mcq_answer(answer, choices=list("ABCD"))
        ours = credit("realworldqa", asked, answer, "lmms-eval")
        count.add("realworldqa", "lmms-eval", f"lmms-eval, {ranked_path}", ours, float(said == truth), about)
        word = random_.choice(TEXTS)
        free = open_question((word,))
        said_open = answer.lower().strip().rstrip(".")  # two lines of lmms_eval/tasks/realworldqa/utils.py
        ours = credit("realworldqa", free, answer, "lmms-eval")
        count.add(
            "realworldqa", "lmms-eval", f"lmms-eval, {ranked_path}", ours, float(said_open == word.lower()), about
        )
        for question in (asked, free):
            try:
                said = cambrian.extract_single_answer(answer)
            except IndexError:  # theirs fails on an answer without words
                said = None
            ours = credit("realworldqa", question, answer, "cambrian")
            path = "eval/eval/realworldqa/realworldqa_test.py"
            right = float(said == str(question.answer).lower())
            count.add("realworldqa", "cambrian", f"cambrian, {path}", ours, right, about)
        for name, task in (("cvbench", "cv_bench"), ("blink", "blink")):
            path = first_path.format(task)
            letter = official_letter(official, path)
            ours = credit(name, asked, answer, "lmms-eval")
            count.add(name, "lmms-eval", f"lmms-eval, {path}", ours, float(letter(answer) == truth), about)
        ours = credit("cvbench", asked, answer, "cambrian")
        right = float(ade.extract_mcq_answer(answer) == truth.lower())
        count.add("cvbench", "cambrian", "cambrian, eval/eval/ade/ade_test.py", ours, right, about)


_LETTERS: dict[str, Callable[[str], str]] = {}


def official_letter(official: Official, path: str) -> Callable[[str], str]:
    if path not in _LETTERS:
        _LETTERS[path] = official.names("lmms-eval", path, "_extract_answer_letter")._extract_answer_letter
    return _LETTERS[path]


def averages(official: Official, count: Count, random_: random.Random, answers: int) -> None:
    """The overall scores of CV-Bench and BLINK, of made hits."""
    path = "lmms_eval/tasks/cv_bench/utils.py"
    theirs = official.names("lmms-eval", path, "cv_bench_default_aggregate_results", defaultdict=defaultdict)
    blink = official.names("BLINK_Benchmark", "eval/evaluate.py", "eval_prediction", json=_FakeFiles())
    kinds = {"ADE20K": "2D", "COCO": "2D", "Omni3D": "3D"}
    tasks = [f"Task_{letter}" for letter in "ABCDEFGHIJKLMN"]
    for _ in range(max(3, answers // 400)):
        questions, parsed = [], {}
        for number in range(300):
            source = random_.choice(list(kinds))
            questions.append(
                Question(str(number), "?", "?", options={"A": "x", "B": "y"}, answer="A", group=str(number),
                         category=random_.choice(tasks), l2_category=kinds[source], facts={"source": source})
            )  # fmt: skip
            parsed[str(number)] = {"strict": random_.choice("AB")}
        hits = [{"source": each.facts["source"], "is_correct": parsed[each.id]["strict"] == "A"} for each in questions]
        ours = value_of("cvbench", "CV-Bench", questions, parsed)
        expected = round(theirs.cv_bench_default_aggregate_results(hits), 9)
        count.add("cvbench", "(overall)", f"lmms-eval, {path} (“original formula”)", ours, expected, len(questions))
        names = {each.id: f"val_{each.category}_{each.id}" for each in questions}
        files = {"val_answers.json": dict.fromkeys(names.values(), "(A)")}
        files["val_predictions/m.json"] = {names[key]: f"({said['strict']})" for key, said in parsed.items()}
        space = blink.eval_prediction.__globals__
        space.update(subtasks=tasks, open=lambda name, mode, files=files: files[name], print=lambda *_: None)
        expected = round(blink.eval_prediction("val", "m")["Total"], 9)
        ours = value_of("blink", "mean of tasks", questions, parsed)
        count.add("blink", "(overall)", "BLINK_Benchmark, eval/evaluate.py", ours, expected, len(questions))


class _FakeFiles:
    """`json`, where an open file is its content already."""

    @staticmethod
    def load(file: Any) -> Any:
        return file


def value_of(name: str, metric: str, questions: list[Question], parsed: dict[str, Any]) -> float:
    scores = available()[name].score(questions, parsed)
    return round(next(score.value for score in scores if score.metric == metric and score.level == "overall"), 9)


def mathematics(official: Official, count: Count, random_: random.Random, answers: int) -> None:
    extract_path, score_path = "evaluation/extract_answer.py", "evaluation/calculate_score.py"
    quiet = SimpleNamespace(info=lambda *_: None)
    theirs = official.names(
        "MathVista", extract_path, "extract_answer", "create_test_prompt", demo_prompt="", logging=quiet
    )
    distance = official.names("Qwen-VL", "eval_mm/infographicsvqa_eval.py", "levenshtein_distance").levenshtein_distance
    functions = ("get_most_similar", "normalize_extracted_answer", "safe_equal")
    score = official.names("MathVista", score_path, *functions, distance=distance, logging=quiet)
    kit_path = "vlmeval/dataset/utils/mathvista.py"
    kit = official.names(
        "VLMEvalKit", kit_path, "post_check", "list_to_dict", can_infer=matching_of(official).can_infer
    )
    for answer in made(random_, [*"ABCD", "Left", "0.5", "3", "2.75", "[1, 2]", "-4", "nan", "12.5"], answers):
        kind = random_.choice(["text", "integer", "float", "list"])
        choices = ["Left", "hot dog", "3", "0.5"] if kind == "text" else []
        truth = {"text": random_.choice(choices or ["-"]), "integer": "3", "float": "2.8", "list": "[1, 2]"}[kind]
        question = Question(
            "1", "?", "?", options=dict(zip("ABCD", choices, strict=False)), facts={"type": kind, "precision": "1.0"},
            answer="ABCD"[choices.index(truth)] if choices else truth,
        )  # fmt: skip
        problem = {"question_type": "multi_choice" if choices else "free_form", "answer_type": kind, "pid": "1",
                   "choices": choices, "query": "?"}  # fmt: skip
        said = theirs.extract_answer(None, answer, problem, quick_extract=True)
        about = (kind, truth, answer)
        needs_model = extract(question, answer) is None
        count.add(
            "mathvista",
            "mathvista",
            f"MathVista, {extract_path}",
            "" if needs_model else extract(question, answer),
            said,
            about,
        )
        compared = score.normalize_extracted_answer(said, choices, problem["question_type"], kind, 1.0)
        right = float(score.safe_equal(compared, truth))
        known = available()["mathvista"]
        ours = known.credit(question, "mathvista", normalise(question, said))
        count.add("mathvista", "mathvista", f"MathVista, {score_path}", ours, right, about)
        line = {"prediction": answer, "answer": truth, "choices": repr(choices), "answer_option": question.answer,
                "question_type": problem["question_type"], "answer_type": kind}  # fmt: skip
        try:
            found = kit.post_check(line, prefetch=True)
        except OverflowError:
            found = False
        right = float(found == question.answer) if choices else float(found is not False and found is not None)
        if kind != "list":  # which VLMEvalKit leaves to a model
            ours = credit("mathvista", question, answer, "vlmevalkit")
            count.add("mathvista", "vlmevalkit", f"VLMEvalKit, {kit_path}", ours, right, about)


def captions(official: Official, count: Count, random_: random.Random, answers: int) -> None:
    from nltk.tokenize import NLTKWordTokenizer

    source = official.source("pattern", "pattern/text/en/inflect.py")
    start, end = source.index("singular_rules = ["), source.index("#### VERB CONJ")
    prepositions = source.index("plural_prepositions =")
    space: dict[str, Any] = {"re": re, "NOUN": "NN"}
    exec(source[prepositions : source.index("))", prepositions) + 2], space)
    exec(source[start:end], space)
    words = NLTKWordTokenizer()

    def tokens(text: str) -> list[str]:
        # NLTK's own sentences need a model that is fetched; these captions end theirs plainly.
        sentences = re.split(r"(?<=[.!?])\s+|(?<=[.!?]\")\s+", text)
        return [each for sentence in sentences for each in words.tokenize(sentence)]

    synonyms = official.source("Hallucination", "data/synonyms.txt")
    script = official.source("Hallucination", "utils/chair.py")  # Python 2: the class up to its prints
    body = script[script.index("class CHAIR") : script.index("    def get_annotations_from_segments")]
    lines = synonyms.splitlines(keepends=True)
    reader = SimpleNamespace(readlines=lambda: lines)
    names = {
        "nltk": SimpleNamespace(word_tokenize=tokens),
        "singularize": space["singularize"],
        "open": lambda _: reader,
    }
    exec(body, names)
    theirs, ours = names["CHAIR"]([], ""), coco_objects(synonyms)
    vocabulary = [
        *(word for name in ours.names for word in name.split()),
        "baby",
        "adult",
        "passenger",
        "the",
        "a",
        "of",
    ]
    vocabulary += ["toilet", "seat", "traffic", "light", "wine", "glasses", "buses", "skis", "ties", "people", "and"]
    for _ in range(answers):
        said = [
            random_.choice(vocabulary) + random_.choice(["", "", "s", "es", "'s"])
            for _ in range(random_.randint(0, 25))
        ]
        caption = " ".join(word + random_.choice([""] * 6 + list(",.!:;") + ["..."]) for word in said)
        caption = re.sub(
            r"(?<!')\b([a-z]+) ([a-z]+)\b", random_.choice([r"\1-\2", r"\1/\2", r"\1 \2"]), caption, count=1
        )
        caption = random_.choice([caption, caption.capitalize(), f'"{caption}" ({caption[:9]})'])
        found = theirs.caption_to_words(caption)[1]
        count.add("chair", "chair", "Hallucination, utils/chair.py", ours.of_caption(caption), found, caption)


def earlier(official: Official, count: Count, random_: random.Random, answers: int) -> None:
    """Benchmarks of LLaVA's own evaluation, MMMU, and VLMEvalKit's rules for choices and for yes and no."""
    matching = matching_of(official)
    options = {"A": "Left", "B": "hot dog", "C": "a red car", "D": "0.5"}
    misc = official.names("VLMEvalKit", "vlmeval/smp/misc.py", "process_punctuation")
    yorn_path = "vlmeval/dataset/utils/yorn.py"
    yorn = official.names("VLMEvalKit", yorn_path, "YOrN_Extraction", process_punctuation=misc.process_punctuation)
    pope = official.names("LLaVA", "llava/eval/eval_pope.py", "eval_pope", print=lambda *_: None)
    science = official.loop("LLaVA", "llava/eval/eval_science_qa.py", "(prob_id, prob) in split_problems.items()")
    index = official.names("LLaVA", "llava/eval/eval_science_qa.py", "get_pred_idx").get_pred_idx
    mmmu_path = "mmmu/utils/eval_utils.py"
    functions = ("check_is_number", "normalize_str", "extract_numbers", "parse_open_response", "eval_open")
    draw = SimpleNamespace(choice=lambda _: None)  # where the authors draw an option, ours has none
    mmmu = official.names(
        "MMMU", mmmu_path, *functions, "parse_multi_choice_response", random=draw, np=__import__("numpy")
    )
    for answer in made(random_, [*options, *options.values(), "Yes", "no", "No, it is not", "3.5", "Z"], answers):
        about = (options, answer)
        truth = random_.choice(list(options))
        asked = Question("1", "?", "?", options=options, answer=truth, facts={"answer": truth})
        right = float(matching.can_infer(answer, dict(options)) == truth)
        kit = "VLMEvalKit, vlmeval/utils/matching_util.py"
        count.add("mmbench", "vlmevalkit", kit, credit("mmbench", asked, answer, "vlmevalkit"), right, about)
        said = mmmu.parse_multi_choice_response(answer, list(options), options)
        ours = credit("mmmu", asked, answer, "mmmu")
        count.add("mmmu", "mmmu", f"MMMU, {mmmu_path}", ours, float(said == truth), about)
        word = random_.choice(TEXTS)
        expected = float(mmmu.eval_open(word, mmmu.parse_open_response(answer)))
        ours = credit("mmmu", open_question((word,), facts={"answer": word}), answer, "mmmu")
        count.add("mmmu", "mmmu", f"MMMU, {mmmu_path}", ours, expected, (word, answer))
        yes = Question("1", "?", "?", answer="yes")
        right = float(yorn.YOrN_Extraction(answer) == "Yes")
        ours = credit("pope", yes, answer, "vlmevalkit")
        count.add("pope", "vlmevalkit", f"VLMEvalKit, {yorn_path}", ours, right, answer)
        given = [{"text": text} for text in (answer, "yes", "no")]  # theirs divides by what only the others make sure
        with tempfile.NamedTemporaryFile("w", suffix=".json") as labels:
            labels.write('{"label": "yes"}\n' * 3)
            labels.flush()
            pope.eval_pope(given, labels.name)
        right = float(given[0]["text"] == "yes")
        count.add(
            "pope", "llava", "LLaVA, llava/eval/eval_pope.py", credit("pope", yes, answer, "llava"), right, answer
        )
        space = {"split_problems": {"1": {"choices": list(options), "answer": "ABCD".index(truth)}}, "re": re,
                 "predictions": {"1": {"text": answer, "prompt": ""}}, "get_pred_idx": index,
                 "args": SimpleNamespace(options=list("ABCDE")), "results": {"correct": [], "incorrect": []},
                 "sqa_results": {"results": {}, "outputs": {}}}  # fmt: skip
        science(space)
        right = float(bool(space["results"]["correct"]))  # type: ignore[index, call-overload]
        path = "LLaVA, llava/eval/eval_science_qa.py"
        count.add("scienceqa", "llava", path, credit("scienceqa", asked, answer, "llava"), right, about)


def annotators(official: Official, count: Count, random_: random.Random, answers: int) -> None:
    path = "llava/eval/m4c_evaluator.py"
    names = ("EvalAIAnswerProcessor", "TextVQAAccuracyEvaluator")
    evaluator = official.names("LLaVA", path, *names, tqdm=lambda each: each).TextVQAAccuracyEvaluator()
    texts = [*TEXTS, "isn't it", "the two dogs", "im", "a", "none", "dog's", "3.5", "x;y", "Coca Cola!"]
    for answer in made(random_, texts, answers):
        few = random_.sample(texts, 3)
        references = tuple(random_.choice(few) for _ in range(10))
        expected = evaluator.eval_pred_list([{"pred_answer": answer, "gt_answers": list(references)}])
        for name in ("textvqa", "vqav2", "vizwiz"):
            ours = credit(name, open_question(references), answer, "llava")
            count.add(name, "llava", f"LLaVA, {path}", round(ours or 0, 9), round(expected, 9), (references, answer))


def matching_of(official: Official) -> SimpleNamespace:
    quiet = SimpleNamespace(info=lambda *_: None)
    return official.names(
        "VLMEvalKit", "vlmeval/utils/matching_util.py",
        "can_infer", "can_infer_option", "can_infer_text", "_VERBOSE_ANSWER_RE",
        string=string, os=SimpleNamespace(environ={}), cp=__import__("copy"), logger=quiet,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("clones", type=Path)
    parser.add_argument("--answers", type=int, default=4000)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    official, count = Official(options.clones), Count()
    for number, compare in enumerate(
        (charts, documents, characters, boxes, letters, averages, mathematics, captions, earlier, annotators), start=1
    ):
        compare(official, count, random.Random(number), options.answers)
    table = []
    for (benchmark, rule, scorer), (compared, different) in count.rows.items():
        repository, path = scorer.split(", ", 1)
        at = f"{repository} at {COMMITS[repository]}, {path}"
        table.append(
            {"benchmark": benchmark, "rule": rule, "scorer": at, "compared": compared, "different": len(different)}
        )
        print(f"{benchmark:12} {rule:12} {compared:6} compared, {len(different):4} different  {at}")
        for each in different[:3]:
            print("     (what, ours, theirs):", each)
    if options.write:
        TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(any(row["different"] for row in table))


if __name__ == "__main__":
    main()
