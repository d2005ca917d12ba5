"""Starting from an image, with and without a mask, gives what diffusers' two pipelines give, in fp32."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import Drawing, Guided, check_parity, diffusers_guidance, relative_error
from PIL import Image

from zimage_runtime.images.img2img import Encoded
from zimage_runtime.model.noise import BatchNoise, TorchGenerator
from zimage_runtime.pipeline import EncodeEvent, ImageEvent, Pipeline, Request, StepEvent

pytestmark = pytest.mark.deep

PROMPT = "a red fox in the snow 雪"


@dataclass(frozen=True)
class Case:
    """One image to generate from another."""

    strength: float
    masked: bool
    size: tuple[int, int] = (80, 112)  # width, height
    steps: int = 8
    seed: int = 5
    taken: int = field(kw_only=True)  # steps, by the formula in diffusers
    guided: Guided | None = None


CASES = [
    Case(0.1, False, taken=1),
    Case(0.6, False, (64, 64), seed=2**32 + 1, taken=5),
    Case(1.0, False, (64, 64), 4, taken=4),
    Case(0.3, False, (48, 176), 7, 0, taken=3),  # 7 - int(4.9)
    Case(0.1, True, taken=1),
    Case(0.6, True, (128, 64), taken=5),
    Case(1.0, True, (64, 64), taken=8),
    Case(0.5, True, (112, 80), 9, 3, taken=5),  # 9 - int(4.5)
    Case(0.6, False, (112, 80), 4, 3, taken=3, guided=Guided()),
    Case(0.6, False, (64, 64), 4, 3, taken=3, guided=Guided(normalization=True, truncation=0.5)),
    Case(1.0, True, (64, 128), 4, 3, taken=4, guided=Guided(normalization=True)),
    Case(0.6, True, (64, 64), 4, 3, taken=3, guided=Guided(truncation=0.5)),
]


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(bundle)


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colours, an edge and some grain."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y - 2 * x), np.where((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06, 0.8, -0.5)]
    grain = np.random.default_rng(1).normal(0, 0.05, (height, width, 3))
    values = np.clip((np.stack(waves, -1) + grain) * 127 + 128, 0, 255)
    return Image.fromarray(values.astype(np.uint8))


def blot(width: int, height: int) -> Image.Image:
    """A mask with soft, slanted edges, so that binarizing and resizing matter."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    return Image.fromarray(np.clip((np.sin(9 * x + 4 * y) + 0.3) * 300 + 128, 0, 255).astype(np.uint8))


def draw(pipeline: Pipeline, case: Case, image: Image.Image, mask: Image.Image | None, count: int = 1) -> list[Drawing]:
    events = pipeline.stream(
        PROMPT,
        size=case.size,
        steps=case.steps,
        seed=case.seed,
        count=count,
        image=image,
        strength=case.strength,
        mask=mask,
    )
    return [Drawing(e.latents, np.asarray(e.image)) for e in events if isinstance(e, ImageEvent)]


