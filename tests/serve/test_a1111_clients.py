"""A1111's API as its clients use it: the bodies and the order of calls of Open WebUI, SillyTavern and LibreChat.

Read in ``backend/open_webui/routers/images.py`` (02530d50), ``src/endpoints/stable-diffusion.js`` (02903fdd) and
``api/app/clients/tools/structured/StableDiffusion.js``.
"""

import base64
import json
import threading

import httpx
import pytest
from facts import has_fact
from PIL import Image
from server_tools import Generate, Server, decoded, png, same, wait_for

PROMPT = "a red circle left of a blue square"


def test_open_webui(client: httpx.Client, generate: Generate) -> None:
    """Settings, a switch of the model by an administrator, an image."""
    (model,) = client.get("/sdapi/v1/sd-models").json()
    assert model["model_name"] == "tiny-fp16"
    options = client.get("/sdapi/v1/options").json()
    assert options["sd_model_checkpoint"] == model["title"]
    options["sd_model_checkpoint"] = model["title"]
    assert client.post("/sdapi/v1/options", json=options).status_code == 200
    body = {"prompt": PROMPT, "batch_size": 2, "width": 64, "height": 64, "steps": 6, "negative_prompt": "blurred"}
    more = {"cfg_scale": 1, "sampler_name": "DPM++ 2M", "scheduler": "Beta", "seed": 7}  # AUTOMATIC1111_PARAMS
    answer = client.post("/sdapi/v1/txt2img", json=body | more, headers={"authorization": "Basic Og=="}).json()
    fields = {"steps": 6, "sampler": "dpmpp_2m", "scheduler": "beta", "seed": 7, "count": 2, "size": (64, 64)}
    expected = generate(PROMPT, **fields).images
    assert [same(decoded(text), one) for text, one in zip(answer["images"], expected, strict=True)] == [True, True]
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [7, 8]
    assert "negative prompt has no effect" in info["comments"]


SILLYTAVERN = {
    "prompt": PROMPT,
    "negative_prompt": "",
    "sampler_name": "Euler a",
    "scheduler": "automatic",
    "steps": 8,
    "cfg_scale": 1,
    "width": 64,
    "height": 64,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "None",
    "hr_scale": 1.5,
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "seed": 11,
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic", "forge_additional_modules": []},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
    "url": "http://127.0.0.1:7860",
    "auth": "",
}


def test_sillytavern_auto(client: httpx.Client, generate: Generate) -> None:
    options = client.get("/sdapi/v1/options").json()
    assert "forge_preset" not in options, "we are not Forge"
    assert "None" in [one["name"] for one in client.get("/sdapi/v1/upscalers").json()]
    for empty in ("latent-upscale-modes", "sd-vae", "sd-modules"):
        assert client.get(f"/sdapi/v1/{empty}").json() == []
    samplers = [one["name"] for one in client.get("/sdapi/v1/samplers").json()]
    schedulers = [one["name"] for one in client.get("/sdapi/v1/schedulers").json()]
    assert {"Euler", "Euler a", "DPM++ 2M", "UniPC"} <= set(samplers)
    assert schedulers[0] == "automatic"
    (title,) = [one["title"] for one in client.get("/sdapi/v1/sd-models").json()]
    assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": title}).status_code == 200
    progress = client.get("/sdapi/v1/progress").json()
    assert (progress["progress"], progress["state"]["job_count"]) == (0, 0)
    answer = client.post("/sdapi/v1/txt2img", json=SILLYTAVERN).json()
    expected = generate(PROMPT, size=(64, 64), seed=11, sampler="euler_ancestral").images[0]
    assert same(decoded(answer["images"][0]), expected)
    for sampler in samplers:  # each name that we list is understood
        body = SILLYTAVERN | {"sampler_name": sampler, "steps": 2, "scheduler": "simple"}
        assert json.loads(client.post("/sdapi/v1/txt2img", json=body).json()["info"])["comments"] == ""


