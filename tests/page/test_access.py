"""Whether everyone can use the page: axe-core's judgement, in light and dark; and no width makes it scroll sideways."""

import re
from typing import TYPE_CHECKING

import pytest
from browser import Server, opened, problems_of, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.deep

LONG = "a red circle left of a blue square, 一个红色的圆形在一个蓝色的正方形的左边, " * 12 + "x" * 200
WIDTHS = (320, 360, 1024, 1920)


def findings(page: "Page") -> list[str]:
    """What axe-core finds of serious or critical impact, with the elements."""
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    serious = [one for one in violations if one["impact"] in ("serious", "critical")]
    return [f"{one['id']}: {node['html'][:200]}" for one in serious for node in one["nodes"]]


def assert_no_overflow(page: "Page") -> None:
    """Nothing is wider than the window, at any width."""
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == width


def is_dark(page: "Page") -> bool:
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", paper)[:3])) < 3 * 128


def test_axe_finds_nothing_serious(server: Server, browser: "Browser") -> None:
    page = opened(browser, server)
    assert not is_dark(page)
    assert findings(page) == [], "empty"
    page.fill("#prompt", LONG)
    page.click("#more summary")
    page.fill("#negative", LONG)
    page.fill("#steps", "999")
    page.click("#generate")
    assert findings(page) == [], "with an error"
    page.fill("#steps", "2")
    page.fill("#count", "2")
    page.click("#generate")
    until(page, lambda: page.locator("#cards .card").count() == 2 and not page.locator("progress").count(), "images")
    page.click("#stage [data-act=as-input]")
    page.click("#paint-mask")
    assert findings(page) == [], "painting"
    assert_no_overflow(page)
    page.keyboard.press("Escape")
    assert_no_overflow(page)
    assert problems_of(page) == []

    page = opened(browser, server, color_scheme="dark", locale="zh-CN")
    assert is_dark(page)
    assert findings(page) == [], "with images"
    page.locator("#cards .open").first.click()
    assert findings(page) == [], "viewing"
    assert_no_overflow(page)
    assert problems_of(page) == []
