"""The page in a real browser: pictures uploaded, questions asked, answers seen growing, stopped, given once more."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_npu import Sampling, UserError, answer_all
from llava_npu.inference.engine import InferenceEngine
from llava_npu.models import compose, load
from llava_npu.models.loaded import LoadedModel
from llava_npu.serving.addresses import AllowedHosts
from llava_npu.serving.background import BackgroundEngine
from llava_npu.serving.web.conversation import (
    ChatHistory,
    Exchange,
    ServedModel,
    UploadedImage,
    flag_conversation,
    open_images,
    stream_answers,
    without_last,
)
from llava_npu.serving.web.model_view import model_view
from support import tiny
from support.running import running_app

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PICTURE = UploadedImage("red.png", Image.new("RGB", (60, 40), (200, 30, 30)))
OTHER = UploadedImage("green.png", Image.new("RGB", (40, 40), (30, 200, 30)))
GREEDY = Sampling(32)
FURTHER = "And this ![cat](http://elsewhere.invalid/cat.png)?"  # shown as Markdown, as answers are
MINUTES = 300_000  # in milliseconds: what is waited for comes, on a slow machine later


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[list[ServedModel]]:
    """The tiny model, and one with another projector."""
    folder = tmp_path_factory.mktemp("other")
    language = tiny.write_language_model(folder / "lm", tie_word_embeddings=False, initializer_range=0.3)
    model, processor = compose(str(tiny.write_clip(folder / "clip")), str(language), "ldpv2", {"num_queries": 4})
    vocabulary = processor.tokenizer.get_vocab()
    letters = {number for token, number in vocabulary.items() if token.isascii() and token.isalpha()}
    pairs = [("mlp2x_gelu", load(model_folder, "cpu")), ("ldpv2", LoadedModel(model.eval(), processor))]
    for _, (each, _) in pairs:  # they write letters only, which a page shows as they are
        mute = [number for number in range(len(each.lm_head.weight)) if number not in letters]
        each.lm_head.weight.data[mute] = 0
    engines = [(name, InferenceEngine(loaded, max_batch=2, max_length=256)) for name, loaded in pairs]
    columns = [ServedModel(name, engine, BackgroundEngine(engine)) for name, engine in engines]
    for column in columns:
        column.background.start()
    yield columns
    for column in columns:
        column.background.stop()


def _last(talks: AsyncIterator[ChatHistory]) -> ChatHistory:
    async def run() -> ChatHistory:
        return [talk async for talk in talks][-1]

    return asyncio.run(run())


def _offline(column: ServedModel, question: str, *pictures: UploadedImage, sampling: Sampling = GREEDY) -> str:
    # The engine's own thread is idle meanwhile: another engine on the same model.
    images = [[picture.image for picture in pictures]]
    return answer_all(column.engine.loaded, [question], images, sampling=sampling)[0]


def test_both_answer_the_same_question_each_with_its_own_history(columns: list[ServedModel]) -> None:
    first = _last(stream_answers(columns, ChatHistory(), "What is it?", [PICTURE], GREEDY))
    assert first.exchanges[0].answers == tuple(_offline(column, "What is it?", PICTURE) for column in columns)
    assert first.exchanges[0].answers[0] != first.exchanges[0].answers[1]
    second = _last(stream_answers(columns, first, "Why?", [], GREEDY))
    alone = _last(stream_answers(columns[:1], first, "Why?", [], GREEDY))
    assert alone.exchanges[1].answers[0] == second.exchanges[1].answers[0]
    assert without_last(second) == (first, second.exchanges[1])


def test_several_pictures_in_several_turns(columns: list[ServedModel]) -> None:
    """Each stands where it was shown, also where a column answered nothing: its next prompt still has the picture."""
    talk = ChatHistory((Exchange("What is it?", (PICTURE,), ("a square", "")),))
    turns, images = talk.prompt(0, "Is <image> or <image> red?", [OTHER, PICTURE])
    assert [turn["value"] for turn in turns] == [
        "<image>\nWhat is it?", "a square", "Is <image> or <image> red?"
    ]  # fmt: skip
    assert images == [PICTURE.image, OTHER.image, PICTURE.image]
    turns, images = talk.prompt(1, "And this?", [OTHER])
    assert [turn["value"] for turn in turns] == ["<image>\n<image>\nAnd this?"]
    assert images == [PICTURE.image, OTHER.image]
    both = _last(stream_answers(columns, ChatHistory(), "Which?", [PICTURE, OTHER], GREEDY))
    assert both.exchanges[0].answers == tuple(_offline(column, "Which?", PICTURE, OTHER) for column in columns)


def test_a_closed_answer_stops(columns: list[ServedModel]) -> None:
    async def leave() -> None:
        answering = stream_answers(columns, ChatHistory(), "What is it?", [PICTURE], Sampling(100))
        await anext(answering)
        await answering.aclose()

    asyncio.run(leave())
    assert _last(stream_answers(columns, ChatHistory(), "Why?", [], GREEDY)).exchanges
    assert not any(column.engine.num_running for column in columns)


def test_what_a_visitor_gets_wrong(columns: list[ServedModel], tmp_path: Path) -> None:
    wrong = {
        "  ": "Write a question",
        "<image>": "Write a question",
        "<image>?": "0 images",
        "x " * 900: "together may",
    }
    for question, message in wrong.items():
        with pytest.raises(UserError, match=message):
            _last(stream_answers(columns, ChatHistory(), question, [], GREEDY))
    with pytest.raises(UserError, match="Nothing has been asked"):
        without_last(ChatHistory())
    with pytest.raises(UserError, match="nothing to flag"):
        flag_conversation(columns, ChatHistory(), GREEDY, tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"image 1: .*text\.png: not an image"):
        open_images([str(tmp_path / "text.png")], ChatHistory())
    with pytest.raises(UserError, match="room for 8 images"):
        open_images(["a.png"] * 8, ChatHistory((Exchange("What?", (PICTURE,), ("a", "b")),)))


def test_what_is_shown_is_what_the_tower_gets(columns: list[ServedModel]) -> None:
    """Padded to a square with the mean colour, resized, and as many cells as there are tokens."""
    mlp, ldpv2 = (model_view(column.engine.loaded, PICTURE.image) for column in columns)
    ((picture, line),) = mlp
    assert line == "16 tokens, 4×4"
    assert [line for _, line in ldpv2] == ["4 tokens, 2×2"]
    pixels = np.asarray(picture).astype(int)
    cell = picture.width // 4
    mean = [int(255 * channel) for channel in columns[0].engine.processor.image_processor.image_mean]
    assert abs(pixels[picture.height // 2 + 5, cell // 2] - np.array([200, 30, 30])).max() <= 2
    assert abs(pixels[2, cell // 2] - np.array(mean)).max() <= 2
    assert abs(pixels[2, cell] - np.array(mean)).max() > 20  # a line between two cells


class Turnstile:
    """Lets an engine make its steps one by one, as the test says."""

    def __init__(self, engine: InferenceEngine):
        self._step = engine.step
        self._allowed = threading.Semaphore(0)
        self._engine = engine
        self._open = True
        engine.step = self._pass  # type: ignore[method-assign]

    def close(self) -> None:
        """While it has nothing to do."""
        while self._allowed.acquire(blocking=False):
            pass
        self._open = False

    def let(self, steps: int) -> None:
        self._allowed.release(steps)

    def open(self) -> None:
        self._open = True
        self._allowed.release()

    def _pass(self) -> Any:
        if not self._open:
            self._allowed.acquire()
        return self._step()

    @property
    def requests(self) -> list[Any]:
        return [each.request for each in self._engine._running]


@pytest.fixture
def turnstiles(columns: list[ServedModel]) -> Iterator[list[Turnstile]]:
    turnstiles = [Turnstile(column.engine) for column in columns]
    yield turnstiles
    for turnstile, column in zip(turnstiles, columns, strict=True):
        turnstile.open()
        column.engine.step = turnstile._step  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def address(columns: list[ServedModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    pytest.importorskip("gradio", reason="the extra `web` is not installed")
    from llava_npu.serving.web.page import build_page, page_app

    folder = tmp_path_factory.mktemp("page")
    for picture in (PICTURE, OTHER):
        picture.image.save(folder / picture.file)
    (folder / "text.png").write_text("no picture")
    page = build_page(columns, folder / "flags", [folder / "red.png", folder / "green.png"])
    with running_app(page_app(page, AllowedHosts(), 2**20)) as url:
        yield url, folder


@contextmanager
def _browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no chromium here: apt-get install chromium")
    switches = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[*switches.split(), "--disable-component-update", "--disable-sync"],
            timeout=MINUTES,
        )
        yield browser
        browser.close()


@pytest.mark.slow
def test_in_a_browser(columns: list[ServedModel], address: tuple[str, Path], turnstiles: list[Turnstile]) -> None:
    url, folder = address
    begun: list[list[Any]] = []
    whole: list[list[Any]] = []
    for kept, sampling in ((begun, Sampling(3)), (whole, GREEDY)):
        kept.append([_offline(column, "What is it?", PICTURE, sampling=sampling) for column in columns])
    talk = ChatHistory((Exchange("What is it?", (PICTURE,), tuple(whole[0])),))
    for kept, sampling in ((begun, Sampling(3)), (whole, GREEDY)):
        kept.append(list(_last(stream_answers(columns, talk, FURTHER, [OTHER], sampling)).exchanges[-1].answers))
    with _browser() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(MINUTES)
        outside: set[str] = set()
        refused: set[str] = set()  # by the page's own policy, before anything was sent
        page.on("request", lambda each: each.url.startswith((url, "data:", "blob:")) or outside.add(each.url))
        page.on("requestfailed", lambda each: "csp" in (each.failure or "").lower() and refused.add(each.url))
        page.goto(url)
        page.get_by_text("Parameters").click()
        for name, value in {
            "Temperature (0: always the likeliest word)": "0",
            "Longest answer, in tokens": "32",
        }.items():
            page.get_by_label(f"number input for {name}").fill(value)
            page.get_by_label(f"number input for {name}").press("Tab")
        _talk_on_the_page(page, columns, turnstiles, folder, begun, whole)
        assert outside == refused  # what the text of a question named, if anything
        page.close()


def _talk_on_the_page(
    page: Any,
    columns: list[ServedModel],
    turnstiles: list[Turnstile],
    folder: Path,
    begun: list[list[Any]],
    whole: list[list[Any]],
) -> None:
    """`begun`, `whole`: both columns' first and second answers, after three tokens and at their end.

    No button is used again before others were: Gradio takes no click while it thinks that the last one's work goes on.
    """
    question = page.locator("#question textarea")
    answers = [page.locator(f"#chat-{place} .bot") for place in range(2)]

    def text(place: int, number: int = 0) -> str:
        return answers[place].nth(number).inner_text().strip() if answers[place].count() > number else ""

    def until(condition: Callable[[], bool]) -> None:
        for _ in range(MINUTES // 50):
            if condition():
                return
            page.wait_for_timeout(50)
        page.screenshot(path=str(folder / "stuck.png"))
        raise AssertionError(f"it does not happen: {folder / 'stuck.png'}")

    def shown(number: int = 0) -> list[str]:
        return [text(place, number) for place in range(2)]

    # A picture is uploaded, a question asked, and the answers are seen while they grow.
    page.locator("#images input[type=file]").set_input_files(str(folder / "red.png"))
    page.locator("#images img").first.wait_for()
    for turnstile in turnstiles:
        turnstile.close()
    question.fill("What is it?")
    question.press("Enter")
    for turnstile in turnstiles:
        turnstile.let(3)
    until(lambda: shown() == begun[0])
    page.locator("#chat-0 .user img").wait_for()  # the picture went from its box into the conversation
    until(lambda: page.locator("#images img").count() == 0)
    for turnstile in turnstiles:
        turnstile.open()
    until(lambda: shown() == whole[0])
    page.get_by_text("What the models see").click()
    page.locator("#view-0").get_by_text("16 tokens, 4×4").wait_for()
    if picture := os.environ.get("LLAVA_NPU_SCREENSHOT"):
        page.screenshot(path=picture)

    # Regenerate: they grow once more.
    for turnstile in turnstiles:
        turnstile.close()
    page.locator("#again").click()
    for turnstile in turnstiles:
        turnstile.let(3)
    until(lambda: shown() == begun[0])
    for turnstile in turnstiles:
        turnstile.open()
    until(lambda: shown() == whole[0])

    # Another picture in a later turn, from the examples. Stopped half-way no more comes, and the engine is free again.
    page.locator("#examples img").nth(1).click()
    page.locator("#images img").first.wait_for()
    for turnstile in turnstiles:
        turnstile.close()
    question.fill(FURTHER)
    page.locator("#send").click()
    for turnstile in turnstiles:
        turnstile.let(3)
    until(lambda: shown(1) == begun[1])
    page.locator("#stop").click()
    until(lambda: all(request.cancelled for turnstile in turnstiles for request in turnstile.requests))
    for turnstile in turnstiles:
        turnstile.open()
    until(lambda: not any(column.engine.num_running for column in columns))
    assert shown(1) == begun[1]
    page.locator("#again").click()
    until(lambda: shown(1) == whole[1])

    page.locator("#flag").click()
    page.get_by_text("kept in").wait_for()
    kept = json.loads((folder / "flags" / "flagged.jsonl").read_text())
    assert [each["answers"] for each in kept["exchanges"]] == whole
    assert all((folder / "flags" / name).is_file() for each in kept["exchanges"] for name in each["images"])
    assert [len(each["images"]) for each in kept["exchanges"]] == [1, 1]
    page.locator("#clear").click()
    until(lambda: page.locator("#chat-0 .bot").count() == 0)
    question.fill(" ")
    question.press("Enter")
    page.get_by_text("Write a question first").wait_for()
    page.locator("#images input[type=file]").set_input_files(str(folder / "text.png"))
    page.locator("#images img").first.wait_for()
    question.fill("What is it?")
    question.press("Enter")
    page.get_by_text("not an image").wait_for()


def test_a_phone_shows_question_and_buttons_at_once(address: tuple[str, Path]) -> None:
    width, height = 390, 844
    with _browser() as browser:
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(MINUTES)
        page.goto(address[0])
        for name in ("#question textarea", "#send", "#stop", "#again", "#clear", "#flag"):
            element = page.locator(name)
            element.wait_for()
            box = element.bounding_box()
            assert 0 <= box["x"] <= box["x"] + box["width"] <= width, name
            assert element.evaluate("each => each.scrollWidth <= each.clientWidth + 1"), name  # its text fits
            assert box["y"] + box["height"] <= (height if "question" in name else 1.5 * height), (name, box)
        page.close()
