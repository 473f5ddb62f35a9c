"""The command `llava-npu`: one file per command, arguments in, one call out.

Whatever takes long to import is imported inside the commands: `llava-npu --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from llava_npu.cli.chat import chat
from llava_npu.cli.checkpoint import app as checkpoint_app
from llava_npu.cli.compare import compare
from llava_npu.cli.convert import convert
from llava_npu.cli.data import app as data_app
from llava_npu.cli.doctor import doctor
from llava_npu.cli.download import download
from llava_npu.cli.eval import eval_
from llava_npu.cli.init import init
from llava_npu.cli.merge import merge
from llava_npu.cli.plan import plan
from llava_npu.cli.replay import replay
from llava_npu.cli.report import report
from llava_npu.cli.serve import serve
from llava_npu.cli.train import train
from llava_npu.cli.verify import verify
from llava_npu.cli.web import web
from llava_npu.distributed import launched
from llava_npu.distributed.interruption import EXIT_STATUS, RunStopped
from llava_npu.errors import UserError
from llava_npu.files.home import expand_home
from llava_npu.files.untrusted import printable
from llava_npu.ops.torch_npu_failure import describe_failure, failure_in
from llava_npu.version import __version__

app = typer.Typer(
    name="llava-npu",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(init)
app.command("plan")(plan)
app.command("train")(train)
app.command("compare")(compare)
app.command("eval")(eval_)
app.command("report")(report)
app.command("chat")(chat)
app.command("replay")(replay)
app.add_typer(checkpoint_app, name="checkpoint")
app.command("merge")(merge)
app.command("convert")(convert)
app.command("serve")(serve)
app.command("web")(web)
app.add_typer(data_app, name="data")
app.command("download")(download)
app.command("doctor")(doctor)
app.command("verify")(verify)


class _Command(TyperCommand):
    """Paths begin at home where they begin with `~`: no shell replaces it in `--output=~/runs`, nor in quotes."""

    def invoke(self, ctx: Any) -> Any:
        ctx.params = {name: _expanded(value) for name, value in ctx.params.items()}
        return super().invoke(ctx)


def _expanded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_expanded, value))
    return expand_home(value) if isinstance(value, Path) else value


for _each in (app, data_app, checkpoint_app):
    for _registered in _each.registered_commands:
        _registered.cls = _Command


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llava-npu {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Train, evaluate and use LLaVA-style vision-language models on Ascend NPUs, CUDA GPUs and CPUs."""


def set_environment() -> None:
    """Silences libraries, in favour of our own progress lines and messages. What the user has set stays.

    What a terminal's encoding cannot show (ASCII, Latin-1) is shown as a question mark. What is not
    text in the input is read as it is in arguments: file names of any bytes work, and questions are refused.
    """
    # One that was closed (`<&-`, some daemons) is None.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors == "strict":
        sys.stdin.reconfigure(errors="surrogateescape")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Without an accelerator DeepSpeed says so, on stdout, whenever it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def _say_what_runs() -> None:
    """A first line at once, in a terminal: importing torch takes seconds, on a busy machine half a minute."""
    commands = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    if commands and sys.stderr.isatty() and not {"-h", "--help"} & set(sys.argv) and os.environ.get("RANK", "0") == "0":
        typer.secho(f"llava-npu {__version__}: {commands[0]} …", dim=True, err=True)


def main() -> None:
    """Runs the command line of this process."""
    if launched.REPORTS in os.environ:
        set_environment()
        launched.reporting(app)
        return
    run(app)


def run(app: typer.Typer) -> None:
    """Runs a command line; what a user got wrong is one message on stderr and exit status 2."""
    set_environment()
    _say_what_runs()
    try:
        app()
    except UserError as error:
        typer.secho(f"error: {printable(str(error))}", fg="red", err=True)
        sys.exit(2)
    except RunStopped as stopped:
        typer.secho(str(stopped), fg="yellow", err=True)
        sys.exit(EXIT_STATUS)
    except launched.PeerLostError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.secho("interrupted", fg="yellow", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as in `llava-npu … | head`
        sys.stderr.close()
        sys.exit(141)
    except Exception as error:
        if failure := failure_in(error):
            typer.secho(
                f"error: {printable(describe_failure(failure))} `llava-npu doctor` shows them. Without an NPU, "
                "uninstall it: torch and accelerate import it wherever they find it.",
                fg="red",
                err=True,
            )
            sys.exit(2)
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        with contextlib.suppress(OSError):
            sys.stdout.close()  # what is left of the output has no room either
        typer.secho(f"error: {error.filename or 'the output'} cannot be written: {error.strerror}", fg="red", err=True)
        sys.exit(1)
