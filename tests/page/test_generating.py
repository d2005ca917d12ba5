"""The page in a browser: from a prompt to images, and what one does with them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from browser import Server, opened, problems_of, until
from PIL import Image

from zimage_runtime.images.image_files import read_image_info

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.deep

PROMPT = "a red circle left of a blue square"


def generate(page: "Page", **fields: object) -> None:
    """Fills fields by their ids and presses the button."""
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.click("#generate")


def finished(page: "Page", images: int) -> None:
    """Waits until so many images are in the gallery and nothing runs."""
    until(page, lambda: cards(page).count() == images and not page.locator("progress").count(), f"{images} images")


def cards(page: "Page") -> "Locator":
    return page.locator("#cards .card")


def pixels(path: Path) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_prompt_becomes_images_that_are_found_again(server: Server, browser: "Browser") -> None:
    page = opened(browser, server)
    assert page.locator("#gallery-empty").is_visible()
    until(page, lambda: "MiB" in page.inner_text("#plan"), "the memory plan before anything is pressed")

    # long enough that previews are seen and the job is cancelled while it runs
    generate(page, prompt=PROMPT, width=256, height=256, steps=50, count=16)
    until(page, lambda: page.locator(".canvas img").get_attribute("src") is not None, "a preview")
    first = page.locator(".canvas img").get_attribute("src") or ""
    assert first.startswith("data:image/")
    until(page, lambda: page.locator(".canvas img").get_attribute("src") != first, "another preview")
    assert 0 < float(page.locator("progress").evaluate("bar => bar.value")) < 1

    # a second job waits; a reload finds both; Escape cancels the one that runs, and the other one runs
    generate(page, prompt="a yellow star", width=128, height=128, steps=8, count=2, seed=7)
    until(page, lambda: page.locator(".queue li").count() == 1, "the second job in the queue")
    page.reload()
    until(page, lambda: page.locator("progress").count() == 1, "the running job after a reload")
    assert page.locator(".queue li").inner_text().endswith("a yellow star")
    assert page.input_value("#prompt") == "a yellow star"
    made = len(server.images())
    page.keyboard.press("Escape")
    until(
        page, lambda: len([path for path in server.images() if read_image_info(path).seed == 8]) == 1, "the second job"
    )
    finished(page, len(server.images()))
    assert len(server.images()) - made in (2, 3), "what was cancelled went on"  # it may have just finished one

    # the same in a new visit
    page.reload()
    finished(page, len(server.images()))
    assert page.locator(".canvas img").get_attribute("src") == cards(page).first.locator("img").get_attribute("src")
    assert problems_of(page) == []


def test_an_image_is_made_again_varied_used_as_input_and_deleted(server: Server, browser: "Browser") -> None:
    page = opened(browser, server)
    generate(page, prompt=PROMPT, seed=2**64 - 1)  # more than JavaScript's numbers can hold
    finished(page, 1)
    page.click("[data-act=again]")
    finished(page, 2)
    first, again = server.images()
    assert read_image_info(first).seed == read_image_info(again).seed == 2**64 - 1
    assert (pixels(first) == pixels(again)).all()

    page.click("[data-act=vary]")
    finished(page, 3)
    info = read_image_info(server.images()[-1])
    assert (info.prompt, info.steps) == (PROMPT, 8)
    assert info.seed != 2**64 - 1

    # from an image, with a mask: what is not painted stays
    page.locator("#stage [data-act=as-input]").click()
    page.click("#paint-mask")
    canvas = page.locator("#mask-canvas")
    box = canvas.bounding_box()
    assert box
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.7 * box["height"], steps=4)
    page.mouse.up()
    page.click("#mask-done")
    source = server.images()[-1]
    generate(page, prompt="a green heart", seed=5)
    finished(page, 4)
    info = read_image_info(server.images()[-1])
    assert info.mask is not None
    assert info.strength == 1.0
    change = np.abs(pixels(source).astype(int) - pixels(server.images()[-1])).mean(axis=(1, 2)[1:] or 2)
    kept, repainted = change[:, :48].mean(), change[48:80, 88:104].mean()
    assert repainted > 4 * kept + 4, f"left {kept}, painted {repainted}"

    # its settings in the viewer; deleted there, after a question
    cards(page).first.locator(".open").click()
    facts = page.inner_text("#viewer dl")
    assert "a green heart" in page.inner_text("#viewer .words")
    assert "Seed\n5" in facts
    page.locator("#viewer [data-act=delete]").click()
    page.locator("#ask button[value=keep]").click()
    assert len(server.images()) == 4
    page.locator("#viewer [data-act=delete]").click()
    page.locator("#ask button[value=delete]").click()
    until(page, lambda: cards(page).count() == 3, "one image less")
    assert len(server.images()) == 3
    assert problems_of(page) == []


def test_files_are_dropped_and_pasted_and_cropped_to_the_size(
    server: Server, browser: "Browser", tmp_path: Path
) -> None:
    photograph = tmp_path / "photograph.png"
    Image.new("RGB", (300, 100), "blue").save(photograph)
    page = opened(browser, server)
    page.locator("#source input[type=file]").set_input_files(photograph)
    page.wait_for_selector("#strength")
    assert "cropped" in page.inner_text("#source")
    page.click("#source .held-tools .field button")  # its own shape instead
    assert "cropped" not in page.inner_text("#source")
    width, height = (int(page.input_value(f"#{side}")) for side in ("width", "height"))
    assert (width % 16, height % 16) == (0, 0)
    assert abs(width / height - 3) < 0.5

    page.click("#source .buttons button >> nth=1")  # removes it
    drop = """([root, bytes, kind, name]) => {
        const file = new File([new Uint8Array(bytes)], name, {type: kind});
        const data = new DataTransfer();
        data.items.add(file);
        const target = name === "dropped" ? document.getElementById(root) : document.body;
        const event = name === "dropped"
            ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true});
        target.dispatchEvent(event);
    }"""
    page.evaluate(drop, ["source", list(photograph.read_bytes()), "image/png", "dropped"])
    page.wait_for_selector("#strength")
    page.click("#source .buttons button >> nth=1")
    page.evaluate(drop, ["source", list(b"no image"), "image/png", "pasted"])
    assert page.locator("#source [role=alert]").is_visible()
    page.evaluate(drop, ["source", list(photograph.read_bytes()), "image/png", "pasted"])
    page.wait_for_selector("#strength")

    bodies: list[dict[str, object]] = []
    page.on(
        "request",
        lambda request: bodies.append(json.loads(request.post_data)) if request.url.endswith("/jobs") else None,
    )
    page.fill("#strength", "0.3")
    generate(page, prompt="a blue square", width=128, height=128, seed=1)
    finished(page, 1)
    assert bodies[0]["strength"] == 0.3
    info = read_image_info(server.images()[0])
    assert (info.width, info.height, info.strength) == (128, 128, 0.3)
    assert info.image is not None
    assert pixels(server.images()[0])[:, :, 2].mean() > 2 * pixels(server.images()[0])[:, :, 0].mean()
    assert problems_of(page) == []
