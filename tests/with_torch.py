"""Runs the fast tests with another torch, in an environment of its own.

    python tests/with_torch.py 2.7.1                    # this Python; CPU build from PyTorch's own index
    python3.12 tests/with_torch.py 2.14.1 --index-url https://pypi.org/simple

Prints a row for the table in docs/npu.md. Environments are kept in ~/.cache/llava-npu/environments.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = ("train", "eval", "data")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "ninja", "setuptools", "httpx", "fastapi", "uvicorn", "tensorboard")
FAST = (
    "tests/ops",
    "tests/models/projectors",
    "tests/models/test_parity.py",
    "tests/models/test_processing.py",
    "tests/inference",
    "tests/data/conversation",
    "tests/data/test_dataset.py",
    "tests/training/test_optimizer.py",
    "tests/training/test_float16.py",
    "tests/training/test_nonfinite.py",
    "tests/training/test_packed_training.py",
)
ON_THE_SIMULATED_NPU = ("tests/simulated_npu", *FAST)


def requirements() -> list[str]:
    """What the tests need besides torch, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (line for extra in EXTRAS for line in project["optional-dependencies"][extra])
    return [line for line in (*project["dependencies"], *extras, *TOOLS) if not line.startswith("torch>")]


def make_environment(folder: Path, version: str, index_url: str) -> None:
    """Creates a virtual environment with this torch and the versions of constraints.txt otherwise."""
    if (folder / "complete").exists():
        return
    venv.create(folder, with_pip=True)
    pins = re.sub(r"^torch==.*\n", "", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(f"{pins}torch=={version}\n")
        constraints.flush()
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "-c", constraints.name]
        subprocess.run([*pip, f"torch=={version}", "--extra-index-url", index_url], check=True)
        subprocess.run([*pip, *requirements()], check=True)
    (folder / "complete").touch()


def run_tests(folder: Path, *arguments: str) -> str:
    """The last line of a pytest run: how many passed, failed and were skipped."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [str(folder / "bin" / "python"), "-m", "pytest", "-q", "-m", "not network", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout.strip().splitlines()[-1])
    return ", ".join(counts) or f"pytest ended with status {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("torch", help="a version, as in 2.7.1")
    parser.add_argument("--index-url", default=CPU_INDEX, help="where torch comes from, next to PyPI")
    parser.add_argument("--environment", type=Path, help="an environment that is there already, with this torch")
    options, pytest_arguments = parser.parse_known_args()
    python = ".".join(platform.python_version_tuple()[:2])
    folder = options.environment
    if folder is None:
        folder = Path.home() / ".cache/llava-npu/environments" / f"torch-{options.torch}-python-{python}"
        make_environment(folder, options.torch, options.index_url)
    here = run_tests(folder, *FAST, *pytest_arguments)
    simulated = run_tests(folder, "--simulated-npu", *ON_THE_SIMULATED_NPU, *pytest_arguments)
    print(f"| {options.torch} | {python} | {platform.machine()} | {here} | {simulated} |")
    return int("failed" in here + simulated or "error" in here + simulated or "status" in here + simulated)


if __name__ == "__main__":
    sys.exit(main())
