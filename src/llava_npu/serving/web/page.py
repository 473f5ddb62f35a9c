"""The page itself, in Gradio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_npu.errors import UserError
from llava_npu.files.untrusted import markdown_text
from llava_npu.inference.request import Sampling
from llava_npu.serving.addresses import AllowedHosts
from llava_npu.serving.web import uploads
from llava_npu.serving.web.conversation import (
    ChatHistory,
    ServedModel,
    UploadedImage,
    flag_conversation,
    open_images,
    stream_answers,
    without_last,
)
from llava_npu.serving.web.model_view import model_view
from llava_npu.serving.web.uploads import MAX_AGE_SECONDS, BodyLimit, UploadLimit, check_uploaded, make_upload_folder

_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # of this machine: nothing is loaded from elsewhere
# Images stay small, so that answers stay in sight. The conversation takes the height that is left: on a phone, where
# the columns stand one below the other, the question field is on the first screen.
_STYLE = """
.message img { max-height: 9rem; width: auto; object-fit: contain }
.chat { height: max(15rem, calc(100vh - 20rem)) !important }
.chat .placeholder { padding: 1rem; text-align: center; opacity: .75 }
.actions { flex-wrap: wrap; gap: .5rem }
.actions button { flex: 1 1 auto; min-width: max-content; padding-inline: .75rem }
@media (max-width: 640px) {
  .gradio-container main { padding: .5rem !important }
  #images { height: 13rem !important }  /* its file dialog offers the camera */
  .chat { height: max(12rem, calc(100vh - 33rem)) !important }
  .chats:has(#chat-1) .chat { height: 9rem !important; min-height: 9rem }
}
"""
# Answers are shown as Markdown, and what models write may name images of other sites.
_OWN_CONTENT_ONLY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


def build_page(models: Sequence[ServedModel], flags: Path, examples: Sequence[Path] = ()) -> gr.Blocks:
    """A page that talks with one model, or with two side by side about the same images.

    Args:
        models: their engines run.
        flags: folder for flagged conversations.
        examples: images to click on.
    """
    upload_folder = make_upload_folder()  # before any component asks where its files are
    names = " and ".join(model.name for model in models)
    tidying = (MAX_AGE_SECONDS // 6, MAX_AGE_SECONDS)
    with gr.Blocks(title=f"LLaVA-NPU: {names}", analytics_enabled=False, delete_cache=tidying) as page:
        gr.Markdown(f"### {markdown_text(names)}")
        with gr.Row():
            with gr.Column(scale=2):
                images, settings = _left_side(examples, upload_folder)
            with gr.Column(scale=5):
                parts = _right_side(models, images, settings)
        _connect(parts, _Actions(models, flags, upload_folder))
    return page


@dataclass(frozen=True)
class _Parts:
    """The page's components that take part in a conversation."""

    images: gr.Gallery
    settings: list[gr.Slider]
    chats: list[gr.Chatbot]
    question: gr.Textbox
    buttons: dict[str, gr.Button]
    views: list[gr.Gallery]
    history: gr.State


def _left_side(examples: Sequence[Path], upload_folder: Path) -> tuple[gr.Gallery, list[gr.Slider]]:
    images = gr.Gallery(
        label="Images for the next question",
        type="filepath",
        file_types=["image"],
        sources=["upload", "webcam", "clipboard"],
        interactive=True,
        columns=2,
        elem_id="images",
    )
    if examples:
        _shelf(examples, images, upload_folder)
    with gr.Accordion("Parameters", open=False):
        temperature = gr.Slider(0, 2, 0.2, step=0.1, label="Temperature (0: always the likeliest word)")
        top_p = gr.Slider(0.05, 1, 0.7, step=0.05, label="Top p")
        length = gr.Slider(16, 1024, 512, step=16, label="Longest answer, in tokens")
    return images, [temperature, top_p, length]


def _right_side(models: Sequence[ServedModel], images: gr.Gallery, settings: list[gr.Slider]) -> _Parts:
    with gr.Row(elem_classes="chats"):
        chats = [
            gr.Chatbot(
                label=model.name,
                placeholder="Add an image, then ask about it. Questions without an image are fine too.",
                elem_id=f"chat-{place}",
                elem_classes="chat",
                buttons=["copy"],
            )
            for place, model in enumerate(models)
        ]
    question = gr.Textbox(
        label="Question",
        show_label=False,
        placeholder="Ask about the images, then press Enter",
        autofocus=True,
        elem_id="question",
    )
    labels = {"send": "Send", "stop": "Stop", "again": "Regenerate", "clear": "Clear", "flag": "Flag"}
    with gr.Row(elem_classes="actions"):
        buttons = {
            name: gr.Button(label, variant="primary" if name == "send" else "secondary", elem_id=name, size="md")
            for name, label in labels.items()
        }
    with gr.Accordion("What the models see (a cell is a visual token)", open=False), gr.Row():
        views = [
            gr.Gallery(
                label=model.name,
                format="png",
                interactive=False,
                columns=2,
                fit_columns=False,
                object_fit="contain",
                elem_id=f"view-{place}",
                buttons=["fullscreen"],
            )
            for place, model in enumerate(models)
        ]
    return _Parts(images, settings, chats, question, buttons, views, gr.State(ChatHistory()))


def _connect(parts: _Parts, actions: _Actions) -> None:
    """Which action each button starts, and which components it reads and writes."""
    history, buttons = parts.history, parts.buttons
    asked = (
        [parts.question, parts.images, history, *parts.settings],
        [history, *parts.chats, parts.question, parts.images, *parts.views],
    )
    running: list[Any] = [
        parts.question.submit(actions.answer, *asked),
        buttons["send"].click(actions.answer, *asked),
        buttons["again"].click(actions.regenerate, [history, *parts.settings], [history, *parts.chats]),
    ]
    buttons["stop"].click(None, cancels=running, queue=False)
    everything = [history, parts.question, parts.images, *parts.chats, *parts.views]
    for clicked in (buttons["clear"].click, *(chat.clear for chat in parts.chats)):  # one model's own clears them all
        clicked(lambda: [ChatHistory(), "", *[None] * (len(everything) - 2)], None, everything, cancels=running)
    buttons["flag"].click(actions.flag, [history, *parts.settings])


class _Actions:
    """What the page's buttons do."""

    def __init__(self, models: Sequence[ServedModel], flags: Path, upload_folder: Path):
        self._models = models
        self._flags = flags
        self._upload_folder = upload_folder

    async def answer(
        self, text: str, files: list[Any] | None, now: ChatHistory, *values: float
    ) -> AsyncIterator[list[Any]]:
        """The models answer a question about further images."""
        with _errors_shown():
            paths = [file for file, _ in files or []]
            check_uploaded(paths, self._upload_folder)
            opened = await asyncio.to_thread(open_images, paths, now)
            async with aclosing(stream_answers(self._models, now, text, opened, _sampling(values))) as answering:
                shown = await asyncio.to_thread(_views, self._models, opened)
                box: list[Any] = ["", None, *shown]  # the question is asked: empty for the next
                async for later in answering:
                    yield [later, *_chats(self._models, later), *box]
                    box = [gr.skip()] * len(box)

    async def regenerate(self, now: ChatHistory, *values: float) -> AsyncIterator[list[Any]]:
        """The models answer the last question once more."""
        with _errors_shown():
            earlier, last = without_last(now)
            async with aclosing(
                stream_answers(self._models, earlier, last.question, last.images, _sampling(values))
            ) as answering:
                async for later in answering:
                    yield [later, *_chats(self._models, later)]

    def flag(self, now: ChatHistory, *values: float) -> None:
        """Keeps the conversation."""
        with _errors_shown():
            path = flag_conversation(self._models, now, _sampling(values), self._flags)
        gr.Info(f"kept in {path}")


def page_app(page: gr.Blocks, hosts: AllowedHosts, max_bytes: int) -> ASGIApp:
    """The page as an application for `run_server`.

    Args:
        hosts: names by which it may be called.
        max_bytes: of one uploaded file.
    """
    app: ASGIApp = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page.queue(default_concurrency_limit=16),
        path="/",
        show_error=False,
        max_file_size=max_bytes,
        theme=gr.themes.Soft(font=_FONTS, font_mono=["monospace"]),
        css=_STYLE,
        footer_links=[],
        ssr_mode=False,
    )
    # As `launch` does. Before, Gradio takes every path for one of its own, and would hand out any file of the machine.
    page.has_launched = True
    app = UploadLimit(app, Path(get_upload_folder()), uploads.MAX_TOTAL_BYTES)
    return _Guard(BodyLimit(app), hosts)


