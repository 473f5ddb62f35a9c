"""`llava-npu serve`: a model behind OpenAI's chat API."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Annotated

import typer

from llava_npu.cli.options import BITS, DEVICE, DTYPE, HUB, IMAGE_TOKENS, MAX_LENGTH, MODEL, TEMPLATE, name_of
from llava_npu.errors import UserError
from llava_npu.files.untrusted import printable

if TYPE_CHECKING:
    from llava_npu.inference.engine import InferenceEngine
    from llava_npu.models.loaded import LoadedModel
    from llava_npu.serving.api.fetching import ImageFetcher
    from llava_npu.serving.api.limits import Limits

_LEVELS = ("critical", "error", "warning", "info", "debug")
HOST = typer.Option(help="Address to listen on; 0.0.0.0: reachable from other machines.")
ALLOWED_HOSTS = typer.Option(
    help="A name that clients may call this server by, next to loopback; may be repeated; '*': any.", metavar="NAME"
)
_NAME = typer.Option(help="The model's name for clients; by default its folder's.")
_MAX_BATCH = typer.Option(min=1, help="Answers that share steps.")
_MAX_WAITING = typer.Option(min=0, help="Requests that may wait; one more gets 429.")
_MAX_NEW_TOKENS = typer.Option(min=1, help="Longest answer that may be asked for.")
_MAX_IMAGES = typer.Option(min=0, help="Most images of one request.")
_REQUEST_TIMEOUT = typer.Option(help="Seconds for one request, sending and waiting included.")
_READ_TIMEOUT = typer.Option(help="Seconds for a request's head, and without a byte from or to a client.")
_ALLOW_IMAGE_URLS = typer.Option("--allow-image-urls", help="Fetch images from public http(s) addresses.")
_API_KEY = typer.Option(envvar="LLAVA_NPU_API_KEY", help="What clients must send as their key.")


def serve(
    model: Annotated[str, MODEL],
    host: Annotated[str, HOST] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    allowed_hosts: Annotated[list[str] | None, ALLOWED_HOSTS] = None,
    name: Annotated[str | None, _NAME] = None,
    template: Annotated[str | None, TEMPLATE] = None,
    image_tokens: Annotated[int | None, IMAGE_TOKENS] = None,
    source: Annotated[str, HUB] = "huggingface",
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "auto",
    bits: Annotated[int, BITS] = 16,
    max_batch: Annotated[int, _MAX_BATCH] = 16,
    max_length: Annotated[int | None, MAX_LENGTH] = None,
    max_waiting: Annotated[int, _MAX_WAITING] = 64,
    max_new_tokens: Annotated[int, _MAX_NEW_TOKENS] = 1024,
    max_request_mib: Annotated[float, typer.Option(help="Largest request, in MiB.")] = 32,
    max_images: Annotated[int, _MAX_IMAGES] = 8,
    max_image_megapixels: Annotated[float, typer.Option(help="Largest image.")] = 25,
    request_timeout: Annotated[float, _REQUEST_TIMEOUT] = 300,
    read_timeout: Annotated[float, _READ_TIMEOUT] = 20,
    allow_image_urls: Annotated[bool, _ALLOW_IMAGE_URLS] = False,
    api_key: Annotated[str | None, _API_KEY] = None,
    log_level: Annotated[str, typer.Option(help="info also logs each request's line.")] = "warning",
) -> None:
    """Serve a model over HTTP: OpenAI's chat API, and the protocol of LLaVA's own workers."""
    _check_options(api_key, log_level)
    from llava_npu.serving.addresses import AllowedHosts, open_port
    from llava_npu.serving.api.limits import Limits

    hosts = AllowedHosts(host, allowed_hosts or ())
    limits = Limits(
        max_waiting=max_waiting,
        max_request_bytes=_scaled("--max-request-mib", max_request_mib, 2**20),
        max_images=max_images,
        max_image_pixels=_scaled("--max-image-megapixels", max_image_megapixels, 10**6),
        max_new_tokens=max_new_tokens,
        request_timeout=request_timeout,
        read_timeout=read_timeout,
    )
    listener = open_port(host, port, read_timeout)  # before a model is loaded, which may take minutes
    from llava_npu.cli.options import load_model
    from llava_npu.hub.hubs import on_hub
    from llava_npu.serving.api.app import build_app
    from llava_npu.serving.api.service import Service
    from llava_npu.serving.server import run_server

    loaded, chosen = load_model(on_hub(model, source), device, dtype, bits, template)
    engine = _engine(loaded.with_image_tokens(image_tokens), chosen.memory().free, max_batch, max_length)
    service = Service(engine, printable(name or name_of(model)), limits, _fetcher(limits) if allow_image_urls else None)
    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        typer.secho("warning: no --api-key: whoever reaches this port may use the model.", fg="yellow", err=True)
    app = build_app(service, api_key=api_key and api_key.strip(), hosts=hosts)

    def ready(address: str) -> None:
        typer.echo(f"{service.name} on {chosen.name}: {address}/v1 ({_capacity(engine)}). Ctrl-C stops.")

    with contextlib.suppress(KeyboardInterrupt), service:  # how a server is stopped
        run_server(app, listener, head_timeout=read_timeout, log_level=log_level, ready=ready)


def _check_options(api_key: str | None, log_level: str) -> None:
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


def _scaled(option: str, value: float, unit: int) -> int:
    if not (math.isfinite(value) and value * unit >= 1):
        raise UserError(f"{option} {value}: a number above 0 is expected.")
    return int(value * unit)


def _engine(loaded: LoadedModel, free: int, max_batch: int, max_length: int | None) -> InferenceEngine:
    """An engine that has taken its memory.

    Raises:
        UserError: there is not enough.
    """
    from llava_npu.inference.engine import InferenceEngine

    engine = InferenceEngine(loaded, max_batch=max_batch, max_length=max_length)
    if engine.cache_bytes > free:
        raise UserError(
            f"keys and values of {max_batch} answers of {engine.max_length} tokens take "
            f"{engine.cache_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: lower --max-batch or "
            "--max-length."
        )
    engine.warm_up()
    return engine


def _fetcher(limits: Limits) -> ImageFetcher:
    from llava_npu.serving.api.fetching import ImageFetcher

    return ImageFetcher(max_bytes=limits.max_request_bytes, timeout=limits.read_timeout)


def _capacity(engine: InferenceEngine) -> str:
    return (
        f"{engine.max_batch} answers at once, up to {engine.max_length} tokens each, "
        f"{engine.cache_bytes / 2**20:.0f} MiB for keys and values"
    )
