"""The command from outside: quick help, clean errors, and the main job end to end."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_npu import UserError, __version__, cli
from llava_npu.cli import app, set_environment
from llava_npu.cli.options import name_of
from support import tiny
from support.benchmark_samples import gqa, write_jsonl
from support.commands import run_command


def test_version() -> None:
    command = [sys.executable, "-m", "llava_npu", "--version"]
    assert subprocess.check_output(command, text=True) == f"llava-npu {__version__}\n"


_HELP = """
import sys
from llava_npu.cli import app, main

commands = [["data", "inspect"], ["data", "check"]]
commands += [["checkpoint", name] for name in ("inspect", "verify", "export")]
commands += [[command.name] for command in app.registered_commands + app.registered_groups]
for command in [[], *commands]:
    sys.argv = ["llava-npu", *command, "--help"]
    try:
        main()
    except SystemExit as leave:
        assert not leave.code, command
    heavy = {"torch", "transformers", "accelerate", "numpy", "PIL", "matplotlib", "httpx", "yaml"} & set(sys.modules)
    assert not heavy, (command, heavy)
"""


@pytest.mark.slow
def test_help_loads_nothing_heavy() -> None:
    """So that it is there at once. A measured time would say nothing on a machine that does other work."""
    result = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage") >= 17


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_a_terminal_hears_at_once_what_runs(tmp_path: Path) -> None:
    """Before anything heavy is imported: here torch is replaced by a module that says when it is."""
    import pty

    (tmp_path / "torch.py").write_text("import sys; sys.stderr.write('torch is imported'); raise SystemExit(3)")
    reader, writer = pty.openpty()
    command = [sys.executable, "-m", "llava_npu", "chat", "--model", "x"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.run(command, stdout=writer, stderr=writer, stdin=writer, env=environment, check=False)
    os.close(writer)
    said = os.read(reader, 10_000).decode()
    os.close(reader)
    assert process.returncode == 3
    assert said.index(f"llava-npu {__version__}: chat") < said.index("torch is imported")


def _fails(*arguments: str) -> str:
    result = run_command(*arguments)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.mark.slow
def test_a_terminal_that_is_not_utf_8(tmp_path: Path) -> None:
    """Progress, reports and messages have characters that ASCII has not; so have answers and file names."""
    turns = [{"from": "human", "value": "什么？"}, {"from": "gpt", "value": "猫 → 狗"}]
    (tmp_path / "数据.json").write_text(json.dumps([{"id": "ö", "conversations": turns}] * 2))
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    arguments = ["data", "inspect", str(tmp_path / "数据.json"), "--tokenizer", str(tmp_path / "tokenizer")]
    command = [sys.executable, "-m", "llava_npu", *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    assert "? ? ?" in result.stdout  # 猫 → 狗


@pytest.mark.slow
def test_input_may_be_any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff.png\n"), encoding="utf-8"))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    set_environment()
    assert sys.stdin.readline() == os.fsdecode(b"\xff.png") + "\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_streams_that_are_closed_or_full() -> None:
    def status(streams: str) -> tuple[int, str]:
        command = f"{sys.executable} -m llava_npu --version {streams}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        return done.returncode, done.stderr

    assert status("<&- >&- 2>&-") == (0, "")
    assert status(">/dev/full") == (1, "error: the output cannot be written: No space left on device\n")


def test_errors_are_one_message_without_a_traceback(tmp_path: Path) -> None:
    assert "no such configuration file" in _fails("train", str(tmp_path / "absent.yaml"))
    picture = tmp_path / "broken.png"
    picture.write_bytes(b"not an image")
    message = _fails("chat", "--model", str(tmp_path), "--prompt", "What?", "--image", str(picture), "--device", "cpu")
    assert "broken.png" in message


@pytest.mark.parametrize("command", ["chat", "serve", "web"])
def test_commands_that_answer_take_a_template(command: str) -> None:
    port = [] if command == "chat" else ["--port", "0"]
    result = CliRunner().invoke(app, [command, "--model", "absent", *port, "--template", "v11"])
    with pytest.raises(UserError, match="template 'v11' is unknown"):
        raise result.exception or AssertionError(result.output)


@pytest.mark.slow
def test_train_then_chat_then_inspect(tmp_path: Path) -> None:
    tiny.write_language_model(tmp_path / "lm")
    tiny.write_clip(tmp_path / "clip")
    data = tiny.write_captions(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"output: {tmp_path}/run\nstage: align\n"
        f"model: {{vision_tower: {tmp_path}/clip, language_model: {tmp_path}/lm}}\n"
        f"data: {{path: {data}, workers: 0}}\nbatch_size: 8\nmicro_batch_size: 8\nepochs: 2\n"
    )
    printed = run_command("train", str(config), "optimizer.learning_rate=1e-2", "--print-config")
    assert "learning_rate: 0.01" in printed.stdout
    assert not (tmp_path / "run").exists()
    trained = run_command("train", str(config), "optimizer.learning_rate=1e-2", "--device", "cpu")
    assert trained.returncode == 0, trained.stderr
    assert "step 6/6" in trained.stderr
    assert f"{tmp_path}/run/model" in trained.stdout

    chat = ["chat", "--model", f"{tmp_path}/run", "--device", "cpu", "--max-new-tokens", "4", "--prompt", "What is it?"]
    answered = run_command(*chat, "--image", f"{tmp_path}/images/0.png", "--image", f"{tmp_path}/images/1.png")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout  # of a model that has seen six steps, nothing more can be asked

    piped = run_command(*chat[:-2], typed=f"/image {tmp_path}/images/0.png\nWhat is it?\n/xyz\n")
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.endswith("error: /xyz is not a command. /help lists them.\n")

    inspected = run_command("data", "inspect", str(data), "--tokenizer", f"{tmp_path}/lm", "--template", "tokenizer")
    assert inspected.returncode == 0, inspected.stderr
    assert "a red square" in inspected.stdout


def test_models_are_named_by_their_run(tmp_path: Path) -> None:
    folder = tmp_path / "resampler" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert name_of(str(folder)) == name_of(str(folder.parent)) == "resampler"
    assert name_of("llava-hf/llava-1.5-7b-hf") == "llava-1.5-7b-hf"


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave it in `--output=~/out`; so does whatever starts the command without one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = ({"question_id": name, "text": "no"} for name in (201, 202))
    gqa(tmp_path)
    write_jsonl(tmp_path / "answers.jsonl", lines)
    command = ["eval", "gqa", "--data=~", "--predictions", "~/answers.jsonl", "--output=~/out"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (tmp_path / "out" / "report.json").is_file()


def test_a_torch_npu_that_cannot_be_imported_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch raises it, which loads such packages by itself."""
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu/__init__.py").write_text("raise OSError('libascendcl.so: cannot open')\n")

    def fails() -> None:
        try:
            runpy.run_path(str(tmp_path / "torch_npu/__init__.py"))
        except OSError as error:
            raise RuntimeError("Failed to load the backend extension") from error

    with pytest.raises(SystemExit) as left:
        cli.run(fails)  # type: ignore[arg-type]
    assert left.value.code == 2
    assert "torch_npu is installed but cannot be imported (libascendcl.so: cannot open)" in capsys.readouterr().err