class _Guard:
    """ASGI middleware: answers to its own names only, and tells browsers to load nothing from elsewhere, whatever an
    answer's text asks for.
    """

    def __init__(self, app: ASGIApp, hosts: AllowedHosts):
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _OWN_CONTENT_ONLY
            await send(message)

        if scope["type"] != "lifespan" and Headers(scope=scope).get("host", "") not in self._hosts:
            refusal = PlainTextResponse("This page answers to loopback names and --allowed-hosts.", 403)
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send_with_policy)


def _shelf(examples: Sequence[Path], images: gr.Gallery, upload_folder: Path) -> None:
    """Images that a click puts among those of the next question."""
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

    shelf.click(add, [shelf, images], images)


def _chats(models: Sequence[ServedModel], history: ChatHistory) -> list[list[dict[str, Any]]]:
    return [_messages(history, place) for place in range(len(models))]


def _messages(history: ChatHistory, place: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for exchange in history.exchanges:
        shown: list[Any] = [*({"path": image.file} for image in exchange.images), exchange.question]
        messages.append({"role": "user", "content": shown})
        messages.append({"role": "assistant", "content": exchange.answers[place] or ""})
    return messages


def _views(models: Sequence[ServedModel], images: Sequence[UploadedImage]) -> list[Any]:
    """What each model sees of the latest images; a question without any leaves them."""
    if not images:
        return [gr.skip()] * len(models)
    return [[view for each in images for view in model_view(model.engine.loaded, each.image)] for model in models]


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
