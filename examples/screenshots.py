"""Makes the images of the documentation again, from a finished demo and a finished comparison.

    python examples/demo                                             # writes demo-run
    python examples/screenshots.py demo-run                          # docs/web.png, web-phone.png, demo.png
    python examples/screenshots.py demo-run --comparison runs/grid   # projectors-compared.png too

Needs Chromium and the packages of `llava-npu[web,dev]`. The chat page is started on both stages' models of the demo,
asked about one of its images, and photographed when the answers have ended.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "What is in the image?"
DESKTOP, PHONE = (1280, 800), (390, 844)
NUM_EXAMPLES = 6
MINUTES = 300_000  # milliseconds
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    options = parse_arguments()
    with browser() as chromium:
        photograph_chat(chromium, options.demo, options.into)
        photograph_file(chromium, options.demo / "report.html", options.into / "demo.png", (1200, 1900))
        if options.comparison:
            page = chromium.new_page(viewport={"width": 1240, "height": 900})
            page.goto((options.comparison / "index.html").resolve().as_uri())
            keep_sections(page, ("At a glance", "Pair by pair"))
            page.locator("main").screenshot(path=str(options.into / "projectors-compared.png"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder of a finished `python examples/demo`")
    parser.add_argument("--comparison", type=Path, help="the folder of a finished `llava-npu compare`")
    parser.add_argument("--into", type=Path, default=ROOT / "docs")
    return parser.parse_args()


@contextmanager
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        sys.exit("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def photograph_file(chromium: Browser, source: Path, target: Path, size: tuple[int, int]) -> None:
    page = chromium.new_page(viewport={"width": size[0], "height": size[1]})
    page.goto(source.resolve().as_uri())
    page.screenshot(path=str(target))
    page.close()


def keep_sections(page: Page, titles: tuple[str, ...]) -> None:
    """Hides what is in `main` but stands under other headings."""
    page.evaluate(
        """titles => {
            let kept = false;
            for (const each of document.querySelector("main").children) {
                if (each.tagName === "H2") kept = titles.includes(each.textContent.trim());
                if (!kept) each.style.display = "none";
            }
        }""",
        list(titles),
    )


def photograph_chat(chromium: Browser, demo: Path, into: Path) -> None:
    models = [demo / stage / "model" for stage in ("align", "finetune")]
    with tempfile.TemporaryDirectory() as name:
        examples = Path(name)
        for path in sorted((demo / "data/images").rglob("*.png"))[:: _stride(demo)][:NUM_EXAMPLES]:
            shutil.copy(path, examples)
        command = ["--model", str(models[0]), "--compare", str(models[1]), "--examples", str(examples)]
        with chat_page(command) as address:
            page = open_page(chromium, address, DESKTOP, dark=False)
            ask(page)
            page.get_by_text("What the models see").click()
            page.locator("#view-1 img").first.wait_for()
            settle(page)
            whole = {"x": 0, "y": 0, "width": DESKTOP[0], "height": 930}  # to the end of what the models see
            page.screenshot(path=str(into / "web.png"), full_page=True, clip=whole)
            page.close()
        with chat_page(command[:2]) as address:
            page = open_page(chromium, address, PHONE, dark=True)
            page.locator("#images input[type=file]").set_input_files(str(next(examples.iterdir())))
            ask(page, example=False)
            page.screenshot(path=str(into / "web-phone.png"))
            page.close()


def _stride(demo: Path) -> int:
    """Examples at even distances through the images."""
    return max(1, len(list((demo / "data/images").rglob("*.png"))) // NUM_EXAMPLES)


@contextmanager
def chat_page(options: list[str]) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "llava_npu", "web", "--device", "cpu", "--port", str(port), *options]
    with subprocess.Popen(command) as process:
        try:
            while not _answers(address):
                if process.poll() is not None:
                    sys.exit("the chat page does not start")
                time.sleep(1)
            yield address
        finally:
            process.terminate()


def _answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=10):
            return True
    except (URLError, TimeoutError):
        return False


def open_page(chromium: Browser, address: str, size: tuple[int, int], *, dark: bool) -> Page:
    page = chromium.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light")
    page.set_default_timeout(MINUTES)
    page.goto(address)
    page.locator("#question textarea").wait_for()
    return page


def ask(page: Page, *, example: bool = True) -> None:
    """Asks about an image and waits until the answers no longer grow."""
    if example:
        page.locator("#examples img").nth(2).click()
    page.locator("#images img").first.wait_for()
    question = page.locator("#question textarea")
    question.fill(QUESTION)
    question.press("Enter")
    page.locator("#chat-0 .bot").first.wait_for()
    page.wait_for_function("document.querySelectorAll('.generating').length === 0")  # Gradio's mark of unfinished parts
    settle(page)


def settle(page: Page) -> None:
    """Waits until the page's text has been the same for three seconds."""
    text: Any = None
    while text != (text := page.locator("body").inner_text()):
        page.wait_for_timeout(3000)


if __name__ == "__main__":
    main()
