"""The page itself, in Gradio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from llava_npu.errors import UserError
from llava_npu.serving.generation import Sampling
from llava_npu.serving.web.columns import Column, Talk, about, ask, flag, without_last

_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # of this machine: nothing is loaded from elsewhere


def build_page(columns: Sequence[Column], flags: Path, examples: Sequence[Path] = ()) -> gr.Blocks:
    """A page that talks with one model, or with two side by side about the same picture.

    Args:
        columns: the models; their engines run.
        flags: folder for flagged conversations.
        examples: pictures to click on.
    """
    names = " and ".join(column.name for column in columns)
    with gr.Blocks(title=f"LLaVA-NPU: {names}", analytics_enabled=False) as page:
        gr.Markdown(f"### {names}")
        talk = gr.State(Talk())
        with gr.Row():
            with gr.Column(scale=2):
                picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    height=320,
                    elem_id="picture",
                )
                if examples:
                    gr.Examples([str(path) for path in examples], picture, label="Examples")
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
                    show_label=False, placeholder="Ask about the picture, then press Enter", elem_id="question"
                )
                with gr.Row():
                    send = gr.Button("Send", variant="primary", elem_id="send", min_width=80)
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
                    again = gr.Button("Regenerate", elem_id="again", min_width=80)
                    clear = gr.Button("Clear", elem_id="clear", min_width=80)
                    keep = gr.Button("Flag", elem_id="flag", min_width=80)
        settings = [temperature, top_p, length]

        def answer(text: str, path: str | None, now: Talk, *values: float) -> Iterator[list[Any]]:
            # Another picture starts another conversation, as users of LLaVA's page know it.
            yield from _shown(columns, _or_error(lambda: about(path, now)), text, _sampling(values))

        def regenerate(now: Talk, *values: float) -> Iterator[list[Any]]:
            earlier, text = _or_error(lambda: without_last(now))
            yield from _shown(columns, earlier, text, _sampling(values))

        def keep_talk(now: Talk, *values: float) -> None:
            path = _or_error(lambda: flag(columns, now, _sampling(values), flags))
            gr.Info(f"kept in {path}")

        outputs = [talk, *chats, question]
        running: list[Any] = [
            question.submit(answer, [question, picture, talk, *settings], outputs),
            send.click(answer, [question, picture, talk, *settings], outputs),
            again.click(regenerate, [talk, *settings], outputs),
        ]
        stop.click(None, cancels=running, queue=False)
        emptied = [picture, talk, question, *chats]
        for clicked in (clear.click, *(chat.clear for chat in chats)):  # a column's own button means the whole talk
            clicked(lambda: [None, Talk(), "", *[[] for _ in columns]], None, emptied, cancels=running)
        keep.click(keep_talk, [talk, *settings])
    return page


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
            footer_links=[],
            ssr_mode=False,
        )
    except OSError as error:
        raise UserError(f"--port {port}: in use on {host}, or not ours to take ({error}); choose another") from error
    return str(address)


def _shown(columns: Sequence[Column], talk: Talk, text: str, sampling: Sampling) -> Iterator[list[Any]]:
    answering = ask(columns, talk, text, sampling)
    try:
        for now in answering:
            yield [now, *(_messages(now, place) for place in range(len(columns))), ""]
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
    finally:
        answering.close()  # type: ignore[attr-defined]


def _messages(talk: Talk, column: int) -> list[dict[str, str]]:
    messages = []
    for exchange in talk.exchanges:
        messages.append({"role": "user", "content": exchange.question})
        messages.append({"role": "assistant", "content": exchange.answers[column] or ""})
    return messages


def _sampling(values: Sequence[float]) -> Sampling:
    temperature, top_p, length = values
    return _or_error(lambda: Sampling(int(length), temperature=float(temperature), top_p=float(top_p)))


def _or_error(work: Any) -> Any:
    """What a visitor got wrong is shown on the page."""
    try:
        return work()
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
