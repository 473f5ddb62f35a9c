"""`llava-npu serve`: a model behind OpenAI's chat API."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from llava_npu.cli.model_options import BITS, DEVICE, DTYPE, HUB, MAX_LENGTH, MODEL
from llava_npu.errors import UserError

_LEVELS = ("critical", "error", "warning", "info", "debug")


def serve(
    model: Annotated[str, MODEL],
    host: Annotated[str, typer.Option(help="0.0.0.0: reachable from other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; by default its folder's.")] = None,
    source: Annotated[str, HUB] = "huggingface",
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "auto",
    bits: Annotated[int, BITS] = 16,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that share steps.")] = 16,
    max_length: Annotated[int | None, MAX_LENGTH] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; one more gets 429.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 1024,
    max_request_mib: Annotated[float, typer.Option(help="Largest request, in MiB.")] = 32,
    max_images: Annotated[int, typer.Option(min=0, help="Most images of one request.")] = 8,
    max_image_megapixels: Annotated[float, typer.Option(help="Largest image.")] = 25,
    request_timeout: Annotated[float, typer.Option(help="Seconds for one request, waiting included.")] = 300,
    read_timeout: Annotated[float, typer.Option(help="Seconds without a byte from or to a client.")] = 20,
    allow_image_urls: Annotated[
        bool, typer.Option("--allow-image-urls", help="Fetch images from public http(s) addresses.")
    ] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="LLAVA_NPU_API_KEY", help="What clients must send as their key.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="info also logs each request's line.")] = "warning",
) -> None:
    """Serve a model over HTTP: OpenAI's chat API, and the protocol of LLaVA's own workers."""
    if api_key is not None and not api_key.strip():
        raise UserError("--api-key (LLAVA_NPU_API_KEY) is empty: give a key, or leave it out.")
    if log_level not in _LEVELS:
        raise UserError(f"--log-level {log_level}: allowed are {', '.join(_LEVELS)}.")
    try:
        import fastapi  # noqa: F401
        import httpcore  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'llava-npu[serve]'.") from error
    from llava_npu.serving.api.ports import open_port

    listener = open_port(host, port, read_timeout)  # before a model is loaded, which may take minutes

    from llava_npu.cli.model_options import load_model
    from llava_npu.inference.engine import Engine
    from llava_npu.serving.api import server
    from llava_npu.serving.api.fetching import ImageFetcher
    from llava_npu.serving.api.limits import MIB, Limits
    from llava_npu.serving.api.service import Service

    loaded, chosen = load_model(model, device, dtype, bits, source)
    engine = Engine(loaded, max_batch=max_batch, max_length=max_length)
    free = chosen.memory().free
    if engine.cache_bytes > free:
        raise UserError(
            f"keys and values of {max_batch} answers of {engine.max_length} tokens take "
            f"{engine.cache_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: lower --max-batch or "
            "--max-length."
        )
    engine.warm_up()
    limits = Limits(
        max_waiting=max_waiting,
        max_request_bytes=int(max_request_mib * MIB),
        max_images=max_images,
        max_image_pixels=int(max_image_megapixels * 1e6),
        max_new_tokens=max_new_tokens,
        request_timeout=request_timeout,
        read_timeout=read_timeout,
    )
    fetcher = ImageFetcher(max_bytes=limits.max_request_bytes, timeout=read_timeout) if allow_image_urls else None
    service = Service(engine, name or _name_of(model), limits, fetcher)
    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        typer.secho("warning: no --api-key: whoever reaches this port may use the model.", fg="yellow", err=True)

    def ready(address: str) -> None:
        typer.echo(
            f"{service.name} on {chosen.name}: {address}/v1 ({max_batch} answers at once, up to {engine.max_length} "
            f"tokens each, {engine.cache_bytes / 2**20:.0f} MiB for keys and values). Ctrl-C stops."
        )

    with contextlib.suppress(KeyboardInterrupt):  # how a server is stopped
        server.serve(service, listener, api_key=api_key, log_level=log_level, ready=ready)


def _name_of(model: str) -> str:
    folder = Path(model)
    if folder.name == "model" and (folder / "config.json").is_file():  # runs/finetune/model
        folder = folder.resolve().parent
    return folder.name or model
