"""The server and a browser, for tests of the page: both end with the block that started them.

Needs a Chromium, at /usr/bin/chromium or named by the environment's CHROMIUM. Where there is none a test is skipped
with the reason, and fails if the environment says `CI=true`.
"""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import pytest
from cli_tools import start

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",  # a container's may be too small
]

PATIENCE = 60.0  # seconds until something that should happen counts as not happening


def require_chromium() -> None:
    """Skips a test that has no browser, or fails it in CI."""
    if os.access(CHROMIUM, os.X_OK):
        return
    why = f"no Chromium at {CHROMIUM}: install it, or set CHROMIUM to its path"
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


@dataclass(frozen=True)
class Server:
    """A running `zimage-rt serve` with the demo bundle."""

    address: str
    folder: Path  # where it keeps images
    process: "subprocess.Popen[str]"

    def images(self) -> list[Path]:
        """The images it has, oldest first."""
        return sorted(self.folder.glob("zimage-*.png"))

    def stop(self) -> None:
        """Kills it, and waits until its engine has noticed."""
        self.process.kill()
        self.process.communicate(timeout=60)


@contextlib.contextmanager
def serving(folder: Path, *arguments: object, port: int = 0) -> Iterator[Server]:
    """A server on a free port, or on a given one."""
    options = ("--executor", "cpu", "--host", "127.0.0.1", "--port", port, "--output-dir", folder)
    process = start("zimage-rt", "serve", *options, *arguments, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    if not found:
        process.kill()
        pytest.fail(f"the server did not start: {line}{process.communicate()[0]}")
    server = Server(found[0], folder, process)
    try:
        yield server
    finally:
        if process.poll() is None:
            server.stop()


@contextlib.contextmanager
def browsing() -> Iterator["Browser"]:
    """The system's Chromium. Playwright keeps an event loop in this thread, so it ends with the test."""
    require_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def opened(browser: "Browser", server: Server, *, state: Mapping[str, object] | None = None, **options: Any) -> "Page":
    """The page in a context of its own, once it is ready. `state` replaces parts of what the server says of itself.

    Errors of its scripts, and whatever it asks of another address, are in `problems_of`.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-US", **options})
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    noted: list[str] = []
    _PROBLEMS[page] = noted

    def note_refusal(message: "ConsoleMessage") -> None:
        if "Content Security Policy" in message.text:
            noted.append(message.text)

    def note_address(request: "Request") -> None:
        if not request.url.startswith((server.address, "data:", "blob:")):
            noted.append(f"asked for {request.url}")

    page.on("pageerror", lambda error: noted.append(f"error in a script: {error}"))
    page.on("console", note_refusal)
    page.on("request", note_address)
    if state is not None:
        page.route("**/api/state", lambda route: route.fulfill(json=route.fetch().json() | state))
    page.goto(server.address)
    page.wait_for_selector("html[data-ready]")
    return page


_PROBLEMS: "WeakKeyDictionary[Page, list[str]]" = WeakKeyDictionary()


def problems_of(page: "Page") -> list[str]:
    """Errors of scripts, what the policy refused, and addresses elsewhere that the page asked for, so far."""
    return _PROBLEMS[page]


def until(page: "Page", holds: Callable[[], object], what: str) -> None:
    """Waits until something holds. Playwright's own way would evaluate text, which the page's policy refuses."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"never happened: {what}"
        page.wait_for_timeout(20)
