"""What the page says when something is wrong: in place, in words, and it goes on."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import browsing, opened, problems_of, serving, until

from zimage_runtime.images.image_files import read_image_info

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.deep


def described_error(page: "Page", name: str) -> str:
    """The message that belongs to a field that is marked as invalid."""
    field = page.locator(f"#{name}")
    assert field.get_attribute("aria-invalid") == "true"
    return page.inner_text(f"#{field.get_attribute('aria-describedby')}")


def test_mistakes_refusals_and_a_server_that_is_gone(tmp_path: Path) -> None:
    limits = ("--max-queue", 1, "--max-steps", 40, "--max-pixels", "512x512")
    with browsing() as browser, serving(tmp_path / "images", *limits) as server:
        page = opened(browser, server)

        # mistakes are marked where they are, and the first of them has the focus
        page.fill("#steps", "41")
        page.fill("#seed", "-1")
        page.fill("#width", "1024")
        page.fill("#height", "1024")
        page.click("#generate")
        assert "40" in described_error(page, "steps")
        assert "262,144" in described_error(page, "width")
        assert described_error(page, "seed")
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.fill("#prompt", "a red circle")
        assert page.locator("#prompt").get_attribute("aria-invalid") is None
        page.fill("#seed", "1")
        page.fill("#width", "130")  # between two sizes on the grid
        page.locator("#width").blur()
        assert page.input_value("#width") == "128"

        # the server's own words, beside the button: one job runs, one waits, and a third is refused
        page.fill("#steps", "40")
        page.fill("#width", "256")
        page.fill("#height", "256")
        page.fill("#count", "16")
        page.click("#generate")
        page.wait_for_selector("progress")
        until(page, lambda: "tep" in page.inner_text(".progress p"), "the first step")
        for _ in range(2):
            until(page, lambda: page.locator("#generate").is_enabled(), "the button")
            page.click("#generate")
        page.wait_for_selector("#refused:visible")
        assert "queue" in page.inner_text("#refused") or "wait" in page.inner_text("#refused")

        # without the server, it says so and keeps trying; the jobs are lost, and the form works again
        port = int(server.address.rpartition(":")[2])
        server.stop()
        page.wait_for_selector("#offline:visible")
        with serving(tmp_path / "images", *limits, port=port) as server:
            until(page, lambda: not page.locator("progress").count(), "the end of the lost jobs")
            assert page.locator("#stage [role=alert]").is_visible()
            page.fill("#count", "1")
            page.fill("#steps", "1")
            page.get_by_text("4:3").click()
            page.click("#generate")
            until(page, lambda: not page.locator("#stage [role=alert]").count(), "an image of the new server")
            page.wait_for_selector(".canvas .look img")
            info = read_image_info(server.images()[-1])
            assert abs(info.width / info.height - 4 / 3) < 0.1
            assert not page.locator("#offline").is_visible()
            assert problems_of(page) == []