def draw_with_diffusers(text_to_image: Any, case: Case, image: Image.Image, mask: Image.Image | None) -> Drawing:
    import torch
    from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline

    kind = ZImageImg2ImgPipeline if mask is None else ZImageInpaintPipeline
    pipeline = kind(**text_to_image.components)
    pipeline.set_progress_bar_config(disable=True)
    masks = {} if mask is None else {"mask_image": mask}
    with torch.no_grad():
        latents = pipeline(
            prompt=PROMPT,
            image=image,
            strength=case.strength,
            num_inference_steps=case.steps,
            generator=torch.Generator("cpu").manual_seed(case.seed),
            output_type="latent",
            **diffusers_guidance(case.guided),
            **masks,
        ).images
        config = pipeline.vae.config
        decoded = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
        (image,) = pipeline.image_processor.postprocess(decoded, output_type="pil")
    return Drawing(latents[0].numpy(), np.asarray(image))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_generates_what_diffusers_generates(pipeline: Pipeline, diffusers_pipeline: Any, case: Case) -> None:
    image = photograph(*case.size)
    mask = blot(*case.size) if case.masked else None
    expected = draw_with_diffusers(diffusers_pipeline, case, image, mask)
    guidance = {} if case.guided is None else case.guided.ours()
    given = {"image": image, "strength": case.strength, "mask": mask, **guidance}
    events = list(pipeline.stream(PROMPT, steps=case.steps, seed=case.seed, **given))
    assert isinstance(events[0], EncodeEvent)
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [event.step for event in steps] == list(range(1, case.taken + 1))
    assert {event.steps for event in steps} == {case.taken}
    last = events[-1]
    assert isinstance(last, ImageEvent)
    check_parity(Drawing(last.latents, np.asarray(last.image)), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_an_image_of_any_size_is_resized_as_diffusers_resizes_it(
    pipeline: Pipeline, diffusers_pipeline: Any, masked: bool
) -> None:
    """Without a size, it is the image's own, cut to multiples of 16."""
    case = Case(0.6, masked, (80, 112), 2, taken=2)
    image, mask = photograph(93, 127), blot(93, 127) if masked else None
    expected = draw_with_diffusers(diffusers_pipeline, case, image, mask)
    result = pipeline.generate(PROMPT, steps=2, seed=case.seed, image=image, mask=mask, strength=0.6)
    assert result.images[0].size == (80, 112)
    assert np.abs(np.asarray(result.images[0], np.int16) - expected.pixels).max() <= 1


def test_default_strengths_are_diffusers_own(pipeline: Pipeline) -> None:
    image, mask = photograph(64, 64), blot(64, 64)
    assert pipeline.prepare(Request(PROMPT, image=image)).info.strength == 0.6
    assert pipeline.prepare(Request(PROMPT, image=image, mask=mask)).info.strength == 1.0
    assert pipeline.prepare(Request(PROMPT)).info.strength is None


@pytest.mark.parametrize("masked", [False, True])
def test_several_images_equal_single_runs(pipeline: Pipeline, masked: bool) -> None:
    image, mask = photograph(64, 48), blot(64, 48) if masked else None
    case = Case(0.6, masked, (64, 48), 4, 2**32 - 2, taken=3)
    together = draw(pipeline, case, image, mask, count=3)
    singles = [draw(pipeline, Case(0.6, masked, (64, 48), 4, case.seed + i, taken=3), image, mask)[0] for i in range(3)]
    for one, single in zip(together, singles, strict=True):
        np.testing.assert_array_equal(one.latents, single.latents)
        np.testing.assert_array_equal(one.pixels, single.pixels)
    assert len({single.pixels.tobytes() for single in singles}) == 3


def test_a_batch_generates_what_diffusers_generates_one_by_one(pipeline: Pipeline, diffusers_pipeline: Any) -> None:
    image, mask = photograph(64, 64), blot(64, 64)
    events = pipeline.stream(PROMPT, steps=4, seed=11, count=3, batch_size=2, image=image, strength=0.6, mask=mask)
    found = [Drawing(e.latents, np.asarray(e.image)) for e in events if isinstance(e, ImageEvent)]
    for index, one in enumerate(found):
        case = Case(0.6, True, (64, 64), 4, 11 + index, taken=3)
        check_parity(one, draw_with_diffusers(diffusers_pipeline, case, image, mask))


def test_what_the_mask_keeps_is_the_image(pipeline: Pipeline) -> None:
    """To the last bit in the latents: there, nothing of what was generated is left."""
    image = photograph(64, 64)
    half = Image.new("L", (64, 64))
    half.paste(255, (32, 0, 64, 64))
    first, second = (
        draw(pipeline, Case(1.0, True, (64, 64), steps, 4, taken=steps), image, half)[0].latents for steps in (2, 3)
    )
    np.testing.assert_array_equal(first[:, :, :4], second[:, :, :4])
    assert relative_error(first[:, :, 4:], second[:, :, 4:]) > 0.01


def test_the_less_strength_the_closer_to_the_image(pipeline: Pipeline) -> None:
    image = photograph(64, 64)
    job = pipeline.prepare(Request(PROMPT, image=image))
    assert job.source is not None
    with job.executor.session(job.plan) as session:
        encoded = Encoded(*session.encode(job.source.pixels))
    noise = BatchNoise((TorchGenerator(5),), encoded.mean.shape)
    clean = encoded.sample(noise, pipeline.bundle.manifest.config.vae)
    generated = [
        draw(pipeline, Case(strength, False, (64, 64), 8, taken=0), image, None)[0].latents
        for strength in (0.1, 0.5, 1.0)
    ]
    errors = [relative_error(latents, clean[0]) for latents in generated]
    assert errors == sorted(errors)
    assert errors[0] < errors[2] / 2
