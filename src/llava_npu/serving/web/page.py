"""The page itself, in Gradio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_npu.errors import UserError
from llava_npu.inference.request import Sampling
from llava_npu.serving.web import uploads
from llava_npu.serving.web.columns import Column, Picture, Talk, ask, open_pictures, without_last
from llava_npu.serving.web.flags import flag
from llava_npu.serving.web.seeing import seen
from llava_npu.serving.web.uploads import MAX_AGE_SECONDS, UploadLimit, check_uploaded, make_upload_folder

_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # of this machine: nothing is loaded from elsewhere
_STYLE = ".message img { max-height: 9rem; width: auto; object-fit: contain }"  # answers stay in sight
# Answers are shown as Markdown, and what models write may name pictures of other sites.
_OWN_CONTENT_ONLY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


def build_page(columns: Sequence[Column], flags: Path, examples: Sequence[Path] = ()) -> gr.Blocks:
    """A page that talks with one model, or with two side by side about the same pictures.

    Args:
        columns: the models; their engines run.
        flags: folder for flagged conversations.
        examples: pictures to click on.
    """
    upload_folder = make_upload_folder()  # before any component asks where its files are
    names = " and ".join(column.name for column in columns)
    tidying = (MAX_AGE_SECONDS // 6, MAX_AGE_SECONDS)
    with gr.Blocks(title=f"LLaVA-NPU: {names}", analytics_enabled=False, delete_cache=tidying) as page:
        gr.Markdown(f"### {names}")
        _connect(_lay_out(columns, examples, upload_folder), columns, flags, upload_folder)
    return page


@dataclass(frozen=True)
class _Components:
    """What people see and click on; `talk` is the conversation behind it."""

    talk: gr.State
    pictures: gr.Gallery
    settings: list[gr.Slider]  # temperature, top p, length
    chats: list[gr.Chatbot]
    question: gr.Textbox
    send: gr.Button
    stop: gr.Button
    again: gr.Button
    clear: gr.Button
    keep: gr.Button
    sights: list[gr.Gallery]


def _lay_out(columns: Sequence[Column], examples: Sequence[Path], upload_folder: Path) -> _Components:
    talk = gr.State(Talk())
    with gr.Row():
        with gr.Column(scale=2):
            pictures = gr.Gallery(
                label="Pictures for the next question",
                type="filepath",
                file_types=["image"],
                sources=["upload", "webcam", "clipboard"],
                interactive=True,
                columns=2,
                elem_id="pictures",
            )
            if examples:
                _shelf(examples, pictures, upload_folder)
            with gr.Accordion("Parameters", open=False):
                temperature = gr.Slider(0, 2, 0.2, step=0.1, label="Temperature (0: always the likeliest word)")
                top_p = gr.Slider(0.05, 1, 0.7, step=0.05, label="Top p")
                length = gr.Slider(16, 1024, 512, step=16, label="Longest answer, in tokens")
        with gr.Column(scale=5):
            with gr.Row():
                chats = [
                    gr.Chatbot(label=column.name, height=440, elem_id=f"chat-{place}", buttons=["copy"])
                    for place, column in enumerate(columns)
                ]
            question = gr.Textbox(
                show_label=False, placeholder="Ask about the pictures, then press Enter", elem_id="question"
            )
            with gr.Row():
                send = gr.Button("Send", variant="primary", elem_id="send", min_width=80)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
                again = gr.Button("Regenerate", elem_id="again", min_width=80)
                clear = gr.Button("Clear", elem_id="clear", min_width=80)
                keep = gr.Button("Flag", elem_id="flag", min_width=80)
            with gr.Accordion("What the models see (a cell is a visual token)", open=False), gr.Row():
                sights = [
                    gr.Gallery(
                        label=column.name,
                        format="png",
                        interactive=False,
                        columns=2,
                        fit_columns=False,
                        object_fit="contain",
                        elem_id=f"seen-{place}",
                        buttons=["fullscreen"],
                    )
                    for place, column in enumerate(columns)
                ]
    settings = [temperature, top_p, length]
    return _Components(talk, pictures, settings, chats, question, send, stop, again, clear, keep, sights)


def _connect(page: _Components, columns: Sequence[Column], flags: Path, upload_folder: Path) -> None:
    """What happens on clicks."""

    async def answer(text: str, files: list[Any] | None, now: Talk, *values: float) -> AsyncIterator[list[Any]]:
        with _errors_shown():
            paths = [file for file, _ in files or []]
            check_uploaded(paths, upload_folder)
            opened = await asyncio.to_thread(open_pictures, paths, now)
            async with aclosing(ask(columns, now, text, opened, _sampling(values))) as answering:
                sights = await asyncio.to_thread(_sights, columns, opened)
                box: list[Any] = ["", None, *sights]  # the question is asked: empty for the next
                async for later in answering:
                    yield [later, *_chats(columns, later), *box]
                    box = [gr.skip()] * len(box)

    async def regenerate(now: Talk, *values: float) -> AsyncIterator[list[Any]]:
        with _errors_shown():
            earlier, last = without_last(now)
            async with aclosing(ask(columns, earlier, last.question, last.pictures, _sampling(values))) as answering:
                async for later in answering:
                    yield [later, *_chats(columns, later)]

    def keep_talk(now: Talk, *values: float) -> None:
        with _errors_shown():
            path = flag(columns, now, _sampling(values), flags)
        gr.Info(f"kept in {path}")

    box = [page.question, page.pictures, *page.sights]
    asked = ([page.question, page.pictures, page.talk, *page.settings], [page.talk, *page.chats, *box])
    running: list[Any] = [
        page.question.submit(answer, *asked),
        page.send.click(answer, *asked),
        page.again.click(regenerate, [page.talk, *page.settings], [page.talk, *page.chats]),
    ]
    page.stop.click(None, cancels=running, queue=False)
    everything = [page.talk, page.question, page.pictures, *page.chats, *page.sights]
    for clicked in (
        page.clear.click,
        *(chat.clear for chat in page.chats),
    ):  # a column's own button means the whole talk
        clicked(lambda: [Talk(), "", *[None] * (len(everything) - 2)], None, everything, cancels=running)
    page.keep.click(keep_talk, [page.talk, *page.settings])


def launch(page: gr.Blocks, host: str, port: int, max_bytes: int, block: bool = True) -> str:
    """Serves the page; returns its address where `block` is False.

    Raises:
        UserError: the port is in use.
    """
    try:
        _, address, _ = page.queue(default_concurrency_limit=16).launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            max_file_size=max_bytes,
            prevent_thread_lock=not block,
            theme=gr.themes.Soft(font=_FONTS, font_mono=["monospace"]),
            css=_STYLE,
            footer_links=[],
            ssr_mode=False,
            app_kwargs={
                "middleware": [
                    Middleware(_ContentPolicy),
                    Middleware(UploadLimit, folder=Path(get_upload_folder()), max_bytes=uploads.MAX_TOTAL_BYTES),
                ]
            },
        )
    except OSError as error:
        raise UserError(f"--port {port}: in use on {host}, or not ours to take ({error}); choose another") from error
    return str(address)


class _ContentPolicy:
    """ASGI middleware: tells browsers to load nothing from elsewhere, whatever an answer's text asks for."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _OWN_CONTENT_ONLY
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _shelf(examples: Sequence[Path], pictures: gr.Gallery, upload_folder: Path) -> None:
    """Pictures that a click puts among those of the next question."""
    shelf = gr.Dataset(
        components=[gr.Image(render=False, type="filepath")],
        samples=[[str(path)] for path in examples],
        label="Examples",
        type="index",
        elem_id="examples",
    )

    def add(place: int, now: list[Any] | None) -> list[Any]:
        with _errors_shown():
            check_uploaded([file for file, _ in now or []], upload_folder)
        return [*(now or []), str(examples[place])]

    shelf.click(add, [shelf, pictures], pictures)


def _chats(columns: Sequence[Column], talk: Talk) -> list[list[dict[str, Any]]]:
    return [_messages(talk, place) for place in range(len(columns))]


def _messages(talk: Talk, column: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for exchange in talk.exchanges:
        shown: list[Any] = [*({"path": picture.file} for picture in exchange.pictures), exchange.question]
        messages.append({"role": "user", "content": shown})
        messages.append({"role": "assistant", "content": exchange.answers[column] or ""})
    return messages


def _sights(columns: Sequence[Column], pictures: Sequence[Picture]) -> list[Any]:
    """What each model sees of the latest pictures; a question without any leaves them."""
    if not pictures:
        return [gr.skip()] * len(columns)
    return [
        [sight for picture in pictures for sight in seen(column.engine.loaded, picture.image)] for column in columns
    ]


def _sampling(values: Sequence[float]) -> Sampling:
    temperature, top_p, length = values
    return Sampling(int(length), temperature=float(temperature), top_p=float(top_p))


@contextmanager
def _errors_shown() -> Iterator[None]:
    """What a visitor got wrong is shown on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
