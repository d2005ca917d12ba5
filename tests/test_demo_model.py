"""The demo model that ships: its bundle is what its checkpoint exports to, and its pictures show what was asked for."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, call_export, call_rt
from parity import (
    LATENTS_TOLERANCE,
    PIXEL_TOLERANCE,
    Case,
    draw,
    draw_with_diffusers,
    open_with_diffusers,
    relative_error,
)
from PIL import Image

from demo_model.captions import caption
from demo_model.checker import judge, see
from demo_model.scenes import Scene, Thing
from demo_model.scoring import held_out_requests, score
from zimage_export.build import BuildOptions, build
from zimage_export.source.checkpoint import DEMO
from zimage_rt import Pipeline, demo_bundle
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.command_line.progress import Progress

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "demo_scores.json"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_bundle(demo_bundle())


@pytest.fixture(scope="module")
def demo_diffusers() -> Any:
    return open_with_diffusers(DEMO)


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_both_are_small_enough_to_ship() -> None:
    assert folder_size(DEMO) <= 16e6
    assert folder_size(demo_bundle()) <= 12e6


@pytest.mark.deep
def test_the_bundle_is_what_the_checkpoint_exports_to(tmp_path: Path) -> None:
    """Weights and programs, byte for byte; `make demo-bundle` renews them when the exporter has changed."""
    shipped = Bundle.open(demo_bundle())
    shipped.verify()
    again = build("tiny", tmp_path / "bundle", BuildOptions(shipped.manifest.precision), Progress(quiet=True))
    assert again.manifest.config == shipped.manifest.config
    assert again.manifest.files == shipped.manifest.files  # with their hashes


@pytest.mark.deep
@pytest.mark.parametrize(
    "case",
    [
        Case("a red circle left of a blue square", (128, 128), 8, 1),
        Case("白色背景上的一个绿色三角形", (128, 128), 8, 2),
        Case("a yellow star", (192, 128), 4, 3),
    ],
    ids=["en", "zh", "wide"],
)
def test_diffusers_generates_the_same_images(pipeline: Pipeline, demo_diffusers: Any, case: Case) -> None:
    (ours,), theirs = draw(pipeline, case), draw_with_diffusers(demo_diffusers, case)
    assert relative_error(ours.latents, theirs.latents) < LATENTS_TOLERANCE
    assert np.abs(ours.pixels.astype(int) - theirs.pixels).max() <= PIXEL_TOLERANCE


def test_run_without_a_bundle_generates_what_was_asked_for(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    outcome = call_rt(capsys, "run", "a red circle left of a blue square", "--seed", 1, "-o", out, "--quiet")
    assert (outcome.status, outcome.lines) == (0, [str(out)]), outcome.err
    circle, square = Thing("circle", "red", 0.3, 0.5, 0.2), Thing("square", "blue", 0.7, 0.5, 0.2)
    verdict = judge(Scene((circle, square), ("white",), relation="left"), see(np.asarray(Image.open(out))))
    assert verdict.pairs, verdict
    assert verdict.position, verdict


@pytest.mark.deep
def test_tiny_is_a_model_to_build_from_and_to_verify_against(capsys: Capture, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    assert call_export(capsys, "build", "tiny", bundle, "--quiet").status == 0
    assert Bundle.open(bundle).manifest.source.name == "tiny"
    outcome = call_export(capsys, "verify", bundle, "--reference", "tiny", "--size", "64x64", "--quiet")
    assert outcome.status == 0, outcome.err


@pytest.mark.deep
@pytest.mark.parametrize("language", ["en", "zh"])
def test_held_out_prompts_are_generated_as_asked(pipeline: Pipeline, language: Any) -> None:
    """A few of those that the model card's figures are over."""
    requests = held_out_requests(language, 24)

    def draw_prompt(prompt: str, seed: int) -> np.ndarray:
        return np.asarray(pipeline.generate(prompt, seed=seed).images[0])

    asked = score(requests, draw_prompt)
    assert asked.colour >= 0.87
    assert asked.shape >= 0.75
    assert asked.position >= 0.75
    assert score([(scene, "") for scene, _ in requests[:8]], draw_prompt).pairs <= 0.25


def test_a_seed_decides_the_image_and_a_prompt_its_content(pipeline: Pipeline) -> None:
    def pixels(prompt: str, seed: int) -> np.ndarray:
        return np.asarray(pipeline.generate(prompt, seed=seed).images[0], dtype=int)

    assert np.array_equal(pixels("a green ring", 5), pixels("a green ring", 5))
    assert np.abs(pixels("a green ring", 5) - pixels("a green ring", 6)).mean() > 1
    rng = np.random.default_rng(0)
    scene = Scene((Thing("ring", "green", 0.5, 0.5, 0.2),), ("white",))
    for language in ("en", "zh"):
        assert judge(scene, see(pixels(caption(scene, language, rng), 5).astype(np.uint8))).pairs


def test_the_model_card_states_the_measured_scores() -> None:
    card = (DEMO / "README.md").read_text("utf-8")
    report = json.loads(RESULTS.read_text("utf-8"))
    for name in ("English", "Chinese"):
        scores = report["scores"][name]
        assert scores["prompts"] >= 400
        assert scores["colour"] >= 0.95
        assert scores["shape"] >= 0.90  # of two objects, both must be right
        assert scores["position"] >= 0.85
    for name, scores in report["scores"].items():
        (row,) = re.findall(rf"^\| {re.escape(name)} \|.*$", card, re.M)
        stated = re.findall(r"[\d.]+ %", row)
        assert stated == [f"{100 * scores[share]:.1f} %" for share in ("colour", "shape", "pairs", "position")]
    assert Bundle.open(demo_bundle()).manifest.matches(report["fingerprint"])
