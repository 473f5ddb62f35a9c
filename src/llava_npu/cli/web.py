"""`llava-npu web`: a page to talk with a model, or with two side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from llava_npu.cli.model_options import BITS, DEVICE, DTYPE, HUB, MAX_LENGTH, MODEL
from llava_npu.errors import UserError

_LARGEST_PICTURE = 32 * 2**20  # bytes of a file


def web(
    model: Annotated[str, MODEL],
    compare: Annotated[str | None, typer.Option(help="A second model, side by side with the first.")] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0: reachable from other machines, by anybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    examples: Annotated[Path | None, typer.Option(help="A folder of pictures to click on.")] = None,
    flags: Annotated[Path, typer.Option(help="Folder for flagged conversations.")] = Path("flagged"),
    source: Annotated[str, HUB] = "huggingface",
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "auto",
    bits: Annotated[int, BITS] = 16,
    max_batch: Annotated[int, typer.Option(min=1, help="Visitors answered at once.")] = 4,
    max_length: Annotated[int | None, MAX_LENGTH] = None,
) -> None:
    """Talk with a model about pictures in the browser."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"the web page needs {error.name}: pip install 'llava-npu[web]'.") from error
    from llava_npu.serving.api.ports import open_port

    open_port(host, port, 1).close()  # in use? said before a model is loaded, which may take minutes
    pictures = _pictures(examples)

    from llava_npu.cli.model_options import load_model
    from llava_npu.inference.engine import Engine
    from llava_npu.serving.background import BackgroundEngine
    from llava_npu.serving.web.columns import Column
    from llava_npu.serving.web.page import build_page, launch

    columns = []
    for name in [model, *([compare] if compare else [])]:
        loaded, _ = load_model(name, device, dtype, bits, source)
        engine = Engine(loaded, max_batch=max_batch, max_length=max_length)
        engine.warm_up()
        columns.append(Column(name, engine, BackgroundEngine(engine)))
    for column in columns:
        column.background.start()
    page = build_page(columns, flags, pictures)
    typer.echo(f"http://{host}:{port} Ctrl-C stops.")
    try:
        launch(page, host, port, _LARGEST_PICTURE)
    finally:
        for column in columns:
            column.background.stop()


def _pictures(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    if not folder.is_dir():
        raise UserError(f"--examples {folder}: not a folder.")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))[:12]
