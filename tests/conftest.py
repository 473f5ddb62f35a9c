"""One pytest process is one machine: by default a machine with a CPU (and a CUDA GPU, if there is one); with
`--simulated-npu` a machine with an Ascend NPU, simulated (see simulated-npu/README.md).

A test that takes the fixture `device` runs once per device of the machine: on `cpu` (and `cuda`) in the first run, on
`npu` in the second. The second run consists of those tests and of tests/simulated_npu; everything else has nothing to
say about an NPU and runs in the first only. `make test` does both.

Why not one process: importing torch_npu, real or simulated, changes what torch, transformers and accelerate do by
default (accelerate.Accelerator() takes the NPU), so every CPU test after it would be another test.
"""

from __future__ import annotations

import atexit
import os
import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from llava_npu.models.loaded import LoadedModel

# The examples are the same in every run, so that a change is judged by what it changed; and how long they take says
# nothing on a machine that does other work. `--hypothesis-profile explore` looks for new ones.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", settings.get_profile("explore"), derandomize=True)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent
SIMULATED_NPU = ROOT / "simulated-npu"
SIMULATED_TESTS = ROOT / "tests" / "simulated_npu"
PRODUCT = ROOT / "src" / "llava_npu"


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption(
        "--simulated-npu",
        action="store_true",
        help="run the tests that take `device` on the simulated NPU, and the tests of the simulated NPU itself",
    )
    parser.addoption(
        "--exhaustive", action="store_true", help="also run the tests marked `exhaustive`, and all cases of the others"
    )
    # Now, not in pytest_configure: by then conftest.py files of subfolders have imported transformers, which looks for
    # torch_npu once and remembers. Options are not parsed yet.
    config = pluginmanager.get_plugin("pytestconfig")
    assert config is not None
    options = [*config.invocation_params.args, *shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))]
    if "--simulated-npu" in options:
        _plug_in_simulated_npu()


def _plug_in_simulated_npu() -> None:
    """Puts the stand-in torch_npu on the path of this process and of every process that a test starts."""
    if "SIMULATED_NPU_RECORD_DIR" not in os.environ:  # parallel workers inherit it: all record in one folder
        inherited = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(SIMULATED_NPU), *([inherited] if inherited else [])])
        os.environ["SIMULATED_NPU_COUNT"] = "2"
        os.environ["SIMULATED_NPU_TRIPWIRE"] = str(PRODUCT)
        os.environ["SIMULATED_NPU_RECORD_DIR"] = tempfile.mkdtemp(prefix="fused-calls-")
        atexit.register(shutil.rmtree, os.environ["SIMULATED_NPU_RECORD_DIR"], ignore_errors=True)
    sys.path.insert(0, str(SIMULATED_NPU))
    try:
        import torch_npu  # noqa: F401
    except ImportError as error:  # no compiler, for one: the message says what to install
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("--simulated-npu"):
        import torch_npu

        return f"device: {torch_npu.npu.get_device_name()}, {torch_npu.npu.device_count()} of them"
    return "device: this machine's; `pytest --simulated-npu` runs the tests for NPUs"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not config.getoption("--simulated-npu") and collection_path.is_relative_to(SIMULATED_TESTS):
        return True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Files with slow tests come first, so that no process is left with one of them at the end.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not config.getoption("--exhaustive"):
        _keep(config, items, [item for item in items if not item.get_closest_marker("exhaustive")])
    if not config.getoption("--simulated-npu"):
        return
    kept = [
        item
        for item in items
        if "device" in getattr(item, "fixturenames", ()) or item.path.is_relative_to(SIMULATED_TESTS)
    ]
    _keep(config, items, kept)


def _keep(config: pytest.Config, items: list[pytest.Item], kept: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", _device_types(metafunc.config), indirect=True)


def _device_types(config: pytest.Config) -> list[str]:
    if config.getoption("--simulated-npu"):
        return ["npu"]
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """A torch device of this machine: cpu, cuda or npu. The test runs once on each."""
    import torch

    return torch.device(request.param)


@pytest.fixture(scope="session")
def exhaustive(request: pytest.FixtureRequest) -> bool:
    """Whether every case is wanted, not only those that differ most."""
    return bool(request.config.getoption("--exhaustive"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, to be read only. Its weights are large enough that every question has another answer."""
    from llava_npu.models import compose
    from support import tiny

    folder = tmp_path_factory.mktemp("parts") / "serving"
    words = tiny.write_language_model(folder / "lm", tie_word_embeddings=False, initializer_range=0.3)
    model, processor = compose(str(tiny.write_clip(folder / "clip")), str(words))
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedModel:
    """The tiny model, on the CPU."""
    from llava_npu.models import load

    return load(model_folder, "cpu")


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Small images of one colour each."""
    from PIL import Image

    from support import tiny

    return [Image.new("RGB", (30, 20), colour) for colour in tiny.COLOURS.values()]


@pytest.fixture(autouse=True)
def _drawn_alike() -> None:
    """What a test draws does not depend on the tests before it, nor on the day."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _no_cuda_on_the_simulated_npu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test in which product code called CUDA, even where something swallowed the error."""
    if not request.config.getoption("--simulated-npu"):
        yield
        return
    from torch_npu.simulation import tripwire

    tripwire.touched.clear()
    yield
    touched, tripwire.touched = tripwire.touched, []
    assert not touched, "\n".join(touched)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--simulated-npu") and (verdict := config.stash.get(_VERDICT, None)):
        terminalreporter.section("fused calls against the real torch-npu")
        terminalreporter.line(verdict)


_VERDICT = pytest.StashKey[str]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """When all workers are done, binds every fused call of the run to the schemas of the real torch-npu wheels."""
    config = session.config
    if not config.getoption("--simulated-npu") or hasattr(config, "workerinput"):
        return
    from torch_npu.simulation import contract, recording

    recorded = Path(os.environ["SIMULATED_NPU_RECORD_DIR"])
    problems = contract.check_recorded_calls(recorded)
    count = len(recording.read(recorded))
    fine = (
        f"{count} distinct calls, all bind in {len(contract.releases())} releases"
        if count
        else "the product made no fused call in this run"
    )
    config.stash[_VERDICT] = "\n".join(problems) or fine
    if problems and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
