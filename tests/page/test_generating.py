"""The page in a browser: from a prompt to images, and from images to others."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from browser import Server, opened, problems_of, until
from PIL import Image

from zimage_runtime.images.image_files import read_image_info

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Request

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
    preview = page.locator(".canvas img")
    until(page, lambda: preview.get_attribute("src") is not None, "a preview")
    first = preview.get_attribute("src") or ""
    assert first.startswith("data:image/")
    until(page, lambda: preview.get_attribute("src") != first, "another preview")
    assert 0 < float(page.locator("progress").evaluate("bar => bar.value")) < 1

    # a second job waits; a reload finds both; Escape cancels the one that runs, and the other one runs
    generate(page, prompt="a yellow star", width=128, height=128, steps=8, count=1, seed=2**64 - 1)
    until(page, lambda: page.locator(".queue li").count() == 1, "the second job in the queue")
    page.reload()
    until(page, lambda: page.locator("progress").count() == 1, "the running job after a reload")
    assert page.locator(".queue li").inner_text().endswith("a yellow star")
    assert page.input_value("#prompt") == "a yellow star"
    page.keyboard.press("Escape")
    until(page, lambda: any(read_image_info(path).prompt != PROMPT for path in server.images()), "the second job")
    star = server.images()[-1]
    before = len(server.images())
    assert before <= 16, "what was cancelled went on to its last image"
    finished(page, before)

    # again: the same pixels, also for a seed that JavaScript's numbers cannot hold
    page.click("#stage [data-act=again]")
    finished(page, before + 1)
    again = server.images()[-1]
    assert read_image_info(star).seed == read_image_info(again).seed == 2**64 - 1
    assert (pixels(star) == pixels(again)).all()

    # vary: another seed, the rest as it was
    page.click("#stage [data-act=vary]")
    finished(page, before + 2)
    info = read_image_info(server.images()[-1])
    assert (info.prompt, info.steps) == ("a yellow star", 8)
    assert info.seed != 2**64 - 1

    # a new visit finds them; the viewer shows the settings, and deletes after a question
    page.reload()
    finished(page, before + 2)
    cards(page).nth(1).locator(".open").click()
    assert str(2**64 - 1) in page.inner_text("#viewer dl")
    page.locator("#viewer [data-act=delete]").click()
    page.locator("#ask button[value=keep]").click()
    assert again.exists()
    page.locator("#viewer [data-act=delete]").click()
    page.locator("#ask button[value=delete]").click()
    until(page, lambda: cards(page).count() == before + 1, "one image less")
    assert not again.exists()
    assert problems_of(page) == []


KEPT = """async () => {
    const kept = await (await import("/page/scripts/keep.js")).keptSource();
    return Boolean(kept?.mask);
}"""


def body_of(job: "Request") -> dict[str, Any]:
    return json.loads(job.post_data or "")


TRANSFER = """([bytes, how]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], "photograph.png", {type: "image/png"}));
    const options = {dataTransfer: data, clipboardData: data, bubbles: true, cancelable: true};
    if (how === "drop") document.getElementById("source").dispatchEvent(new DragEvent(how, options));
    else document.body.dispatchEvent(new ClipboardEvent(how, options));
}"""


def test_an_image_is_the_beginning_of_another(server: Server, browser: "Browser", tmp_path: Path) -> None:
    photograph = tmp_path / "photograph.png"
    Image.new("RGB", (600, 200), "blue").save(photograph)
    page = opened(browser, server)
    jobs: list[Request] = []
    page.on("request", lambda sent: jobs.append(sent) if sent.url.endswith("/jobs") and sent.method == "POST" else None)

    # chosen, dropped, pasted; what is no image is refused in words
    remove = page.locator("#source").get_by_role("button", name="Remove")
    page.locator("#source input[type=file]").set_input_files(photograph)
    remove.click()
    page.evaluate(TRANSFER, [list(photograph.read_bytes()), "drop"])
    remove.click()
    page.evaluate(TRANSFER, [list(b"no image"), "paste"])
    page.wait_for_selector("#source [role=alert]", state="visible")  # which it has once decoding failed
    page.evaluate(TRANSFER, [list(photograph.read_bytes()), "paste"])
    page.wait_for_selector("#strength")

    # it would be cropped to the size, or else the size follows it
    assert "cropped" in page.inner_text("#source")
    page.get_by_role("button", name="Use its shape").click()
    assert "cropped" not in page.inner_text("#source")
    width, height = (int(page.input_value(f"#{side}")) for side in ("width", "height"))
    assert (width % 16, height % 16) == (0, 0)
    assert abs(width / height - 3) < 0.3
    page.fill("#strength", "0.3")
    generate(page, prompt="a blue square", width=128, height=128, seed=1)
    finished(page, 1)
    first = server.images()[0]
    info = read_image_info(first)
    assert info.image is not None
    assert (info.width, info.height, info.strength, body_of(jobs[0])["strength"]) == (128, 128, 0.3, 0.3)
    assert pixels(first)[:, :, 2].mean() > 2 * pixels(first)[:, :, 0].mean(), "it is blue no longer"

    # the result as input, named instead of sent; what is painted changes, the rest stays
    page.click("#stage [data-act=as-input]")
    until(page, lambda: page.evaluate("document.activeElement.id") == "paint-mask", "the image in the form")
    page.click("#paint-mask")
    box = page.locator("#mask-canvas").bounding_box()
    assert box
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.7 * box["height"], steps=4)
    page.mouse.up()
    page.click("#mask-done")

    # both are there after a reload
    until(page, lambda: page.evaluate(KEPT), "the mask in the browser's store")
    page.reload()
    page.get_by_role("button", name="Edit mask").wait_for()
    page.fill("#strength", "1")
    generate(page, prompt="a yellow star on a white background", seed=5)
    finished(page, 2)
    assert body_of(jobs[1])["image"] == {"gallery": first.name}
    assert read_image_info(server.images()[1]).mask is not None
    change = np.abs(pixels(first).astype(int) - pixels(server.images()[1])).mean(axis=2)
    kept, repainted = change[:, :64].mean(), change[40:88, 92:100].mean()
    assert repainted > 4 * kept + 4, f"{kept} where nothing was painted, {repainted} where it was"
    assert problems_of(page) == []
