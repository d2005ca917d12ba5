"""OpenAI's API, called with OpenAI's own package."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from facts import has_fact
from PIL import Image
from server_tools import PATIENCE, Generate, Server, decoded, png, same

from zimage_runtime.images.image_files import read_image_info

PROMPT = "a red circle left of a blue square"


@pytest.fixture
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as found:
        yield found


def test_the_image_of_a_seed_is_the_one_from_python(sdk: openai.OpenAI, generate: Generate) -> None:
    answer = sdk.images.generate(prompt=PROMPT, model="gpt-image-1", size="64x48", extra_body={"seed": 5})
    assert same(decoded(answer.data[0].b64_json), generate(PROMPT, seed=5, size=(64, 48)).images[0])
    assert answer.output_format == "png"
    assert answer.size == "64x48"
    assert answer.background == "opaque"


def test_images_of_one_request_are_those_of_single_ones(sdk: openai.OpenAI, generate: Generate) -> None:
    answer = sdk.images.generate(prompt=PROMPT, n=3, size="64x64", extra_body={"seed": 40})
    singles = generate(PROMPT, seed=40, count=3, size=(64, 64)).images
    assert [same(decoded(one.b64_json), single) for one, single in zip(answer.data, singles, strict=True)] == [True] * 3
    assert not same(singles[0], singles[1])


def test_tokens_are_counted(sdk: openai.OpenAI, generate: Generate) -> None:
    short = sdk.images.generate(prompt="a", n=2, size="64x64").usage
    long = sdk.images.generate(prompt="a red circle", size="128x64").usage
    assert short.output_tokens == 2 * 32  # 16 tokens of the transformer, padded to 32
    assert long.output_tokens == 32
    assert long.input_tokens > short.input_tokens
    assert long.total_tokens == long.input_tokens + long.output_tokens
    assert long.input_tokens_details.text_tokens == long.input_tokens


def test_extensions_are_honoured(sdk: openai.OpenAI, server: Server, generate: Generate) -> None:
    extra = {
        "seed": 3,
        "steps": 4,
        "cfg_scale": 2.5,
        "negative_prompt": "green",
        "sampler": "heun",
        "scheduler": "simple",
        "shift": 2.0,
    }
    answer = sdk.images.generate(prompt=PROMPT, size="64x64", response_format="url", extra_body=extra)
    expected = generate(PROMPT, size=(64, 64), negative=extra.pop("negative_prompt"), **extra).images[0]
    image = Image.open(io.BytesIO(httpx.get(str(answer.data[0].url), trust_env=False).content))
    assert same(image, expected)


def test_an_address_leads_to_the_image_without_a_key(sdk: openai.OpenAI, server: Server, generate: Generate) -> None:
    answer = sdk.images.generate(prompt=PROMPT, model="dall-e-3", size="64x64")
    address = str(answer.data[0].url)
    assert answer.data[0].b64_json is None
    assert address.startswith(f"{server.url}/images/")
    found = httpx.get(address, trust_env=False)
    assert found.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(found.content)).size == (64, 64)


@pytest.mark.parametrize(("kind", "name"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats_and_compression(sdk: openai.OpenAI, server: Server, kind: str, name: str, tmp_path: Path) -> None:
    sizes = {}
    for compression in (10, 100):
        answer = sdk.images.generate(
            prompt=PROMPT, size="64x64", output_format=kind, output_compression=compression, extra_body={"seed": 1}
        )
        data = base64.b64decode(answer.data[0].b64_json or "")
        sizes[compression] = len(data)
        assert answer.output_format == kind
        assert Image.open(io.BytesIO(data)).format == name
    assert sizes[10] < sizes[100]
    (tmp_path / "image").write_bytes(data)
    assert read_image_info(tmp_path / "image").seed == 1


@pytest.mark.parametrize("partials", [0, 1, 3])
def test_partial_images_come_before_the_image(sdk: openai.OpenAI, partials: int, generate: Generate) -> None:
    stream = sdk.images.generate(
        prompt=PROMPT, size="64x48", stream=True, partial_images=partials, extra_body={"seed": 5}
    )
    *early, last = list(stream)
    assert [event.type for event in early] == ["image_generation.partial_image"] * partials
    assert [event.partial_image_index for event in early] == list(range(partials))
    assert all(decoded(event.b64_json).size == (64, 48) for event in early)
    assert last.type == "image_generation.completed"
    assert last.usage.total_tokens > 0
    final = generate(PROMPT, seed=5, size=(64, 48)).images[0]
    assert same(decoded(last.b64_json), final)
    distances = [
        np.abs(np.asarray(decoded(event.b64_json), float) - np.asarray(final, float)).mean() for event in early
    ]
    assert distances == sorted(distances, reverse=True), "previews approach the image"
    for event in (*early, last):
        assert (event.size, event.quality, event.background, event.output_format) == ("64x48", "high", "opaque", "png")
        assert event.created_at > 0


def mask_with_hole() -> Image.Image:
    """OpenAI's: what is transparent is repainted."""
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    return mask


def white_on_black() -> Image.Image:
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    return mask


@pytest.fixture(scope="module")
def source(generate: Generate) -> Image.Image:
    return generate("a green triangle", seed=9, size=(64, 64)).images[0]


