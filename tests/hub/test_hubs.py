"""Folders, the Hugging Face hub and ModelScope, from outside and offline; the hubs are on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from llava_npu.errors import UserError
from llava_npu.hub.hubs import local_folder, on_hub, parse_source
from llava_npu.hub.models import HubModel, wanted_patterns
from support import tiny
from support.fake_hubs import COMMIT, Hub, serving


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("openai/clip", HubModel("huggingface", "openai/clip")),
        ("openai/clip@refs/pr/1", HubModel("huggingface", "openai/clip", "refs/pr/1")),
        ("my models/clip", Path("my models/clip")),
        ("openai/clip@v1.0", HubModel("huggingface", "openai/clip", "v1.0")),
        ("huggingface://openai/clip", HubModel("huggingface", "openai/clip")),
        ("modelscope://AI-ModelScope/clip", HubModel("modelscope", "AI-ModelScope/clip")),
        ("modelscope://AI-ModelScope/clip@abc", HubModel("modelscope", "AI-ModelScope/clip", "abc")),
        ("runs/a/b", Path("runs/a/b")),
        ("./openai/clip", Path("openai/clip")),
        ("/models/clip", Path("/models/clip")),
        ("clip", Path("clip")),
    ],
)
def test_what_a_source_names(text: str, expected: Path | HubModel) -> None:
    assert parse_source(text, "model") == expected


def test_a_folder_that_is_there_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openai/clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_source("openai/clip", "model") == Path("openai/clip")
    assert on_hub("openai/clip", "modelscope") == "openai/clip"


def test_a_setting_says_where_bare_names_are() -> None:
    assert on_hub("openai/clip@1", "modelscope") == "modelscope://openai/clip@1"
    assert on_hub("huggingface://openai/clip", "modelscope") == "huggingface://openai/clip"
    assert str(parse_source("modelscope://a/b@1", "model")) == "modelscope://a/b@1"
    assert str(parse_source("huggingface://a/b@1", "model")) == "a/b@1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modelscpe://a/b", r"unknown hub 'modelscpe'. Did you mean 'modelscope'"),
        ("https://huggingface.co/a/b", "is a web address; write organisation/name"),
        ("huggingface://a/b c", "organisation/name"),
        ("modelscope://a", "organisation/name"),
        ("modelscope:///b", "organisation/name"),
    ],
)
def test_wrong_names(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^model.vision_tower: .*{message}"):
        parse_source(text, "model.vision_tower")
    with pytest.raises(UserError, match=r"source 'modelscop' is unknown. Did you mean 'modelscope'"):
        on_hub("a/b", "modelscop")


def test_a_name_that_is_almost_one_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "models--openai--clip").mkdir()
    with pytest.raises(UserError, match=r"OpenAI/CLIP is not in the cache .* Did you mean 'openai/clip'\?"):
        local_folder("OpenAI/CLIP", "model")


def test_pickles_are_fetched_only_where_there_is_nothing_else() -> None:
    both = ["config.json", "model.safetensors", "pytorch_model.bin"]
    assert "*.bin" not in wanted_patterns(both, weights=True)
    assert "*.bin" in wanted_patterns(["config.json", "pytorch_model.bin", "vae/a.safetensors"], weights=True)
    assert "*.safetensors" not in wanted_patterns(both, weights=False)


# ---- the hubs, each in processes of its own: their addresses are read when their library is imported ----


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    tiny.write_language_model(folder / "lm")
    tiny.write_clip(folder / "clip")
    (folder / "clip/onnx").mkdir()
    (folder / "clip/onnx/model.onnx").write_bytes(b"large")
    (folder / "clip/training_args.bin").write_bytes(b"pickle")
    shutil.copytree(folder / "clip", folder / "old")
    shutil.copytree(folder / "clip", folder / "broken")
    (folder / "broken/model.safetensors").unlink()
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    models = {
        name: {"main": repository / folder, "master": repository / folder}
        for name, folder in {"tiny/lm": "lm", "tiny/clip": "clip", "tiny/broken": "broken"}.items()
    }
    models["tiny/old"] = {"old": repository / "old"}
    with serving(models) as served:
        yield served


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_"))}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "MODELSCOPE_DOMAIN": hub.url,
        "HF_HOME": str(tmp_path / "huggingface"),
        "LLAVA_NPU_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }


def _run(environment: dict[str, str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llava_npu", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**environment, **more},
    )


def _download(environment: dict[str, str], *arguments: str) -> Path:
    result = _run(environment, "download", *arguments)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def _fails(environment: dict[str, str], *arguments: str, **more: str) -> str:
    result = _run(environment, *arguments, **more)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


SCHEMES = ["", "modelscope://"]
MOSTLY_THE_FIRST = [SCHEMES[0], pytest.param(SCHEMES[1], marks=pytest.mark.exhaustive)]
WANTED = {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", MOSTLY_THE_FIRST)
def test_download_use_offline_and_copy(
    environment: dict[str, str], hub: Hub, repository: Path, tmp_path: Path, scheme: str
) -> None:
    folder = _download(environment, f"{scheme}tiny/clip")
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == WANTED  # no onnx, no pickles
    for name in WANTED:
        assert (folder / name).read_bytes() == (repository / "clip" / name).read_bytes()

    copy = _download(environment, f"{scheme}tiny/clip", "--to", f"{tmp_path}/copy")
    assert {path.name for path in copy.iterdir()} == WANTED
    assert not any(path.is_symlink() for path in copy.iterdir())
    assert "exists already" in _fails(environment, "download", f"{scheme}tiny/clip", "--to", f"{tmp_path}/copy")

    # A run that needs another model too says which is missing, and how to get it; with it, it runs off the network.
    data = tiny.write_captions(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"output: {tmp_path}/run\nstage: align\n"
        f"model: {{vision_tower: tiny/clip, language_model: tiny/lm"
        f"{', source: modelscope' if scheme else ''}}}\n"
        f"data: {{path: {data}, workers: 0}}\nbatch_size: 8\nmicro_batch_size: 8\nmax_steps: 1\n"
    )
    train = ("train", str(config), "--device", "cpu")
    message = _fails(environment, *train, HF_HUB_OFFLINE="1")
    assert f"model.language_model: {scheme}tiny/lm is not in the cache" in message
    assert f"llava-npu download {scheme}tiny/lm\n" in message
    _download(environment, "tiny/lm", *(["--source", "modelscope"] if scheme else []))
    hub.requests.clear()
    result = _run(environment, *train, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert not hub.requests


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_revisions(environment: dict[str, str], hub: Hub, scheme: str) -> None:
    pinned = _download(environment, f"{scheme}tiny/old@old")
    assert (pinned / "config.json").is_file()
    assert not any("main" in path or "master" in path for path in hub.requests)
    assert _download(environment, f"{scheme}tiny/clip@{COMMIT}").is_dir()
    message = _fails(environment, "download", f"{scheme}tiny/clip@gone")
    assert "revision 'gone'" in message
    assert "tiny/gone" in _fails(environment, "download", f"{scheme}tiny/gone")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cached_model_is_used_until_asked_for_again(
    environment: dict[str, str], hub: Hub, repository: Path, tmp_path: Path, scheme: str
) -> None:
    code = (
        "import sys; from llava_npu.hub.hubs import local_folder, download_model\n"
        "print({'use': local_folder, 'ask': lambda name, field: download_model(name)}[sys.argv[1]](sys.argv[2], 'm'))"
    )

    def folder(how: str) -> Path:
        command = [sys.executable, "-c", code, how, f"{scheme}tiny/clip"]
        return Path(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip())

    first = folder("use")
    hub.requests.clear()
    assert folder("use") == first
    assert not hub.requests
    if scheme:  # the hub's own library looks after its own cache
        changed = tmp_path / "changed"
        shutil.copytree(repository / "clip", changed)
        (changed / "preprocessor_config.json").write_text("{}")
        hub.models["tiny/clip"]["master"] = changed
        assert (folder("use") / "preprocessor_config.json").read_text() != "{}"
        assert (folder("ask") / "preprocessor_config.json").read_text() == "{}"
        hub.requests.clear()
        folder("ask")
        assert len(hub.requests) == 1  # the list of files; none has changed


@pytest.mark.slow
def test_modelscope_goes_on_where_a_connection_broke(environment: dict[str, str], hub: Hub) -> None:
    hub.cut.add("model.safetensors")
    folder = _download(environment, "modelscope://tiny/clip")
    assert (folder / "model.safetensors").is_file()
    assert sum("model.safetensors" in path for path in hub.requests) == 2
    assert not list(folder.rglob("*.part"))


@pytest.mark.slow
def test_modelscope_refuses_damaged_files(environment: dict[str, str], hub: Hub, tmp_path: Path) -> None:
    hub.wrong.add("model.safetensors")
    assert "model.safetensors arrived damaged" in _fails(environment, "download", "modelscope://tiny/clip")
    hub.wrong.clear()
    assert (_download(environment, "modelscope://tiny/clip") / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", MOSTLY_THE_FIRST)
def test_an_incomplete_model_names_what_it_lacks(environment: dict[str, str], scheme: str, tmp_path: Path) -> None:
    tiny.write_language_model(tmp_path / "lm")
    code = (
        "import sys; from llava_npu.models import compose; from llava_npu.errors import UserError\n"
        f"try: compose('{scheme}tiny/broken', '{tmp_path}/lm')\nexcept UserError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert "model.safetensors" in said.stdout
    assert "model.vision_tower" in said.stdout


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_hub_in_reach(environment: dict[str, str], scheme: str) -> None:
    nowhere = "http://127.0.0.1:9"
    message = _fails(
        environment,
        "chat",
        "--model",
        f"{scheme}tiny/clip",
        "--prompt",
        "q",
        HF_ENDPOINT=nowhere,
        MODELSCOPE_DOMAIN=nowhere,
    )
    assert f"model: {scheme}tiny/clip is not in the cache" in message
    assert f"llava-npu download {scheme}tiny/clip" in message


@pytest.mark.slow
@pytest.mark.parametrize("scheme", MOSTLY_THE_FIRST)
def test_a_tokenizer_alone_needs_no_weights(environment: dict[str, str], hub: Hub, tmp_path: Path, scheme: str) -> None:
    data = tiny.write_captions(tmp_path)
    result = _run(environment, "data", "inspect", str(data), "--tokenizer", f"{scheme}tiny/lm", "--template", "plain")
    assert result.returncode == 0, result.stderr
    assert not any("safetensors" in path for path in hub.requests if "FilePath" in path or "resolve" in path)
