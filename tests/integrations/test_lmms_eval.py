"""lmms-eval's released package, with a small local task, on our models: its answers are ours.

It is installed without most of what it asks for (tests/integrations/lmms-eval.txt says why), and imports all the same.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from llava_npu.data.conversation.labels import encode_conversation, expand_images
from llava_npu.errors import UserError
from llava_npu.evaluation.answering import build_answerer
from llava_npu.evaluation.run import evaluate
from llava_npu.models import compose, load
from support import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (120, 120, 120)}
SUFFIX = "Answer the question using a single word or phrase."
BEGINNINGS = ("Which colour is this, is it", "What is as", "Is it")
QUESTIONS = [f"{text} {colour}?" for colour in COLOURS for text in BEGINNINGS]

TASK = """\
task: ours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.visual
doc_to_text: !function functions.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false, until: ["\\n\\n"]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOICE_TASK = """\
task: choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_visual: !function functions.visual
doc_to_text: question
doc_to_choice: {options}
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = f"""\
from PIL import Image

def visual(doc):
    return [Image.open(doc["path"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + "\\n{SUFFIX}"
"""


@pytest.fixture(scope="module", autouse=True)
def own_locks() -> Iterator[None]:
    """lmms-eval makes all file locks of its process reentrant for good; other tests need them as they are."""
    filelock_api = pytest.importorskip("filelock._api")
    call = filelock_api.FileLockMeta.__call__
    yield
    filelock_api.FileLockMeta.__call__ = call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and twelve questions about four images, for lmms-eval and for us."""
    folder = tmp_path_factory.mktemp("lmms")
    language = tiny.write_language_model(folder / "language", tie_word_embeddings=False)
    model, processor = compose(str(tiny.write_clip(folder / "clip")), str(language), template="v1")
    with torch.no_grad():  # random, but decided, and the images heard
        model.lm_head.weight.mul_(20)
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(8)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    records = []
    for number, question in enumerate(QUESTIONS):
        colour = list(COLOURS)[number // 3]
        Image.new("RGB", (30, 20), COLOURS[colour]).save(folder / f"{colour}.png")
        record = {"question_id": str(number), "question": question, "image": f"{colour}.png", "answer": colour}
        records.append({**record, "path": str(folder / f"{colour}.png")})
    (folder / "ours.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in r.items() if k != "path"}) + "\n" for r in records)
    )
    (folder / "theirs.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "functions.py").write_text(FUNCTIONS)
    paths = {"data": folder / "theirs.json", "cache": folder / "cache"}
    (tasks / "ours.yaml").write_text(TASK.format(**paths))
    (tasks / "choices.yaml").write_text(CHOICE_TASK.format(**paths, options=json.dumps(list(COLOURS))))
    columns = ("index", "question", *"ABCD", "answer", "image_path")
    rows = [
        (r["question_id"], r["question"], *COLOURS, "ABCD"[list(COLOURS).index(r["answer"])], r["image"])
        for r in records
    ]
    (folder / "choices.tsv").write_text("".join("\t".join(row) + "\n" for row in (columns, *rows)))
    return folder


@pytest.fixture(scope="module")
def manifest() -> Any:
    """As the entry point that pyproject.toml declares gives it, registered as lmms-eval registers what is installed."""
    pytest.importorskip("lmms_eval.evaluator", reason="not installed: see tests/integrations/lmms-eval.txt")
    from lmms_eval.models import MODEL_REGISTRY_V2

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    group = declared["project"]["entry-points"]["lmms_eval.models"]
    (found,) = [EntryPoint(name, value, "lmms_eval.models").load()() for name, value in group.items()]
    MODEL_REGISTRY_V2.register_manifest(found, overwrite=True)
    return found


def run(folder: Path, task: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return simple_evaluate(
        model="llava_npu",
        model_args=f"pretrained={folder / 'model'},dtype=float32",
        tasks=[task],
        batch_size=5,
        device="cpu",
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        # What its command line would have given; it reads some of it unasked.
        cli_args=SimpleNamespace(output_path=None, process_with_media=False),
        **more,
    )


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_answers_are_ours(
    folder: Path, manifest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simple: bool
) -> None:
    results = run(folder, "ours", monkeypatch, force_simple=simple)
    theirs = {sample["doc"]["question_id"]: sample["filtered_resps"][0] for sample in results["samples"]["ours"]}
    loaded = load(folder / "model", "cpu")
    answerer = build_answerer("generate", loaded, max_new_tokens=6)
    report = evaluate("vqa_jsonl", folder / "ours.jsonl", answerer, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert theirs == {line["id"]: line["answer"] for line in lines}
    assert len(set(theirs.values())) > 1
    assert report.num_questions == len(QUESTIONS)


def test_choices_are_ours(folder: Path, manifest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that compares likelihoods, through lmms-eval's own evaluator."""
    results = run(folder, "choices", monkeypatch, force_simple=True)  # its messages are for generation alone
    loaded = load(folder / "model", "cpu")
    answerer = build_answerer("likelihood", loaded, max_new_tokens=1)
    report = evaluate("multiple_choice", folder / "choices.tsv", answerer, tmp_path / "out")
    assert results["results"]["choices"]["acc,none"] == pytest.approx(report.overall("vanilla").value)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    ours = {line["id"]: line["scores"] for line in lines}
    for sample in results["samples"]["choices"]:
        losses = [loss for loss, _ in sample["filtered_resps"]]
        scores = ours[sample["doc"]["question_id"]]
        assert losses == pytest.approx([-scores[letter] for letter in "ABCD"], abs=1e-3)
    assert len({round(score, 4) for scores in ours.values() for score in scores.values()}) > 4  # images are heard


def test_loss_of_continuations(folder: Path, manifest: Any) -> None:
    from llava_npu.integrations.lmms_eval.model import LlavaNpu

    lm = LlavaNpu(str(folder / "model"), device="cpu", batch_size=3, dtype="float32")
    picture = Image.new("RGB", (30, 20), COLOURS["green"])
    lm.task_dict = {"t": {"test": [{"image": picture}]}}
    requests = [
        SimpleNamespace(args=("What is it?", f" {option}", lambda doc: [doc["image"]], 0, "t", "test"))
        for option in COLOURS
    ]
    found = lm.loglikelihood(requests)
    for option, (loss, is_greedy) in zip(COLOURS, found, strict=True):
        # Reference: transformers' own loss, from pixels, one option at a time.
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": option}]
        encoded = encode_conversation(turns, lm.processor.tokenizer, lm.processor.template)
        expanded = expand_images(encoded, [lm.processor.num_image_tokens], lm.processor.image_token_id)
        labels = torch.tensor([expanded.labels])
        with torch.no_grad():
            output = lm.model(
                input_ids=torch.tensor([expanded.input_ids]),
                pixel_values=lm.processor.preprocess_images([picture]),
                labels=labels,
            )
        assert loss == pytest.approx(output.loss.item(), abs=1e-3)
        supervised = labels[:, 1:] != -100
        assert is_greedy == bool((output.logits[:, :-1].argmax(-1) == labels[:, 1:])[supervised].all())


def test_what_cannot_be_answered_is_said(folder: Path, manifest: Any) -> None:
    from llava_npu.integrations.lmms_eval.model import LlavaNpu, LlavaNpuChat

    with pytest.raises(UserError, match="batch_size 'auto': a whole number"):
        LlavaNpu(str(folder / "model"), device="cpu", batch_size="auto")
    with pytest.raises(UserError, match="dtype 'float8'"):
        LlavaNpu(str(folder / "model"), device="cpu", dtype="float8")
    model = LlavaNpuChat(str(folder / "model"), device="cpu")
    model.task_dict = {"t": {"test": [{}]}}

    def request(*messages: dict[str, Any]) -> Any:
        return SimpleNamespace(args=("", lambda doc: list(messages), {"max_new_tokens": 2}, 0, "t", "test"))

    video = {"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}
    with pytest.raises(UserError, match="task t: a message holds video; llava_npu takes texts and images"):
        model.generate_until([request(video)])
    answered = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    with pytest.raises(UserError, match="messages of user, assistant"):
        model.generate_until([request(video, answered)])
    with pytest.raises(UserError, match="one round at a time"):
        model.generate_until_multi_round([])
    text = {"role": "user", "content": [{"type": "text", "text": "What <image> is it?"}]}
    (answer,) = model.generate_until([request(text)])
    assert isinstance(answer, str)
