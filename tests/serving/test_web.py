"""The page in a real browser: a picture is uploaded, a question asked, the answer seen as it comes, models compared."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny
from llava_npu import Sampling, UserError, answer_all
from llava_npu.models import compose, load
from llava_npu.serving.background import BackgroundEngine
from llava_npu.serving.engine import Engine
from llava_npu.serving.web.columns import Column, Talk, about, ask, flag, without_last
from llava_npu.training.launching import meeting_port

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PICTURE = Image.new("RGB", (60, 40), (200, 30, 30))
GREEDY = Sampling(24)


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[list[Column]]:
    """The tiny model, and one with another projector."""
    folder = tmp_path_factory.mktemp("other")
    language = tiny.write_language_model(folder / "lm", tie_word_embeddings=False, initializer_range=0.3)
    model, processor = compose(str(tiny.write_clip(folder / "clip")), str(language), "ldpv2", {"num_queries": 4})
    vocabulary = processor.tokenizer.get_vocab()
    letters = {number for token, number in vocabulary.items() if token.isascii() and token.isalpha()}
    pairs = [("mlp2x_gelu", load(model_folder, "cpu")), ("ldpv2", (model.eval(), processor))]
    for _, (each, _) in pairs:  # they write letters only, which a page shows as they are
        mute = [number for number in range(len(each.lm_head.weight)) if number not in letters]
        each.lm_head.weight.data[mute] = 0
    engines = [(name, Engine(*loaded, max_batch=2, max_length=192)) for name, loaded in pairs]
    columns = [Column(name, engine, BackgroundEngine(engine)) for name, engine in engines]
    for column in columns:
        column.background.start()
    yield columns
    for column in columns:
        column.background.stop()


def _last(talks: Iterator[Talk]) -> Talk:
    return list(talks)[-1]


def _offline(column: Column, question: str) -> str:
    # The engine's own thread is idle meanwhile: another engine on the same model.
    return answer_all(column.engine.model, column.engine.processor, [question], [[PICTURE]], sampling=GREEDY)[0]


def test_both_answer_the_same_question_each_with_its_own_history(columns: list[Column]) -> None:
    first = _last(ask(columns, Talk(PICTURE, source="a.png"), "What is it?", GREEDY))
    assert first.exchanges[0].answers == tuple(_offline(column, "What is it?") for column in columns)
    assert first.exchanges[0].answers[0] != first.exchanges[0].answers[1]
    second = _last(ask(columns, first, "Why?", GREEDY))
    alone = _last(ask(columns[:1], Talk(PICTURE, first.exchanges), "Why?", GREEDY))
    assert alone.exchanges[1].answers[0] == second.exchanges[1].answers[0]
    assert without_last(second) == (first, "Why?")
    assert about("a.png", first) is first
    assert about(None, first) == Talk()


def test_a_closed_answer_stops(columns: list[Column]) -> None:
    answering = ask(columns, Talk(PICTURE), "What is it?", Sampling(300))
    next(answering)
    answering.close()  # type: ignore[attr-defined]
    assert _last(ask(columns, Talk(), "Why?", GREEDY)).exchanges


def test_what_a_visitor_gets_wrong(columns: list[Column], tmp_path: Path) -> None:
    wrong = {"  ": "Write a question", "<image>": "cannot be written", "x " * 900: "together may"}
    for question, message in wrong.items():
        with pytest.raises(UserError, match=message):
            list(ask(columns, Talk(), question, GREEDY))
    with pytest.raises(UserError, match="Nothing has been asked"):
        without_last(Talk())
    with pytest.raises(UserError, match="nothing to flag"):
        flag(columns, Talk(), GREEDY, tmp_path)


@pytest.fixture(scope="module")
def address(columns: list[Column], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    pytest.importorskip("gradio", reason="the extra `web` is not installed")
    from llava_npu.serving.web.page import build_page, launch

    folder = tmp_path_factory.mktemp("page")
    PICTURE.save(folder / "example.png")
    page = build_page(columns, folder / "flags", [folder / "example.png"])
    yield launch(page, "127.0.0.1", meeting_port(), 2**20, block=False), folder
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no chromium here: apt-get install chromium")
    switches = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[*switches.split(), "--disable-component-update", "--disable-sync"],
            timeout=300_000,
        )
        yield browser
        browser.close()


@pytest.mark.slow
def test_in_a_browser(columns: list[Column], address: tuple[str, Path], browser: Any) -> None:
    url, folder = address
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(300_000)
    outside: list[str] = []
    page.on("request", lambda request: request.url.startswith((url, "data:", "blob:")) or outside.append(request.url))
    page.goto(url)
    page.get_by_text("Parameters").click()
    temperature = page.get_by_label("number input for Temperature (0: always the likeliest word)")
    temperature.fill("0")
    temperature.press("Tab")
    page.locator("#picture input[type=file]").set_input_files(str(folder / "example.png"))
    page.locator("#picture img").first.wait_for()

    question = page.locator("#question textarea")
    question.fill("What is it?")
    question.press("Enter")
    for place, column in enumerate(columns):
        answer = page.locator(f"#chat-{place} .bot").get_by_text(_offline(column, "What is it?"))
        answer.wait_for()
    if picture := os.environ.get("LLAVA_NPU_SCREENSHOT"):
        page.screenshot(path=picture)
    page.locator("#flag").click()
    page.get_by_text("kept in").wait_for()
    kept = json.loads((folder / "flags" / "flagged.jsonl").read_text())
    for column, answer in zip(columns, kept["exchanges"][0]["answers"], strict=True):
        assert answer.startswith(_offline(column, "What is it?"))
    assert (folder / "flags" / kept["image"]).is_file()
    page.locator("#clear").click()
    page.wait_for_function("document.querySelectorAll('#chat-0 .bot').length === 0")
    question.fill(" ")
    question.press("Enter")
    page.get_by_text("Write a question first").wait_for()
    assert not outside
    page.close()
