"""Held-out concepts and the questions about them: nothing seen in training, nothing to guess from."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from demo.concepts import family, names_any, nouns, single_noun
from demo.conversations import conversation_records
from demo.data import Sizes, build_data
from demo.pictures import Picture, load_square
from demo.questions import CONCEPTS, concept_questions, shape_questions, write_benchmark
from demo.shapes import COLOURS, KINDS, Shape
from demo.split import hold_out
from llava_npu.data.records import load_records
from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.extraction.choices import ENGLISH

NOUNS = [
    "zebra",
    "hen",
    "rooster",
    "horse",
    "seahorse",
    "lemon",
    "lime",
    "trumpet",
    "violin",
    "camera",
    "apple",
    "pear",
    "tiger",
    "owl",
    "bread",
    "banana",
    "hammer",
    "wrench",
    "rocket",
    "castle",
    "igloo",
    "candle",
    "teapot",
    "spoon",
]
CAPTIONS = [*(f"a {noun}" for noun in NOUNS), "a red apple", "an apple core", "two zebras", "a horse's head"]
PICTURES = [Picture(f"stamps/{n}", Path(f"{n}.png"), caption, "things", "stamps") for n, caption in enumerate(CAPTIONS)]


@given(count=st.integers(1, 12), seed=st.integers(0, 50))
@settings(max_examples=60)
def test_no_training_caption_names_a_held_out_concept_or_its_like(count, seed):
    split = hold_out(PICTURES, count, seed)
    assert len(split.held_out) == count
    for held in split.held_out:
        noun = single_noun(held.picture.caption)
        assert noun is not None
        assert not [each.caption for each in split.train if names_any(each.caption, family(noun))]
        others = [other for other in split.held_out if other is not held]
        assert not [other.caption for other in others if names_any(other.caption, family(noun))]


def test_split_depends_on_the_seed_alone():
    assert hold_out(PICTURES, 8, 3) == hold_out(PICTURES, 8, 3)
    assert hold_out(PICTURES, 8, 3) != hold_out(PICTURES, 8, 4)


def test_too_few_concepts_is_an_error():
    with pytest.raises(UserError, match=r"only .* concepts can be held out"):
        hold_out(PICTURES, 100, 0)


@given(count=st.integers(4, 16), seed=st.integers(0, 50))
@settings(max_examples=40)
def test_no_concept_and_no_letter_is_right_more_often_than_another(count, seed):
    held_out = hold_out(PICTURES, count, seed).held_out
    questions = concept_questions(held_out, {held.picture.key: held.picture.path for held in held_out}, seed)
    right = Counter(question.options[question.right] for question in questions)
    shown = Counter(option for question in questions for option in question.options)
    assert set(right.values()) == {1}
    assert set(shown.values()) == {4}  # once right, three times wrong: no prior over concepts helps
    assert all(len(set(question.options)) == 4 for question in questions)
    letters = Counter(question.letter for question in questions)
    assert max(letters.values()) - min(letters[letter] for letter in "ABCD") <= 1


def _shape(number: int, colour: str, kind: str) -> Shape:
    questions = (("what color is the shape?", colour), ("what shape is in the image?", kind), ("is it red?", "no"))
    return Shape(f"shapes/test/{number}", Path(f"{number}.png"), questions)


SHAPES = [_shape(n, COLOURS[n % 8], KINDS[n % 3]) for n in range(60)]


def test_shape_questions_spread_over_the_answers():
    questions = shape_questions(SHAPES, {shape.key: shape.path for shape in SHAPES}, 24, 0)
    assert len(questions) == 48
    answers = Counter(question.options[question.right] for question in questions)
    assert all(answers[colour] == 3 for colour in COLOURS)
    assert all(answers[kind] == 8 for kind in KINDS)


def test_written_benchmark_is_read_with_all_rotations(tmp_path):
    held_out = hold_out(PICTURES, 6, 0).held_out
    images = {}
    for held in held_out:
        images[held.picture.key] = tmp_path / f"{held.name}.png"
        Image.new("RGB", (8, 8), "red").save(images[held.picture.key])
    questions = concept_questions(held_out, images, 0)
    write_benchmark(tmp_path / "benchmark.tsv", questions, rotations=True)
    dataset = get("mmbench").read(tmp_path / "benchmark.tsv")
    assert not dataset.notes
    assert len(dataset.questions) == 4 * len(questions)
    for read in dataset.questions:
        asked = questions[int(read.group)]
        assert read.options[read.answer] == asked.options[asked.right]
        assert read.images[0].open().size == (8, 8)
        assert read.l2_category == CONCEPTS
    assert {read.answer for read in dataset.questions if read.group == "0"} == set("ABCD")


PATHS = {each.key: Path("images") / f"{each.key}.png" for each in (*PICTURES, *SHAPES)}


def test_conversations_by_letter_ask_in_the_benchmarks_form_and_answer_rightly():
    by_key = {each.key: each for each in PICTURES}
    records = conversation_records(PICTURES, SHAPES, PATHS, 60, by_letter=True, seed=0)
    num_choices = 0
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"][:2])
        options = {line[0]: line[3:] for line in question.splitlines() if line[1:3] == ". "}
        if not options:
            continue
        num_choices += 1
        assert question.endswith(ENGLISH)
        assert len(record["conversations"]) == 2
        key = record["id"].split("#")[0]
        if key in by_key:
            assert len(set(options.values())) == 4
            assert options[answer] == by_key[key].caption
            nouns_shown = [noun for option in options.values() for noun in nouns(option)]
            assert len(nouns_shown) == len(set(nouns_shown))  # "an apple core" is no wrong answer for "a red apple"
    assert num_choices == 30


def test_conversations_without_letters_ask_for_captions_and_shapes():
    by_key = {each.key: each for each in [*PICTURES, *SHAPES]}
    records = conversation_records(PICTURES, SHAPES, PATHS, 60, by_letter=False, seed=0)
    about_shapes = 0
    for record in records:
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        about = by_key[record["id"].split("#")[0]]
        if isinstance(about, Shape):
            about_shapes += 1
            assert {answers[0], answers[1]} == {about.answer_among(COLOURS), about.answer_among(KINDS)}
            assert answers[2:] == ["no"]
        else:
            assert answers == [about.caption]
    assert about_shapes == 20


@pytest.fixture
def files(tmp_path):
    """Pictures and shapes that exist."""
    folder = tmp_path / "source"
    folder.mkdir()
    pictures = [Picture(each.key, folder / each.path, each.caption, each.topic, each.source) for each in PICTURES]
    shapes = [Shape(each.key, folder / f"shape{each.path}", each.questions) for each in SHAPES]
    for number, each in enumerate([*pictures, *shapes]):
        Image.new("RGB", (20, 10), (number * 2, 100, 50)).save(each.path)
    return pictures, shapes


SIZES = Sizes(held_out=6, train_pictures=8, train_shapes=5, shape_questions=6, conversations=16)


def test_data_folder_is_what_the_toolkit_reads_and_the_same_each_time(files, tmp_path):
    pictures, shapes = files
    first, second = (build_data(tmp_path / name, pictures, shapes[:5], shapes[5:], SIZES, 1) for name in ("one", "two"))
    for path in sorted(first.folder.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (second.folder / path.relative_to(first.folder)).read_bytes()
    for file in (first.align, first.finetune, first.held_out_captions):
        for record in load_records(file):
            assert all(path.is_file() for path in record.image_paths)
    held_out = json.loads(first.split.read_text())["held_out"]
    text = first.align.read_text() + first.finetune.read_text()
    assert not [name for name in held_out if f"a {name}" in text or f"an {name}" in text]
    assert len(get("mmbench").read(first.unrotated).questions) == 6 + 12


def test_pictures_are_prepared_on_white(tmp_path):
    image = Image.new("RGBA", (30, 10), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (10, 0, 20, 10))
    image.save(tmp_path / "x.png")
    square = load_square(tmp_path / "x.png", 64)
    assert square.size == (64, 64)
    assert square.getpixel((0, 0)) == (255, 255, 255)
    assert square.getpixel((32, 32)) == (0, 0, 255)  # transparent borders are cut off, the rest fills the square
    assert square.getpixel((6, 32)) == (0, 0, 255)


def test_a_picture_bomb_is_refused(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="more than the demo opens"):
        load_square(tmp_path / "bomb.png", 64)
