"""A few hundred broken inputs of each kind: a right result or one clear error, never a traceback or a hang."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from configurations import Configurations
from data_files import EvaluationFiles, Images, Records
from model_folders import ModelFolders

from mutations import Subject, run_cases

# Each with the number of cases that a test runs.
SUBJECTS: dict[str, tuple[Subject, int]] = {
    "records": (Records(), 150),
    "evaluation_files": (EvaluationFiles(), 100),
    "configurations": (Configurations(), 150),
    "images": (Images(), 150),
    "model_folders": (ModelFolders(), 30),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, count) in SUBJECTS.items() if count])
def test_every_case_is_right_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLAVA_NPU_MUTATIONS=N` runs N cases of each subject instead."""
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    subject, count = SUBJECTS[name]
    outcomes = run_cases(subject, range(int(os.environ.get("LLAVA_NPU_MUTATIONS", count))), tmp_path)
    print(f"{name}: {dict(outcomes.counts)}")
    assert not outcomes.faults, "\n".join(outcomes.faults)
    assert len(outcomes.counts) > 1  # both right results and errors


def main() -> None:
    """`test_mutations.py COUNT [SUBJECT …] [--from SEED]`: many cases, and what came of them."""
    arguments = sys.argv[1:]
    first = int(arguments.pop()) if "--from" in arguments else 0
    count, *names = [argument for argument in arguments if argument != "--from"]
    for name in names or SUBJECTS:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcomes = run_cases(SUBJECTS[name][0], range(first, first + int(count)), Path(folder))
        for line in (*outcomes.refusals[:: max(1, len(outcomes.refusals) // 60)], *outcomes.faults):
            print(line)
        print(f"{name}: {dict(outcomes.counts)} in {time.perf_counter() - start:.0f} s")
        print(Counter(fault.rpartition("(")[2] for fault in outcomes.faults).most_common(40))


if __name__ == "__main__":
    main()
