"""Samplers, schedules and variations through the pipeline and the command."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, assert_one_line_error, call_rt
from PIL import Image
from sd_parsers import ParserManager

from zimage_runtime.arrays import FloatArray
from zimage_runtime.errors import RequestError
from zimage_runtime.images.image_files import read_image_info
from zimage_runtime.model.noise import TorchGenerator, mixed
from zimage_runtime.model.sampling_names import SamplerName, SchedulerName
from zimage_runtime.pipeline import ImageEvent, Pipeline, Request, StepEvent

PROMPT = "a red fox in the snow"
SMALL: dict[str, Any] = {"size": (48, 32), "steps": 4, "seed": 5}


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle, "cpu") as opened:
        yield opened


def latents(pipeline: Pipeline, **options: Any) -> list[FloatArray]:
    events = pipeline.stream(PROMPT, **{**SMALL, **options})
    return [event.latents for event in events if isinstance(event, ImageEvent)]


def photograph() -> Image.Image:
    y, x = np.mgrid[0:32, 0:48] / 48
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y - 2 * x), x - y]
    return Image.fromarray(np.clip(np.stack(waves, -1) * 127 + 128, 0, 255).astype(np.uint8))


def right_half() -> Image.Image:
    mask = Image.new("L", (48, 32))
    mask.paste(255, (32, 0, 48, 32))
    return mask


def test_every_sampler_and_scheduler_gives_an_image_of_its_own(pipeline: Pipeline) -> None:
    found = [latents(pipeline, sampler=name)[0] for name in SamplerName]
    found += [latents(pipeline, scheduler=name)[0] for name in ("sgm_uniform", "beta")]
    found += [latents(pipeline, shift=6.0)[0]]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert np.abs(one - other).max() > 1e-4
    np.testing.assert_array_equal(found[0], latents(pipeline)[0])  # euler on the model's own schedule
    np.testing.assert_array_equal(found[0], latents(pipeline, shift=3.0)[0])


@pytest.mark.deep
@pytest.mark.parametrize("name", SamplerName)
def test_batches_equal_single_images_with_everything_at_once(pipeline: Pipeline, name: SamplerName) -> None:
    options = {
        "sampler": name,
        "scheduler": "beta",
        "image": photograph(),
        "mask": right_half(),
        "strength": 0.8,
        "cfg_scale": 3.0,
        "negative": "a hen",
        "cfg_truncation": 0.5,
    }
    together = latents(pipeline, count=3, batch_size=2, **options)
    for index, one in enumerate(together):
        np.testing.assert_array_equal(one, latents(pipeline, **options, **{"seed": 5 + index})[0])
    kept = latents(pipeline, **{**options, "sampler": "euler", "steps": 3})[0]
    np.testing.assert_array_equal(together[0][:, :, :4], kept[:, :, :4])  # what the mask keeps


def test_the_beta_schedule_of_many_steps_counts_those_that_are_taken(pipeline: Pipeline) -> None:
    job = pipeline.prepare(Request(PROMPT, scheduler="beta", steps=200))
    assert job.info.steps == 200
    assert 150 < job.steps < 200


def test_heun_reports_a_step_for_two_forwards(pipeline: Pipeline) -> None:
    events = pipeline.stream(PROMPT, **SMALL, sampler="heun")
    assert [event.step for event in events if isinstance(event, StepEvent)] == [1, 2, 3, 4]


# Variations


def test_noise_is_mixed_along_the_arc() -> None:
    own, other = (TorchGenerator(seed).normals((2, 4, 8, 8)) for seed in (1, 2))
    np.testing.assert_allclose(mixed(own, other, 0.0), own, rtol=1e-6)
    np.testing.assert_allclose(mixed(own, other, 1.0), other, rtol=1e-5, atol=1e-6)
    half = mixed(own, other, 0.5)
    for one, a, b in zip(half, own, other, strict=True):
        cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        weight = math.sin(math.acos(cosine) / 2) / math.sin(math.acos(cosine))
        np.testing.assert_allclose(one, weight * (a + b), rtol=1e-5, atol=1e-6)
        assert np.std(one) == pytest.approx(1, abs=0.1)  # where half of each would have 0.7
    np.testing.assert_allclose(mixed(own, own, 0.3), own, rtol=1e-6)


def test_variations_lie_between_two_seeds(pipeline: Pipeline) -> None:
    own, other = latents(pipeline)[0], latents(pipeline, seed=9)[0]
    near, far = (latents(pipeline, variation=(9, share))[0] for share in (0.1, 0.9))
    assert np.linalg.norm(near - own) < np.linalg.norm(far - own)
    assert np.linalg.norm(far - other) < np.linalg.norm(near - other)
    np.testing.assert_allclose(latents(pipeline, variation=(9, 1.0))[0], other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("source", [False, True])
def test_several_images_vary_the_other_seed(pipeline: Pipeline, source: bool) -> None:
    options = {"image": photograph(), "sampler": "lcm"} if source else {}
    together = latents(pipeline, variation=(9, 0.3), count=3, batch_size=2, **options)
    for index, one in enumerate(together):
        np.testing.assert_array_equal(one, latents(pipeline, variation=(9 + index, 0.3), **options)[0])
    infos = pipeline.generate(PROMPT, **SMALL, variation=(9, 0.3), count=2).infos
    assert [(info.seed, info.variation_seed) for info in infos] == [(5, 9), (5, 10)]


@pytest.mark.parametrize(
    "variation", [(1,), "5:0.2", (1, 0), (1, 1.1), (-1, 0.5), (2**64, 0.5), (1.5, 0.5), (1, math.nan), (1, True)]
)
def test_impossible_variations_are_refused(variation: Any) -> None:
    with pytest.raises(RequestError, match="variation"):
        Request(PROMPT, variation=variation)


# The command


SETTINGS = ("--sampler", "dpmpp_2m", "--scheduler", "sgm_uniform", "--shift", 4, "--variation", "9:0.25")


def test_the_command_records_and_replays(
    bundle: Path, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = ("run", "-m", bundle, "--quiet", "-o")
    size = ("--size", "48x32", "--steps", 3, "--seed", 3)
    assert call_rt(capsys, *run, "a.png", *size, *SETTINGS, "--", PROMPT).status == 0
    info = read_image_info(Path("a.png"))
    assert (info.sampler, info.scheduler, info.shift) == (SamplerName.DPMPP_2M, SchedulerName.SGM_UNIFORM, 4.0)
    assert (info.variation_seed, info.variation_strength) == (9, 0.25)
    line = info.parameters().splitlines()[-1]
    assert line.startswith("Steps: 3, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 1, Seed: 3, ")
    assert "Variation seed: 9, Variation seed strength: 0.25" in line
    assert line.endswith("Shift: 4")
    assert call_rt(capsys, *run, "b.png", "--replay", "a.png").status == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--sampler", "heun"), ("--scheduler", "beta"), ("--shift", 2), ("--variation", "1:0.5"), ("--negative", "x")],
)
def test_a_replay_takes_no_sampling_from_the_command(bundle: Path, capsys: Capture, option: str, value: str) -> None:
    outcome = call_rt(capsys, "run", "-m", bundle, "--replay", "a.png", option, value)
    assert_one_line_error(outcome, "--replay", option, status=2)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--sampler", "ddim", "euler_ancestral"),
        ("--scheduler", "karras", "sgm_uniform"),
        ("--variation", "5", "5:0.2"),
        ("--variation", "5:x", "5:0.2"),
        ("--variation", "-5:0.2", "5:0.2"),
    ],
)
def test_what_is_no_setting_is_refused(bundle: Path, capsys: Capture, option: str, value: str, named: str) -> None:
    assert_one_line_error(call_rt(capsys, "run", "x", "-m", bundle, option, value), option, named, status=2)


def test_another_projects_parser_reads_guidance_and_sampling(
    bundle: Path, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    guidance = ("--negative", "a hen, blurry\nand dark", "--cfg-scale", 3.5)
    run = ("run", "-m", bundle, "--quiet", "-o", "a.png", "--size", "48x32", "--steps", 2, "--seed", 3)
    assert call_rt(capsys, *run, *SETTINGS, *guidance, "--", PROMPT).status == 0
    found = ParserManager().parse("a.png")
    assert found is not None
    (sampler,) = found.samplers
    assert sampler.name == "DPM++ 2M"
    assert sampler.parameters["cfg_scale"] == "3.5"
    assert found.full_prompt == PROMPT
    assert found.full_negative_prompt == "a hen, blurry\nand dark"
    known = {**sampler.parameters, **found.metadata}
    assert known["Schedule type" if "Schedule type" in known else "scheduler"] == "SGM Uniform"


def test_help_shows_options_in_groups_the_common_ones_first(capsys: Capture) -> None:
    lines = call_rt(capsys, "run", "--help").out.splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles[0] == "Common options:"
    assert titles[-1] == "Other options:"  # of which there is --help alone: every other one has a group
    assert len(lines) - lines.index("Other options:") == 2
    assert lines.index("Common options:") < lines.index("Guidance:") < lines.index("Sampling:")
