"""Training records, images and evaluation files, broken as text, as bytes or as values."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from llava_npu.data.conversation.labels import IGNORE_INDEX, encode_conversation
from llava_npu.data.formats.archives import open_archive
from llava_npu.data.formats.parsing import Record
from llava_npu.data.images import image_size, load_image
from llava_npu.data.records import open_records
from llava_npu.data.tools.check import CheckOptions, check_records
from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.formats.datasets import read_dataset
from llava_npu.evaluation.run import evaluate
from llava_npu.evaluation.stored_answers import StoredAnswers
from mutations import Case, WrongError, break_file, broken_bytes, broken_json
from support import benchmark_samples as samples
from support import tiny
from support.evaluation_samples import FakeAnswerer, always_a, circular_rows, write_tsv


class Records:
    """Records in every form that is read. What is accepted shows all words and images, and learns every answer."""

    def make(self, folder: Path) -> None:
        tiny.write_records(folder, 3)
        self.tokenizer = tiny.tokenizer()
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})

    def case(self, rng: random.Random, material: Path, folder: Path) -> Case:
        shutil.copytree(material / "images", folder / "images")
        form, records = rng.choice(_forms())
        if rng.random() < 0.8:
            records, done = broken_json(rng, records)
            for _ in range(rng.randrange(2)):
                records, more = broken_json(rng, records)
                done = f"{done}, {more}"
            lines = form == "lines" and isinstance(records, list)
            path = folder / ("train.jsonl" if lines else "train.json")
            path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records), encoding="utf-8")
        else:
            path = folder / "train.json"
            data, done = broken_bytes(rng, json.dumps(records, indent=1).encode())
            path.write_bytes(data)
        return Case(f"{form}, {done}", lambda: self._use(path), (path.name,))

    def _use(self, path: Path) -> str:
        records = open_records(path)
        report = check_records([records], CheckOptions(template="v1"))
        entries = [entry for _, entry in (records.entries[index] for index in range(len(records)))]
        for entry, record in zip(entries, records, strict=True):
            self._check(entry, record)
        if report.num_bad:
            raise WrongError(f"training takes what `data check` finds bad: {report.findings}")
        return "learned"

    def _check(self, entry: Any, record: Record) -> None:
        encoded = encode_conversation(record.conversations, self.tokenizer, "v1", record=record)
        for image in record.image_paths:
            load_image(image, record.name)
        shown = self.tokenizer.decode([token for token in encoded.input_ids if token >= 0])
        learned = self.tokenizer.decode(
            [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORE_INDEX]
        )
        turns = entry.get("conversations") or entry.get("messages") or [{}]
        opens_with_answer = isinstance(turns, list) and next(iter(turns[0].values()), "") in ("gpt", "assistant")
        for words in _words(turns[1:] if opens_with_answer else entry):  # LLaVA drops an answer that opens
            if words not in shown and words.strip() not in shown:
                raise WrongError(f"{words!r} is in the record and not in {shown!r}")
        heard = record.conversations[1:] if opens_with_answer else record.conversations
        answers = [turn.text.strip() for turn in heard if turn.role == "gpt" and turn.supervised]
        if not all(answer in learned for answer in answers):
            raise WrongError(f"of {answers} is learned {learned!r}")
        named = sum(str(text).endswith(".png") for text in _texts(entry))
        if named != len(record.images):
            raise WrongError(f"{named} images are named, {len(record.images)} shown")


def _forms() -> list[tuple[str, Any]]:
    """Each form with two records, of which one has an image."""
    mark, says = "<image>\nWhat is it?", "a red square"
    image = {"image": "images/0.png"}
    plain = [("What is two?", "Two."), ("And three?", "Three.")]
    llava = [
        {"id": "a", **image, "conversations": _turns([(mark, says)], "from", "value", "human", "gpt")},
        {"id": "b", "conversations": _turns(plain, "from", "value", "human", "gpt")},
    ]
    messages = [
        {"id": "a", "images": ["images/0.png"], "messages": _turns([(mark, says)], "role", "content")},
        {"id": "b", "messages": _turns(plain, "role", "content")},
    ]
    parts = [{"type": "image", "path": "images/0.png"}, {"type": "text", "text": "What is it?"}]
    in_parts = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": says}]}]
    pairs = [
        {"texts": [{"user": "What is it?", "assistant": says}], "images": ["images/0.png"]},
        {"texts": [{"user": question, "assistant": answer} for question, answer in plain], "images": []},
    ]
    return [
        ("llava", llava),
        ("lines", llava),
        ("messages", messages),
        ("parts", [{"id": "a", "messages": in_parts}]),
        ("pairs", pairs),
    ]


def _turns(
    rounds: list[tuple[str, str]], role: str, text: str, user: str = "user", model: str = "assistant"
) -> list[dict[str, str]]:
    return [{role: name, text: words} for pair in rounds for name, words in zip((user, model), pair, strict=True)]


def _texts(value: Any, key: str = "") -> Iterator[Any]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
    else:
        yield value


def _words(entry: Any) -> list[str]:
    """The sentences of our own that a record still has, wherever they stand now."""
    known = ("What is it?", "a red square", "What is two?", "Two.", "And three?", "Three.")
    return [words for text in _texts(entry) if isinstance(text, str) for words in known if words in text]


class Images:
    """Images of every format: what opens has the size that was announced, whole archives too."""

    formats = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA")

    def make(self, folder: Path) -> None:
        with Image.new("RGB", (24, 16), (200, 30, 30)) as image:
            for name in self.formats:
                image.save(folder / f"image.{name.lower()}", format=name)
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(folder / "turned.jpeg", exif=exif)
            image.save(folder / "turned.png", exif=exif)
            image.convert("P").save(folder / "palette.png", transparency=0)
            image.convert("L").save(folder / "grey.png")
        shutil.make_archive(str(folder / "images"), "zip", folder)
        shutil.make_archive(str(folder / "images"), "tar", folder)

    def case(self, rng: random.Random, material: Path, folder: Path) -> Case:
        source = rng.choice(sorted(material.iterdir()))
        path = folder / source.name
        data, done = broken_bytes(rng, source.read_bytes())
        path.write_bytes(data)
        use = self._archive if path.suffix in (".zip", ".tar") else self._image
        return Case(f"{source.name} {done}", lambda: use(path), (path.name,))

    def _image(self, path: Path) -> str:
        image = load_image(path, "record 1")
        try:
            announced = image_size(path, "record 1")
        except UserError as error:
            raise WrongError(f"it opens, but its size is not announced: {error}") from error
        if announced != (image.height, image.width) or image.mode != "RGB":
            raise WrongError(f"announced {announced}, loaded {image.size} {image.mode}")
        return "opened"

    def _archive(self, path: Path) -> str:
        archive = open_archive(path)
        for name in ("image.png", "turned.jpeg"):
            load_image(archive.locate(name, str(path)), str(path))
        return "opened"


class EvaluationFiles:
    """Benchmarks' files, and files of answers: what is read is scored, and nothing is scored by chance."""

    benchmarks: ClassVar[dict[str, Callable[[Path], Path]]] = {
        "mmbench": lambda folder: write_tsv(folder / "bench.tsv", circular_rows(groups=2)),
        "pope": lambda folder: samples.pope(folder, [["yes", "no"], ["no"], ["yes"]]),
        "mme": lambda folder: samples.mme(folder, {"count": 1, "artwork": 1}),
        "scienceqa": lambda folder: samples.scienceqa(folder, [True, False]),
        "textvqa": samples.textvqa,
        "gqa": samples.gqa,
        "seedbench": samples.seedbench,
        "qbench": samples.qbench,
        "mmvet": samples.mmvet,
        "vizwiz": samples.vizwiz,
    }

    def make(self, folder: Path) -> None:
        for name, write in self.benchmarks.items():
            (folder / name).mkdir()
            data = write(folder / name)
            (folder / name / "data").write_text(str(data.relative_to(folder / name)))
            questions = read_dataset(get(name), data).questions
            lines = [{"question_id": each.id, "prompt": each.prompt, "text": "A"} for each in questions]
            samples.write_jsonl(folder / name / "answers.jsonl", lines)

    def case(self, rng: random.Random, material: Path, folder: Path) -> Case:
        name = rng.choice(sorted(self.benchmarks))
        place = folder / name
        shutil.copytree(material / name, place)
        data = place / (place / "data").read_text()
        answers = place / "answers.jsonl"
        files = [path for path in sorted(place.rglob("*")) if path.is_file() and path.name != "data"]
        path = rng.choice([data, data, answers, rng.choice(files)])
        done = _break_a_line(rng, path) if rng.random() < 0.7 else break_file(rng, path)
        if path == answers:
            return Case(f"{name}, {done}", lambda: self._stored(name, data, answers), (path.name,))
        return Case(f"{name}, {done}", lambda: self._score(name, data, folder / "out"), (name, path.name))

    def _stored(self, name: str, data: Path, answers: Path) -> str:
        questions = read_dataset(get(name), data).questions
        given = StoredAnswers(answers, questions).answer(questions)
        return "matched" if len(given) == len(questions) else "fault"

    def _score(self, name: str, data: Path, output: Path) -> str:
        report = evaluate(name, data, FakeAnswerer(always_a), output)
        if not all(0 <= score.value <= 1 for score in report.scores if score.value is not None):
            raise WrongError(f"scores {report.scores}")
        return "scored"


def _break_a_line(rng: random.Random, path: Path) -> str:
    """Breaks a value of one record of a file of lines, or of one cell of a table."""
    if path.suffix == ".tsv":
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        row = rng.choice(rows)
        place = rng.randrange(len(row))
        row[place] = rng.choice(["", " ", "nan", "A", "B", "Z", "1e9", '"', "<image>", "\x00", "\ud83d", "1", "x" * 99])
        text = "\n".join("\t".join(row) for row in rows) + "\n"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return f"{path.name}: cell {place} is {ascii(row[place])[:40]}"
    try:
        values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError:
        return break_file(rng, path)
    values, done = broken_json(rng, values)
    lines = values if isinstance(values, list) else [values]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return f"{path.name}: {done}"
