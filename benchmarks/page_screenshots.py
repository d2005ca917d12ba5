"""Screenshots of the server's page at three widths, from images that the demo model generates for them.

    python benchmarks/page_screenshots.py docs/images

Needs Chromium, at /usr/bin/chromium or named by CHROMIUM, Playwright's Python package, and a font for Chinese.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
SERVE = "from zimage_rt.cli import main; main()"

MADE_BEFORE = (  # prompt, width, height, seed
    ("a green heart above a purple ring", 128, 192, 3),
    ("an orange triangle on a light blue background", 128, 128, 4),
    ("a large yellow star on a black background", 128, 128, 8),
    ("黄色背景上的一个蓝色心形", 128, 128, 2),
    ("a purple ring right of a yellow square", 192, 128, 6),
    ("two green squares", 128, 128, 1),
    ("a small red heart in the middle, pink background", 128, 128, 5),
    ("一个绿色三角形和一个橙色圆形", 128, 128, 9),
    ("a red circle left of a blue square", 128, 128, 7),
)


@dataclass(frozen=True)
class Shot:
    """One screenshot."""

    name: str
    width: int
    height: int
    locale: str
    scheme: str
    prompt: str
    running: bool = False  # with a job at work and two that wait


SHOTS = (
    Shot("page-360", 360, 780, "zh-CN", "light", "一个红色的圆形在一个蓝色的正方形的左边"),
    Shot("page-1024", 1024, 768, "en-US", "dark", "a red circle left of a blue square", running=True),
    Shot("page-1920", 1920, 1080, "en-US", "light", "a red circle left of a blue square"),
)


def main(folder: Path) -> None:
    """Writes a PNG for each of `SHOTS`."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as images, serving(Path(images)) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = visit(browser, address, SHOTS[-1])
        for prompt, width, height, seed in MADE_BEFORE:
            generate(page, prompt=prompt, width=width, height=height, seed=seed)
            page.wait_for_selector(".canvas .look")
        for shot in sorted(SHOTS, key=lambda shot: shot.running):  # what runs would be in the others
            path = folder / f"{shot.name}.png"
            with Image.open(io.BytesIO(taken(browser, address, shot))) as image:
                image.save(path, optimize=True)
            print(path)
        browser.close()


@contextmanager
def serving(images: Path) -> Iterator[str]:
    """The address of a server with the demo bundle."""
    command = [sys.executable, "-c", SERVE, "serve", "--port", "0", "--output-dir", str(images), "--executor", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        if not found:
            sys.exit("the server did not start")
        yield found[0]
    finally:
        process.terminate()
        process.communicate()


def visit(browser: "Browser", address: str, shot: Shot) -> "Page":
    """The page, ready."""
    size = {"width": shot.width, "height": shot.height}
    context = browser.new_context(viewport=size, locale=shot.locale, color_scheme=shot.scheme)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    return page


def generate(page: "Page", **fields: object) -> None:
    """Fills the form and presses the button."""
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.click("#generate")
    page.wait_for_selector("progress")


def taken(browser: "Browser", address: str, shot: Shot) -> bytes:
    """A PNG of the page with an image, or with one at work."""
    page = visit(browser, address, shot)
    page.fill("#prompt", shot.prompt)
    if shot.running:
        generate(page, width=192, height=192, steps=40, count=16, seed=7)
        for prompt in ("a large yellow star", "一个绿色的心形"):
            page.fill("#prompt", prompt)
            page.click("#generate")
            page.wait_for_selector(f".queue li:has-text('{prompt}')")
        while not re.match(r"Image 3 .* Step [123]\d ", page.inner_text(".progress p")):
            page.wait_for_timeout(5)
    page.wait_for_selector("#plan summary")
    page.evaluate("document.activeElement.blur()")
    if not shot.running:
        page.wait_for_load_state("networkidle")
    image = page.screenshot()
    if shot.running:
        for _ in range(3):
            page.keyboard.press("Escape")
            page.wait_for_timeout(300)
    return image


if __name__ == "__main__":
    main(Path(sys.argv[1]))