def test_sillytavern_sdcpp(client: httpx.Client, generate: Generate) -> None:
    ping = client.options("/v1/images/generations")
    assert ping.is_success
    assert "POST" in ping.headers["allow"]
    (model,) = client.get("/v1/models").json()["data"]
    body = {
        "model": model["id"],
        "prompt": PROMPT,
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "steps": 8,
        "cfg_scale": 1,
        "seed": 5,
        "batch_size": 1,
        "sampler_name": "euler",
        "scheduler": "sgm_uniform",
        "clip_skip": 1,
    }
    answer = client.post("/sdapi/v1/txt2img", json=body).json()
    assert same(
        decoded(answer["images"][0]), generate(PROMPT, size=(64, 64), seed=5, scheduler="sgm_uniform").images[0]
    )


LIBRECHAT = {"prompt": PROMPT, "negative_prompt": "ugly", "cfg_scale": 4.5, "steps": 22, "width": 64, "height": 64}


def test_librechat_cannot_be_configured_and_gets_what_a_turbo_model_is_made_for(
    client: httpx.Client, generate: Generate
) -> None:
    answer = client.post("/sdapi/v1/txt2img", json=LIBRECHAT).json()
    info = json.loads(answer["info"])
    assert (info["width"], info["height"]) == (64, 64)
    assert (info["steps"], info["cfg_scale"]) == (8, 1)
    assert f"Seed: {info['seed']}" in info["infotexts"][0]
    for fact in ("22", "8", "4.5", "1"):
        assert has_fact(info["comments"].replace("\n", " "), fact)
    assert same(decoded(answer["images"][0]), generate(PROMPT, size=(64, 64), seed=info["seed"]).images[0])


def test_up_to_12_steps_are_honoured(client: httpx.Client, generate: Generate) -> None:
    body = LIBRECHAT | {"steps": 12, "cfg_scale": 1, "seed": 3}
    answer = client.post("/sdapi/v1/txt2img", json=body).json()
    assert json.loads(answer["info"])["steps"] == 12
    assert same(decoded(answer["images"][0]), generate(PROMPT, size=(64, 64), seed=3, steps=12).images[0])


def test_an_unknown_sampler_is_the_default_and_said(client: httpx.Client, generate: Generate) -> None:
    body = {"prompt": PROMPT, "width": 64, "height": 64, "seed": 3, "sampler_name": "DDIM", "scheduler": "Karras"}
    answer = client.post("/sdapi/v1/txt2img", json=body).json()
    comments = json.loads(answer["info"])["comments"].replace("\n", " ")
    assert has_fact(comments, "DDIM")
    assert has_fact(comments, "Karras")
    assert same(decoded(answer["images"][0]), generate(PROMPT, size=(64, 64), seed=3).images[0])


def test_image_to_image_and_masks(client: httpx.Client, generate: Generate) -> None:
    source = generate("a green triangle", seed=9, size=(64, 64)).images[0]
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    body = {
        "prompt": PROMPT,
        "init_images": ["data:image/png;base64," + base64.b64encode(png(source)).decode()],
        "width": 64,
        "height": 64,
        "denoising_strength": 0.6,
        "seed": 2,
        "resize_mode": 0,
        "inpaint_full_res": False,
    }
    answer = client.post("/sdapi/v1/img2img", json=body).json()
    fields = {"size": (64, 64), "seed": 2, "strength": 0.6, "image": source}
    assert same(decoded(answer["images"][0]), generate(PROMPT, **fields).images[0])
    assert json.loads(answer["info"])["denoising_strength"] == 0.6
    assert "init_images" not in answer["parameters"]
    black = Image.eval(mask, lambda gray: 255 - gray)
    for given, invert in ((mask, 0), (black, 1)):
        masked = body | {"mask": base64.b64encode(png(given)).decode(), "inpainting_mask_invert": invert}
        answer = client.post("/sdapi/v1/img2img", json=masked).json()
        assert same(decoded(answer["images"][0]), generate(PROMPT, **fields, mask=mask).images[0])


