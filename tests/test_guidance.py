"""Guidance and negative prompts: what diffusers generates, what it costs, and where it stops."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, assert_one_line_error, call_rt
from parity import Case, Guided, check_parity, draw, draw_with_diffusers, next_seeds

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Manifest
from zimage_runtime.errors import BundleError, RequestError
from zimage_runtime.executors.ort.cpu import CpuSession
from zimage_runtime.images.image_files import read_image_info
from zimage_runtime.model.config import SchedulerConfig
from zimage_runtime.model.geometry import conditioning_bytes, image_geometry
from zimage_runtime.model.schedule import make_schedule
from zimage_runtime.pipeline import CaptionEvent, Job, NoticeEvent, Pipeline, Request
from zimage_runtime.sampling.guidance import ClassifierFree, NoGuidance, make_guidance

PROMPT = "a red fox in the snow"
LONG = "a very long description of a quiet harbour at dawn, with boats and nets and gulls, " * 4
SCHEDULE = make_schedule(4, SchedulerConfig(shift=3.0, num_train_timesteps=1000))

CASES = [
    Case(PROMPT, (64, 64), 4, 0, Guided()),
    Case(PROMPT, (80, 112), 4, 2**32 - 1, Guided(normalization=True)),
    Case(PROMPT, (112, 80), 8, 7, Guided(truncation=0.4)),
    Case(PROMPT, (128, 64), 8, 7, Guided(normalization=True, truncation=0.4)),
    Case(LONG, (64, 64), 2, 3, Guided(negative="")),  # 11 blocks of caption tokens beside one
    Case("x", (64, 64), 2, 4, Guided(negative=LONG, scale=1.5)),
]


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle, "cpu") as opened:
        yield opened


def describe(case: Case) -> str:
    guided = case.guided
    assert guided is not None
    return f"{len(case.prompt)}-{case.size[0]}x{case.size[1]}-{guided.normalization}-{guided.truncation}"


@pytest.mark.deep
@pytest.mark.parametrize("case", CASES, ids=describe)
def test_guided_images_are_diffusers(pipeline: Pipeline, diffusers_pipeline: Any, case: Case) -> None:
    check_parity(draw(pipeline, case)[0], draw_with_diffusers(diffusers_pipeline, case))


@pytest.mark.deep
def test_guidance_changes_the_image_and_each_setting_does(pipeline: Pipeline) -> None:
    """Or parity would prove nothing."""
    settings = [None, Guided(), Guided(normalization=True), Guided(truncation=0.4), Guided(negative="a hen")]
    found = [draw(pipeline, Case(PROMPT, (64, 64), 4, 0, guided))[0].latents for guided in settings]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert np.abs(one - other).max() > 1e-3


@dataclass
class Counted:
    """What a session was asked for."""

    prompts: list[int] = field(default_factory=list)  # tokens
    steps: list[tuple[int, int]] = field(default_factory=list)  # conditioning, step


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    asked = Counted()
    encode, make = CpuSession.encode_text, CpuSession.denoiser

    def encode_text(self: CpuSession, embeddings: FloatArray, rotary: Any) -> FloatArray:
        asked.prompts.append(embeddings.shape[1])
        return encode(self, embeddings, rotary)

    def denoiser(self: CpuSession, conditioning: Any) -> Any:
        made, number = make(self, conditioning), getattr(self, "made", 0)
        self.made = number + 1  # type: ignore[attr-defined]

        def velocity(latents: FloatArray, step: int) -> FloatArray:
            asked.steps.append((number, step))
            return made(latents, step)

        return velocity

    monkeypatch.setattr(CpuSession, "encode_text", encode_text)
    monkeypatch.setattr(CpuSession, "denoiser", denoiser)
    return asked


def test_a_scale_of_1_is_none_to_the_bit_and_costs_nothing(bundle: Path, counted: Counted) -> None:
    with Pipeline.from_bundle(bundle, "cpu") as pipeline:
        plain = draw(pipeline, Case(PROMPT, (64, 64), 3))[0]
        pipeline.forget_prompt()
        asked = Counted(counted.prompts.copy(), counted.steps.copy())
        guided = draw(pipeline, Case(PROMPT, (64, 64), 3, guided=Guided(scale=1.0)))[0]
    np.testing.assert_array_equal(plain.latents, guided.latents)
    assert counted.prompts == 2 * asked.prompts
    assert len(asked.prompts) == 1
    assert counted.steps == 2 * asked.steps
    assert asked.steps == [(0, 0), (0, 1), (0, 2)]


def test_only_guided_steps_take_two_forwards(bundle: Path, counted: Counted) -> None:
    truncation = float(SCHEDULE.timesteps[2])  # which is guided itself
    with Pipeline.from_bundle(bundle, "cpu") as pipeline:
        draw(pipeline, Case(PROMPT, (64, 64), 4, guided=Guided(truncation=truncation)))
        assert counted.steps == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3)]
        encoded = len(counted.prompts)
        draw(pipeline, Case(PROMPT, (64, 64), 1, guided=Guided()))
    assert (encoded, len(counted.prompts)) == (2, 2), "both prompts are kept for the next request"


def test_the_velocity_is_diffusers_formula() -> None:
    rng = np.random.default_rng(0)
    latents, positive, negative = rng.standard_normal((3, 2, 16, 4, 4), dtype=np.float32)
    negative[1] = positive[1] * 0.5  # guidance makes the second image's longer
    negative[0] = positive[0] * 1.1  # and the first one's shorter
    denoisers = (lambda x, step: positive, lambda x, step: negative)
    plain = ClassifierFree(3.5, (True,)).velocity(denoisers, latents, 0)
    np.testing.assert_allclose(plain, positive + 2.5 * (positive - negative), rtol=1e-6)
    capped = ClassifierFree(3.5, (True,), normalize=True).velocity(denoisers, latents, 0)
    np.testing.assert_array_equal(capped[0], plain[0])
    np.testing.assert_allclose(np.linalg.norm(capped[1]), np.linalg.norm(positive[1]), rtol=1e-6)
    np.testing.assert_allclose(capped[1], positive[1], rtol=1e-5)


def test_where_no_step_is_guided_there_is_no_guidance() -> None:
    def kind(scale: float, truncation: float, first: int = 0) -> type:
        return type(make_guidance(scale, SCHEDULE, first, normalize=False, truncation=truncation))

    assert kind(1.0, 1.0) is NoGuidance
    assert kind(1.01, 1.0) is ClassifierFree
    assert kind(4.0, 0.0) is ClassifierFree  # the first step's timestep is 0
    assert kind(4.0, 0.0, first=1) is NoGuidance  # which an image with strength leaves out


@pytest.mark.deep
def test_a_guided_batch_is_each_image(pipeline: Pipeline) -> None:
    case = Case(PROMPT, (64, 48), 3, 2**32 - 2, Guided(normalization=True))
    together = draw(pipeline, case, count=3, batch_size=2)
    for one, single in zip(together, next_seeds(case, 3), strict=True):
        np.testing.assert_array_equal(one.latents, draw(pipeline, single)[0].latents)


def test_a_negative_prompt_without_guidance_is_said_to_have_no_effect(pipeline: Pipeline) -> None:
    def warnings(**options: Any) -> list[str]:
        notices = pipeline.prepare(Request(PROMPT, size=(32, 32), **options)).notices
        return [one.text for one in notices if isinstance(one, NoticeEvent) and one.warning]

    (warning,) = warnings(negative="a hen")
    assert "no effect" in warning
    (warning,) = warnings(negative="a hen", cfg_scale=1.0)
    assert warnings(negative="a hen", cfg_scale=2.0) == []
    assert warnings() == []


def test_a_negative_prompt_that_is_cut_is_reported(pipeline: Pipeline) -> None:
    events = pipeline.stream("x", size=(32, 32), steps=1, negative="y" * 600, cfg_scale=2)
    (caption,) = [event for event in events if isinstance(event, CaptionEvent)]
    assert caption.cut_tokens == 0
    assert caption.negative_cut_tokens == pipeline.prepare(Request("y" * 600)).positive.cut_tokens > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"cfg_scale": 0.9},
        {"cfg_scale": float("nan")},
        {"cfg_scale": float("inf")},
        {"cfg_scale": True},
        {"cfg_truncation": -0.1},
        {"cfg_truncation": 1.1},
        {"cfg_normalization": 1},
        {"negative": None},
    ],
    ids=str,
)
def test_impossible_guidance_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Request(PROMPT, **wrong)


def test_the_second_conditioning_is_planned(pipeline: Pipeline) -> None:
    def stages(job: Job) -> dict[str, int]:
        return {name: stage["bytes"] for name, stage in job.plan.document()["stages"].items()}

    plain, guided, longer = (
        stages(pipeline.prepare(Request(PROMPT, size=(64, 64), negative=negative, cfg_scale=scale)))["denoiser"]
        for negative, scale in (("", 1), ("", 2), (LONG, 2))
    )
    assert plain < guided < longer


def test_every_plan_counts_a_second_conditioning(bundle: Path, capsys: Capture) -> None:
    """What is kept of a prompt: caption tokens, and rotary tables of all tokens."""
    config = Bundle.open(bundle).manifest.config
    geometry = image_geometry(64, 64, config)
    kept = conditioning_bytes(config.transformer, geometry, 40)
    tokens = geometry.image_tokens + 64
    assert kept == 4 * (64 * config.transformer.dim + tokens * config.transformer.head_dim)

    def denoiser(executor: str, *options: object) -> int:
        size = ("--size", "64x64", "--tokens", 40, "--executor", executor, "--json")
        outcome = call_rt(capsys, "plan", bundle, *size, *options)
        assert outcome.status == 0, outcome.err
        return int(json.loads(outcome.out)["stages"]["denoiser"]["bytes"])

    # on the GPU it belongs to no session, and its allocator's regions double
    for executor, times in (("cpu", 1), ("cuda", 2)):
        assert denoiser(executor, "--guided") - denoiser(executor) == times * kept


def test_the_command_guides_and_replays(
    bundle: Path, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--negative", "a hen, blurry", "--cfg-scale", 3.5, "--cfg-normalization", "--cfg-truncation", 0.75)
    run = ("run", "-m", bundle, "--quiet", "-o")
    size = ("--size", "32x32", "--steps", 2, "--seed", 3)
    first = call_rt(capsys, *run, "a.png", *size, *options, "--", PROMPT)
    assert first.status == 0, first.err
    info = read_image_info(Path("a.png"))
    assert (info.cfg_scale, info.negative, info.cfg_normalization, info.cfg_truncation) == (
        *(3.5, "a hen, blurry", True),
        0.75,
    )
    assert info.parameters().splitlines()[1] == "Negative prompt: a hen, blurry"
    assert "CFG scale: 3.5, " in info.parameters()
    assert call_rt(capsys, *run, "b.png", "--replay", "a.png").status == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert call_rt(capsys, *run, "c.png", *size, "--", PROMPT).status == 0
    assert Path("a.png").read_bytes() != Path("c.png").read_bytes()
    outcome = call_rt(capsys, *run, "d.png", "--replay", "a.png", "--cfg-scale", 2)
    assert_one_line_error(outcome, "--cfg-scale", status=2)
    assert_one_line_error(call_rt(capsys, *run, "d.png", *size, "--cfg-scale", 0.5, "--", PROMPT), "0.5", "at least 1")


def test_the_bundles_own_scale_is_the_default(pipeline: Pipeline) -> None:
    manifest = pipeline.bundle.manifest
    assert manifest.defaults.cfg_scale == 1
    guided = replace(manifest, defaults=replace(manifest.defaults, cfg_scale=4.5))
    read = Manifest.from_json(guided.to_json(), "manifest.json")
    assert read.defaults.cfg_scale == 4.5
    base = Pipeline.on(replace(pipeline.bundle, manifest=read), pipeline.executor)
    assert base.prepare(Request(PROMPT)).info.cfg_scale == 4.5
    assert base.prepare(Request(PROMPT, cfg_scale=2)).info.cfg_scale == 2
    assert base.prepare(Request(PROMPT, cfg_scale=1)).info.cfg_scale == 1
    document = json.loads(guided.to_json())
    del document["defaults"]["cfg_scale"]  # as in bundles made before
    assert Manifest.from_json(json.dumps(document), "manifest.json") == manifest
    document["defaults"]["cfg_scale"] = 0.5
    with pytest.raises(BundleError, match="cfg_scale"):
        Manifest.from_json(json.dumps(document), "manifest.json")


def test_what_has_no_effect_is_not_recorded(pipeline: Pipeline) -> None:
    info = pipeline.prepare(Request(PROMPT, negative="a hen", cfg_normalization=True, cfg_truncation=0.5)).info
    plain = pipeline.prepare(Request(PROMPT, seed=info.seed)).info
    assert info == plain
