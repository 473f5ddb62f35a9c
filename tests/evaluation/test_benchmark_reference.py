"""What people read about the benchmarks is made from their registrations; where data is found; known checksums."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import available
from llava_npu.evaluation.formats.datasets import checksum_note, md5_of
from llava_npu.evaluation.formats.locating import find_data
from llava_npu.evaluation.reports.reference import facts, reference
from llava_npu.evaluation.run import evaluate
from support.evaluation_samples import FakeAnswerer, circular_rows, knows, write_tsv

DOCS = Path(__file__).parents[2] / "docs"

WANTED = (
    *("ai2d", "blink", "chair", "chartqa", "cvbench", "docvqa", "gqa", "hallusionbench", "infovqa", "llavabench"),
    *("mathvista", "mmbench", "mmbench_cn", "mmbench_cn_test", "mmbench_test", "mme", "mmmu", "mmstar", "mmvet"),
    *("multiple_choice", "ocrbench", "pope", "qbench", "qbench_cn", "realworldqa", "refcoco", "refcoco_plus"),
    *("refcocog", "scienceqa", "scienceqa_img", "seedbench", "textvqa", "vizwiz", "vqa_jsonl", "vqav2"),
)


def test_all_benchmarks_are_there() -> None:
    assert tuple(available()) == WANTED


def test_the_page_is_what_the_registrations_say() -> None:
    assert (DOCS / "evaluation.md").read_text(encoding="utf-8") == reference() + "\n", "run `make docs`"


@pytest.mark.parametrize("name", WANTED)
def test_every_fact_is_given(name: str) -> None:
    benchmark = available()[name]
    assert all(text.strip() for _, text in facts(benchmark))
    assert benchmark.rules
    assert dict(facts(benchmark))["prompt"].endswith(f"greedy, at most {benchmark.max_new_tokens} new tokens")
    assert all(len(md5) == 32 and set(md5) <= set("0123456789abcdef") for md5 in benchmark.checksums.values())


def test_data_in_a_folder(tmp_path: Path) -> None:
    patterns = ("pope/questions.jsonl", "questions.jsonl", "POPE*.tsv")
    with pytest.raises(UserError, match=r"holds no file for pope. Looked for: pope/questions\.jsonl"):
        find_data("pope", patterns, tmp_path)
    (tmp_path / "POPE.tsv").touch()
    assert find_data("pope", patterns, tmp_path) == tmp_path / "POPE.tsv"
    (tmp_path / "POPE_old.tsv").touch()
    with pytest.raises(UserError, match=r"several files for pope: POPE\.tsv, POPE_old\.tsv"):
        find_data("pope", patterns, tmp_path)
    (tmp_path / "questions.jsonl").touch()
    assert find_data("pope", patterns, tmp_path) == tmp_path / "questions.jsonl"
    with pytest.raises(UserError, match="multiple_choice reads a file of your own: name it"):
        find_data("multiple_choice", (), tmp_path)


def test_checksums(tmp_path: Path) -> None:
    path = tmp_path / "X.tsv"
    path.write_bytes(b"abc")
    md5 = md5_of(path)
    assert md5 == "900150983cd24fb0d6963f7d28e17f72"  # RFC 1321
    assert checksum_note(path, md5, {"Y.tsv": md5}) == f"Data: the published Y.tsv (MD5 {md5})."
    assert "not 0000 as published. It was changed" in checksum_note(path, md5, {"X.tsv": "0000"})
    assert "none of the published files (Y.tsv)" in checksum_note(path, md5, {"Y.tsv": "0000"})


def test_a_run_reports_the_checksum(tmp_path: Path) -> None:
    data = write_tsv(tmp_path / "MMBench_DEV_EN.tsv", circular_rows(groups=1))
    report = evaluate("mmbench", tmp_path, FakeAnswerer(knows), tmp_path / "out")
    assert f"MMBench_DEV_EN.tsv has the MD5 {md5_of(data)}, not b6caf1133a01c6bb705cf753bb527ed8" in " ".join(
        report.notes
    )
    assert Path(report.data) == data