def test_a_variation(client: httpx.Client, generate: Generate) -> None:
    body = {"prompt": PROMPT, "width": 64, "height": 64, "seed": 2, "subseed": 5, "subseed_strength": 0.3, "n_iter": 2}
    answer = client.post("/sdapi/v1/txt2img", json=body).json()
    expected = generate(PROMPT, size=(64, 64), seed=2, variation=(5, 0.3), count=2).images
    assert [same(decoded(text), one) for text, one in zip(answer["images"], expected, strict=True)] == [True, True]
    assert json.loads(answer["info"])["all_subseeds"] == [5, 6]


@pytest.mark.parametrize(
    ("path", "body", "facts"),
    [
        ("txt2img", {"width": 65, "height": 64}, ["width", "65"]),
        ("txt2img", {"width": 64}, ["height"]),
        ("txt2img", {"batch_size": 0}, ["batch_size", "0"]),
        ("txt2img", {"batch_size": 5, "n_iter": 5}, ["25", "16"]),
        ("txt2img", {"steps": -1}, ["steps", "-1"]),
        ("txt2img", {"prompt": "<lora:ink:1>"}, ["ink", "--lora-dir"]),
        ("txt2img", {"prompt": "<lora:ink:x>"}, ["ink", "x"]),
        ("txt2img", {"steps": "many"}, ["steps"]),
        ("img2img", {}, ["init_images"]),
        ("img2img", {"init_images": ["?"]}, ["init_images", "base64"]),
        ("options", {"sd_model_checkpoint": "other"}, ["other", "tiny-fp16"]),
    ],
)
def test_refusals_have_a1111s_form(client: httpx.Client, path: str, body: dict[str, object], facts: list[str]) -> None:
    answer = client.post(f"/sdapi/v1/{path}", json=body)
    assert answer.status_code == 422
    assert all(has_fact(answer.json()["detail"], fact) for fact in facts), answer.text


def test_progress_and_interrupt(client: httpx.Client, server: Server) -> None:
    """What is done of an interrupted request is its answer."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        with server.client() as own:
            body = {"prompt": PROMPT, "batch_size": 16, "steps": 12, "width": 256, "height": 256, "seed": 1}
            answers.append(own.post("/sdapi/v1/txt2img", json=body))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        wait_for(lambda: client.get("/sdapi/v1/progress").json()["state"]["job_no"] >= 1)
        progress = client.get("/sdapi/v1/progress").json()
        assert 0 < progress["progress"] < 1
        assert progress["state"]["sampling_steps"] == 12
        assert decoded(progress["current_image"]).size == (32, 32)
        assert client.get("/sdapi/v1/progress?skip_current_image=true").json()["current_image"] is None
    finally:
        client.post("/sdapi/v1/interrupt")
        asking.join()
    (answer,) = answers
    assert answer.status_code == 200
    assert 1 <= len(answer.json()["images"]) < 16
    assert client.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0


def test_the_four_ways_give_one_image(client: httpx.Client, generate: Generate, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    """The command, Python, OpenAI's API and A1111's."""
    from cli_tools import call_rt

    arguments = ["--size", "64x48", "--seed", "99", "--executor", "cpu", "-o", tmp_path / "image.png", "--quiet"]
    assert call_rt(capsys, "run", PROMPT, *arguments).status == 0
    command = Image.open(tmp_path / "image.png")
    body = {"prompt": PROMPT, "seed": 99}
    openai = client.post("/v1/images/generations", json=body | {"size": "64x48"}).json()["data"][0]["b64_json"]
    a1111 = client.post("/sdapi/v1/txt2img", json=body | {"width": 64, "height": 48}).json()["images"][0]
    python = generate(PROMPT, seed=99, size=(64, 48)).images[0]
    assert [same(one, command) for one in (python, decoded(openai), decoded(a1111))] == [True] * 3
    assert decoded(a1111).info["parameters"] == command.info["parameters"]
