"""Processes that are about to do different things end, with one error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys
from pathlib import Path
from llava_npu import devices
from llava_npu.distributed import launched, processes
from llava_npu.distributed import agreement
from llava_npu.distributed.agreement import check_agreement, check_shared
from llava_npu.errors import UserError

agreement._LAG_SECONDS = 0.0
here = Path(sys.argv[1])

def run():
    with processes.join(devices.select("cpu"), needs_group=True) as accelerator:
        check_agreement({"torch": "2.8.0", "seed": "1"}, accelerator)
        check_shared(here / "program.py", accelerator)
        rank = os.environ["RANK"]
        (here / rank).mkdir()  # each machine's own
        os.chdir(here / rank)
        if rank == "0":
            Path("run.yaml").touch()
        try:
            check_shared(Path("run.yaml"), accelerator)
            sys.exit("not shared, and went on")
        except UserError as error:
            print(error)
        except SystemExit as ended:
            assert ended.code == 2
        check_agreement({"torch": "2.8.0", "seed": os.environ["RANK"]}, accelerator)
    sys.exit("went on")

launched.reporting(run)
"""


def test_the_main_process_names_the_one_that_differs_and_all_end(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "llava_npu.distributed.launching", "2", str(program), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 2, result.stderr
    not_shared = "process 1 differs from process 0: run.yaml is not there, in process 0 0 bytes, changed at "
    assert result.stdout.startswith(not_shared)
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error == [
        "error: process 1 differs from process 0: seed is 1, in process 0 0. All processes need the same code, "
        "configuration and files: on several nodes, the same environment and a shared folder (or equal copies of it)."
    ]
