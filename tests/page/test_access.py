"""Whether everyone can use the page: axe-core's judgement, in light and dark; and no width makes it scroll sideways."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import Server, opened, problems_of, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.deep

LONG = "a red circle left of a blue square, 一个红色的圆形在一个蓝色的正方形的左边, " * 12 + "x" * 200
DEMO_IMAGE = Path(__file__).parents[2] / "docs" / "demo.png"
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


def test_lora_and_control_are_chosen_and_refused_in_words(server: Server, browser: "Browser") -> None:
    """This server has neither, but the page believes it has."""
    state = {"loras": [{"name": "styles/ink"}, {"name": "watercolour-landscapes-extended"}], "control": True}
    page = opened(browser, server, state=state)
    page.fill("#prompt", "a red circle")
    page.select_option("#lora-add", "styles/ink")
    page.fill("#loras input", "0.7")
    page.select_option("#lora-add", "watercolour-landscapes-extended")
    page.locator("#control input[type=file]").set_input_files(DEMO_IMAGE)
    page.select_option("#control-type", "canny")
    page.fill("#control-scale", "0.5")
    assert findings(page) == []
    assert_no_overflow(page)
    with page.expect_request(lambda sent: sent.url.endswith("/api/jobs") and sent.method == "POST") as sent:
        page.click("#generate")
    body = sent.value.post_data_json
    assert body["loras"] == [
        {"name": "styles/ink", "weight": 0.7},
        {"name": "watercolour-landscapes-extended", "weight": 1},
    ]
    assert body["control"]["image"].startswith("data:image/png;base64,")
    assert {**body["control"], "image": ""} == {"image": "", "type": "canny", "scale": 0.5, "start": 0, "end": 1}
    page.wait_for_selector("#refused:visible")
    assert "--lora-dir" in page.inner_text("#refused")
    page.get_by_role("button", name="Remove styles/ink").click()
    assert page.locator("#refused").is_hidden(), "what was said of the last job stands beside another one"
    assert page.locator(".lora").count() == 1
    assert problems_of(page) == []
