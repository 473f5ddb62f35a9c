"""Reading MMBench-form files: prompts, images, and one clear error for each defect."""

from __future__ import annotations

import base64
import csv
from pathlib import Path

import pytest

from llava_npu.data.image_sources import UnreadableImageError
from llava_npu.errors import UserError
from llava_npu.evaluation import benchmarks
from llava_npu.evaluation.questions import Dataset
from support.evaluation_samples import COLUMNS, circular_rows, encoded_image, plain_image, question_row, write_tsv


def read(path: Path, name: str = "mmbench") -> Dataset:
    return benchmarks.get(name).read(path)


def test_prompt_is_that_of_llava(tmp_path: Path) -> None:
    # Reference: LLaVA's model_vqa_mmbench.py and VLMEvalKit's vlmeval/vlm/llava/llava.py.
    row = question_row(7, ["cat", "dog"], 1, hint="Look closely. ")
    (question,) = read(write_tsv(tmp_path / "a.tsv", [row])).questions
    assert question.prompt == (
        "Look closely. \nWhat is in image 7?\nA. cat\nB. dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert question.text == "Look closely. \nWhat is in image 7?"
    (chinese,) = read(tmp_path / "a.tsv", "mmbench_cn").questions
    assert chinese.prompt.endswith("\nB. dog\n请直接回答选项字母。")


@pytest.mark.parametrize("hint", ["", "nan", "none", "None"])
def test_absent_hint_leaves_no_line(tmp_path: Path, hint: str) -> None:
    (question,) = read(write_tsv(tmp_path / "a.tsv", [question_row(1, ["cat", "dog"], 0, hint=hint)])).questions
    assert question.prompt.startswith("What is in image 1?\nA. cat")


def test_option_none_is_an_option(tmp_path: Path) -> None:
    rows = [
        question_row(1, ["None", "dog", "nan"], 0),
        question_row(2, ["cat", "N/A"], 0),
        question_row(3, ["a", "b"], 0),
    ]
    dataset = read(write_tsv(tmp_path / "a.tsv", rows))
    assert dataset.questions[0].options == {"A": "None", "B": "dog"}
    assert "2 rows have an option like “None” or “NA” (first: 1)." in dataset.notes[0]


def test_rotations_form_groups_and_share_the_image_by_reference(tmp_path: Path) -> None:
    dataset = read(write_tsv(tmp_path / "a.tsv", circular_rows(groups=3)))
    assert [(question.group, question.rotation) for question in dataset.questions[:5]] == [
        ("1", 0), ("1", 1), ("1", 2), ("1", 3), ("2", 0)
    ]  # fmt: skip
    assert dataset.questions[0].images == dataset.questions[3].images
    assert dataset.questions[0].images != dataset.questions[4].images
    assert dataset.questions[3].images[0].open().size == (24, 24)
    assert dataset.notes == ()


def test_equal_images_are_held_once(tmp_path: Path) -> None:
    image = encoded_image((1, 2, 3))
    rows = [question_row(group, ["cat", "dog"], 0, image=image) for group in (1, 2)]
    first, second = read(write_tsv(tmp_path / "a.tsv", rows)).questions
    assert first.images[0] is second.images[0]


def test_image_path_below_the_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    plain_image((9, 9, 9)).save(tmp_path / "images" / "a.png")
    row = question_row(1, ["cat", "dog"], 0, image="", image_path="images/a.png")
    (question,) = read(write_tsv(tmp_path / "a.tsv", [row], (*COLUMNS, "image_path"))).questions
    assert question.images[0].open().getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd"])
def test_image_path_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    row = question_row(1, ["cat", "dog"], 0, image="", image_path=name)
    with pytest.raises(UserError, match=r"row 1 \(line 2\), column 'image_path': .* leads out of"):
        read(write_tsv(tmp_path / "a.tsv", [row], (*COLUMNS, "image_path")))


def test_quoted_fields_hold_tabs_quotes_and_line_breaks(tmp_path: Path) -> None:
    hint = 'He said "go"\tand\nwent.'
    (question,) = read(write_tsv(tmp_path / "a.tsv", [question_row(1, ["cat", "dog"], 0, hint=hint)])).questions
    assert question.text == f"{hint}\nWhat is in image 1?"


def test_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", circular_rows(1))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(path).questions) == 4


def test_csv_field_limit_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    row = question_row(1, ["cat", "dog"], 0, image=base64.b64encode(bytes(300_000)).decode())
    assert len(read(write_tsv(tmp_path / "a.tsv", [row])).questions) == 1
    assert csv.field_size_limit() == before


def test_generic_multiple_choice_has_no_rotations(tmp_path: Path) -> None:
    dataset = read(write_tsv(tmp_path / "a.tsv", circular_rows(2)), "multiple_choice")
    assert {question.rotation for question in dataset.questions} == {0}
    assert len({question.group for question in dataset.questions}) == 8


def test_ids_of_any_form_where_there_are_no_rotations(tmp_path: Path) -> None:
    rows = [question_row(1, ["cat", "dog"], 0, index="street-1"), question_row(2, ["cat", "dog"], 0, image="street-1")]
    first, second = read(write_tsv(tmp_path / "a.tsv", rows), "multiple_choice").questions
    assert (first.id, first.group, second.id) == ("street-1", "street-1", "2")
    assert first.images == second.images
    with pytest.raises(UserError, match=r"row 1 \(line 2\), column 'index': 'street-1' is not a whole number"):
        read(tmp_path / "a.tsv")


def test_damaged_image_is_found_when_opened(tmp_path: Path) -> None:
    row = question_row(1, ["cat", "dog"], 0, image=base64.b64encode(b"no image at all" * 9).decode())
    (question,) = read(write_tsv(tmp_path / "a.tsv", [row])).questions
    with pytest.raises(UnreadableImageError, match="row 1, column 'image': image of 135 bytes: not an image"):
        question.images[0].open()


def test_truncated_image_is_found_when_opened(tmp_path: Path) -> None:
    data = base64.b64decode(encoded_image((200, 3, 99), size=200))
    row = question_row(1, ["cat", "dog"], 0, image=base64.b64encode(data[: len(data) // 2]).decode())
    (question,) = read(write_tsv(tmp_path / "a.tsv", [row])).questions
    with pytest.raises(UnreadableImageError, match="damaged or unsupported"):
        question.images[0].open()


# --- notes ------------------------------------------------------------------------------------------------------------


def test_missing_rotations_are_named(tmp_path: Path) -> None:
    rows = [row for row in circular_rows(3) if row["index"] not in (1_000_002, 2_000_003, 3_000_003)]
    (note,) = read(write_tsv(tmp_path / "a.tsv", rows)).notes
    assert note.startswith(
        "2 of 3 groups lack rotations and count as wrong in the circular score: 2 has 3 of 4; 3 has 2"
    )


def test_file_without_rotations_says_so(tmp_path: Path) -> None:
    rows = [row for row in circular_rows(3) if int(str(row["index"])) < 1_000_000]
    (note,) = read(write_tsv(tmp_path / "a.tsv", rows)).notes
    assert "no rotations" in note


def test_secret_answers_are_noted(tmp_path: Path) -> None:
    rows = [{**row, "answer": ""} for row in circular_rows(1)]
    dataset = read(write_tsv(tmp_path / "a.tsv", rows))
    assert {question.answer for question in dataset.questions} == {None}
    assert "4 of 4 rows have no answer" in dataset.notes[0]


def test_indices_that_are_no_rotations_are_noted(tmp_path: Path) -> None:
    rows = [question_row(1, ["cat", "dog"], 0), question_row(1, ["cat", "dog"], 0, 1, question="Another?")]
    assert any("different questions under one index" in note for note in read(write_tsv(tmp_path / "a", rows)).notes)


# --- defects ----------------------------------------------------------------------------------------------------------

GOOD = question_row(1, ["cat", "dog", "cow", "ant"], 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": "seven"}, r"row 2 \(line 3\), column 'index': 'seven' is not a whole number"),
        ({"index": "-1"}, r"column 'index': '-1' is not a whole number"),
        ({"index": "1.0"}, r"column 'index': '1.0' is not a whole number"),
        ({"index": 1}, r"row 2 \(line 3\), column 'index': 1 is there twice: first in row 1 \(line 2\)"),
        ({"answer": "E"}, r"column 'answer': 'E' is none of this row's options \(A, B, C, D\)"),
        ({"answer": "cow"}, r"column 'answer': 'cow' is none"),
        ({"question": " "}, "column 'question': empty"),
        ({"A": ""}, "column 'A': empty, but option B is given"),
        ({"C": ""}, "column 'C': empty, but option D is given"),
        ({"B": "", "C": "", "D": ""}, "column 'B': empty; a question needs at least"),
        ({"image": "!" * 80}, "column 'image': unreadable base64 .* it starts with '!!!"),
        ({"image": encoded_image((1, 1, 1))[:-3]}, "column 'image': unreadable base64"),
        ({"image": "99"}, "column 'image': '99' is neither an image in base64 nor the index of a row"),
        ({"image": "2"}, "column 'image': refers to row 2 .index 2., which holds no image itself"),
    ],
)
def test_defective_row(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write_tsv(tmp_path / "bench.tsv", [GOOD, {**GOOD, "index": 2, **changes}])
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_mixed_encodings(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [GOOD, {**GOOD, "index": 2, "hint": "cafe"}])
    path.write_bytes(path.read_bytes().replace(b"cafe", "café".encode("latin-1")))
    with pytest.raises(UserError, match=r"row 2 \(line 3\), column 'hint': not UTF-8. The file mixes encodings"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"index\tquestion\tA\tB\timage\n", "has a header but no rows"),
        (b"index\tquestion\tA\timage\n1\tq\ta\tx\n", "no column 'B'. Columns found: index, question, A, image"),
        (b"index\tquestio\tA\tB\timage\n1\tq\ta\tb\tx\n", "no column 'question'.* Did you mean 'questio'"),
        (b"index,question,A,B,image\n1,q,a,b,x\n", "no column 'index'.*Is it separated by tabs|Did you mean"),
        (b"index\tquestion\tA\tB\n1\tq\ta\tb\n", "no column 'image' or 'image_path'"),
        (b"index\tquestion\tA\tA\tB\timage\n1\tq\ta\tb\tx\ty\n", "column 'A' is there twice"),
        (b"index\tquestion\tA\tB\timage\n1\tq\ta\n", r"row 1 \(line 2\): 3 fields, but the header has 5 columns"),
        (b'index\tquestion\tA\tB\timage\n1\t"q\ta\tb\tx\n', "row 1 .*not a valid tab-separated row"),
        (b'index\tquestion\t"\tB\timage\n1\tq\ta\tb\tx\n', "row 1 .*not a valid tab-separated row"),
        ("index\tquestion".encode("utf-16"), "is encoded in UTF-16"),
        (b"PK\x03\x04\x00\x00", "is not a text file"),
    ],
)
def test_defective_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bench.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.tsv is not a file"):
        read(tmp_path / "nothing.tsv")


def test_unknown_benchmark_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'mmbnch' is unknown\. Did you mean 'mmbench'"):
        benchmarks.get("mmbnch")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        benchmarks.register(benchmarks.get("mmbench"))
