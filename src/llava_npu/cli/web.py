"""`llava-npu web`: a page to talk with a model, or with two side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from llava_npu.cli.options import BITS, DEVICE, DTYPE, HUB, IMAGE_TOKENS, MAX_LENGTH, MODEL, TEMPLATE, name_of
from llava_npu.cli.serve import ALLOWED_HOSTS
from llava_npu.errors import UserError
from llava_npu.files.untrusted import printable

_MAX_UPLOAD_BYTES = 32 * 2**20  # of one file
_SEND_TIMEOUT = _HEAD_TIMEOUT = 20.0  # seconds


def web(
    model: Annotated[str, MODEL],
    compare: Annotated[str | None, typer.Option(help="A second model, side by side with the first.")] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0: reachable from other machines, by anybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    allowed_hosts: Annotated[list[str] | None, ALLOWED_HOSTS] = None,
    examples: Annotated[Path | None, typer.Option(help="A folder of images to click on.")] = None,
    flags: Annotated[Path, typer.Option(help="Folder for flagged conversations.")] = Path("flagged"),
    template: Annotated[str | None, TEMPLATE] = None,
    image_tokens: Annotated[int | None, IMAGE_TOKENS] = None,
    source: Annotated[str, HUB] = "huggingface",
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "auto",
    bits: Annotated[int, BITS] = 16,
    max_batch: Annotated[int, typer.Option(min=1, help="Visitors answered at once.")] = 4,
    max_length: Annotated[int | None, MAX_LENGTH] = None,
) -> None:
    """Talk with a model about images in the browser."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"the web page needs {error.name}: pip install 'llava-npu[web]'.") from error
    from llava_npu.serving.addresses import AllowedHosts, open_port

    hosts = AllowedHosts(host, allowed_hosts or ())
    listener = open_port(host, port, _SEND_TIMEOUT)  # before a model is loaded, which may take minutes
    images = _images(examples)

    from llava_npu.cli.options import load_model
    from llava_npu.hub.hubs import on_hub
    from llava_npu.inference.engine import InferenceEngine
    from llava_npu.serving.background import BackgroundEngine
    from llava_npu.serving.server import run_server
    from llava_npu.serving.web.conversation import ServedModel
    from llava_npu.serving.web.page import build_page, page_app

    sources = [model, *([compare] if compare else [])]
    names = [name_of(each) for each in sources]
    models = []
    for name, folder in zip(names if len(set(names)) == len(names) else sources, sources, strict=True):
        loaded, _ = load_model(on_hub(folder, source), device, dtype, bits, template)
        engine = InferenceEngine(loaded.with_image_tokens(image_tokens), max_batch=max_batch, max_length=max_length)
        engine.warm_up()
        models.append(ServedModel(printable(name), engine, BackgroundEngine(engine)))
    for served in models:
        served.background.start()
    page = build_page(models, flags, images)
    app = page_app(page, hosts, _MAX_UPLOAD_BYTES)
    try:
        run_server(
            app,
            listener,
            head_timeout=_HEAD_TIMEOUT,
            ready=lambda address: typer.echo(f"{address} Ctrl-C stops."),
        )
    finally:
        for served in models:
            served.background.stop()


def _images(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    if not folder.is_dir():
        raise UserError(f"--examples {folder}: not a folder.")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))[:12]