def test_an_edit_with_a_mask_is_that_from_python(sdk: openai.OpenAI, source: Image.Image, generate: Generate) -> None:
    files = {"image": ("image.png", png(source)), "mask": ("mask.png", png(mask_with_hole()))}
    answer = sdk.images.edit(prompt=PROMPT, size="64x64", extra_body={"seed": 2, "steps": 6}, **files)  # type: ignore[arg-type]
    expected = generate(PROMPT, size=(64, 64), seed=2, steps=6, image=source, mask=white_on_black()).images[0]
    assert same(decoded(answer.data[0].b64_json), expected)
    assert answer.usage.input_tokens_details.image_tokens == 32


def test_an_edit_streams(sdk: openai.OpenAI, source: Image.Image, generate: Generate) -> None:
    stream = sdk.images.edit(
        prompt=PROMPT,
        image=("image.png", png(source)),
        size="64x64",
        stream=True,
        partial_images=1,
        extra_body={"seed": 2, "strength": 0.7},
    )
    early, last = list(stream)
    assert (early.type, last.type) == ("image_edit.partial_image", "image_edit.completed")
    expected = generate(PROMPT, size=(64, 64), seed=2, strength=0.7, image=source).images[0]
    assert same(decoded(last.b64_json), expected)


def test_an_edit_as_json_and_the_images_own_transparency(
    client: httpx.Client, source: Image.Image, generate: Generate
) -> None:
    """Without a mask, what is transparent in the image is repainted, and `auto` keeps its size."""
    cut = source.convert("RGBA")
    cut.putalpha(mask_with_hole().getchannel("A"))
    url = "data:image/png;base64," + base64.b64encode(png(cut)).decode()
    answer = client.post("/v1/images/edits", json={"prompt": PROMPT, "images": [{"image_url": url}], "seed": 2})
    assert answer.status_code == 200, answer.text
    flat = Image.alpha_composite(Image.new("RGBA", cut.size, "white"), cut).convert("RGB")
    expected = generate(PROMPT, size=(64, 64), seed=2, image=flat, mask=white_on_black()).images[0]
    assert same(decoded(answer.json()["data"][0]["b64_json"]), expected)


def test_an_opaque_image_with_an_alpha_channel_is_no_mask(
    client: httpx.Client, source: Image.Image, generate: Generate
) -> None:
    url = base64.b64encode(png(source.convert("RGBA"))).decode()
    body = {"prompt": PROMPT, "image": url, "seed": 2, "size": "64x64", "strength": 0.5}
    answer = client.post("/v1/images/edits", json=body)
    expected = generate(PROMPT, size=(64, 64), seed=2, image=source, strength=0.5).images[0]
    assert same(decoded(answer.json()["data"][0]["b64_json"]), expected)


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"size": "65x64"}, ["width", "65", "16"]),
        ({"size": "big"}, ["size", "big"]),
        ({"size": "8192x8192"}, ["8192x8192", "8294400"]),
        ({"n": 17}, ["17", "16"]),
        ({"n": 0}, ["count", "0"]),
        ({"background": "transparent"}, ["background", "transparent"]),
        ({"output_compression": 101}, ["output_compression", "100"]),
        ({"partial_images": 4, "stream": True}, ["partial_images", "3"]),
        ({"extra_body": {"steps": 51}}, ["steps", "50", "51"]),
        ({"extra_body": {"seed": -2}}, ["seed", "-2"]),
        ({"extra_body": {"sampler": "ddim"}}, ["sampler", "ddim", "euler"]),
        ({"extra_body": {"loras": ["none"]}}, ["none", "--lora-dir"]),
        ({"prompt": "a" * 32_001}, ["32001", "32000"]),
    ],
)
def test_refusals_have_openais_form(sdk: openai.OpenAI, fields: dict[str, object], facts: list[str]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.generate(**({"prompt": PROMPT} | fields))  # type: ignore[call-overload]
    error = caught.value.body
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert all(has_fact(error["message"], fact) for fact in facts), error["message"]


def test_what_the_engine_refuses_is_a_bad_request_too(
    sdk: openai.OpenAI, source: Image.Image, generate: Generate
) -> None:
    """A mask that repaints nothing is found when it is read; a stream says so in an event."""
    files = {"image": ("i.png", png(source)), "mask": ("m.png", png(Image.new("L", (64, 64), 0)))}
    with pytest.raises(openai.BadRequestError, match="mask"):
        sdk.images.edit(prompt=PROMPT, size="64x64", **files)  # type: ignore[arg-type]
    with pytest.raises(openai.APIError, match="mask"):
        list(sdk.images.edit(prompt=PROMPT, size="64x64", stream=True, **files))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"GIF89a" + bytes(100), "PNG"),
        (b"", "empty"),
        (png(Image.effect_noise((64, 64), 90))[:900], "cut off"),
    ],
)
def test_damaged_images_are_bad_requests(client: httpx.Client, data: bytes, fact: str) -> None:
    body = {"prompt": PROMPT, "image": base64.b64encode(data).decode(), "size": "64x64"}
    answer = client.post("/v1/images/edits", json=body)
    assert answer.status_code == 400
    assert fact in answer.json()["error"]["message"]


def test_addresses_are_not_fetched(client: httpx.Client) -> None:
    answer = client.post("/v1/images/edits", json={"prompt": PROMPT, "image": "http://127.0.0.1:1/image.png"})
    assert answer.status_code == 400
    assert "not fetched" in answer.json()["error"]["message"]


def test_models(sdk: openai.OpenAI, generate: Generate) -> None:
    (model,) = sdk.models.list().data
    assert model.id == "tiny-fp16"
    assert sdk.models.retrieve("tiny-fp16").id == model.id
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("dall-e-9")
