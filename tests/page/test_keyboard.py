"""The page by keyboard alone, in both languages, and what it remembers."""

from typing import TYPE_CHECKING

import pytest
from browser import Server, opened, problems_of, until

from zimage_runtime.images.image_files import read_image_info

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.deep

ENOUGH = 60  # presses of Tab: more than there are places to go


def focused(page: "Page") -> str:
    """The id of the focused element or, without one, its accessible name."""
    return str(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label') || ''"))


def tab_to(page: "Page", name: str, key: str = "Tab") -> None:
    """Presses Tab until an element has the focus, which must be visible there."""
    for _ in range(ENOUGH):
        page.keyboard.press(key)
        if focused(page) == name:
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"nothing shows that {name} has the focus"
            return
    pytest.fail(f"Tab does not reach {name}")


def test_everything_is_done_by_keyboard_in_chinese(server: Server, browser: "Browser") -> None:
    page = opened(browser, server, locale="zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-Hans"
    assert page.inner_text("label[for=prompt]") == "提示词"

    # the first stop leads past everything to the prompt
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert focused(page) == "prompt"
    page.keyboard.insert_text("一个红色的圆形")
    tab_to(page, "seed")
    page.keyboard.type("11")
    page.keyboard.press("Control+Enter")
    until(page, lambda: page.locator("#cards .card").count() == 1, "the image")
    until(page, lambda: "已生成 1" in page.inner_text("#announcer"), "a word about it for screen readers")
    assert read_image_info(server.images()[0]).prompt == "一个红色的圆形"

    # as input, and a mask painted with arrow keys; one stroke is undone and done again
    card = page.locator("#cards .open")
    tab_to(page, str(card.get_attribute("aria-label")))
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert focused(page) == "用作输入"
    page.keyboard.press("Enter")
    until(page, lambda: focused(page) == "paint-mask", "the focus on the mask")
    page.keyboard.press("Enter")
    assert focused(page) == "mask-canvas"
    strokes = ("Space", "Shift+ArrowRight", "Shift+ArrowRight", "]", "Shift+ArrowDown")
    for key in (*strokes, "Control+z", "Control+z", "Control+Shift+z"):
        page.keyboard.press(key)
    page.keyboard.press("Control+Enter")
    assert focused(page) == "paint-mask"
    page.keyboard.press("Control+Enter")
    until(page, lambda: page.locator("#cards .card").count() == 2, "the image with a mask")
    assert read_image_info(server.images()[1]).mask is not None

    # the viewer: arrows turn its pages, Escape closes it and gives the focus back
    card = page.locator("#cards .open").first
    card.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    assert page.locator("#viewer [data-by='1']").is_disabled(), "this is the oldest image"
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    assert focused(page) == card.get_attribute("aria-label")

    # the other language, which the browser remembers, as it does the form
    page.get_by_role("button", name="English").focus()
    page.keyboard.press("Enter")
    assert page.inner_text("label[for=prompt]") == "Prompt"
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("html").get_attribute("lang") == "en"
    assert (page.input_value("#prompt"), page.input_value("#seed")) == ("一个红色的圆形", "11")
    assert problems_of(page) == []
