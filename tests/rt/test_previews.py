"""Previews: a small image after each step, from a map that the exporter fits to the bundle's own autoencoder."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, assert_one_line_error, call_rt, unchanged
from PIL import Image

from zimage_rt import demo_bundle
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Manifest
from zimage_runtime.errors import BundleError, RequestError
from zimage_runtime.images import preview
from zimage_runtime.images.preview import preview_image
from zimage_runtime.model.preview_map import PreviewMap
from zimage_runtime.pipeline import ImageEvent, Pipeline, StepEvent

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.from_bundle(demo_bundle(), "cpu") as opened:
        yield opened


def events(pipeline: Pipeline, **options: Any) -> tuple[list[StepEvent], ImageEvent]:
    found = list(pipeline.stream(PROMPT, **{"size": (128, 128), "seed": 12, **options}))
    (image,) = [event for event in found if isinstance(event, ImageEvent)]
    return [event for event in found if isinstance(event, StepEvent)], image


def distance(found: Image.Image, image: Image.Image) -> float:
    """Root mean square of 255, beside the image in the preview's size."""
    small = image.resize(found.size, Image.Resampling.BOX)
    return float(np.sqrt(np.mean((np.asarray(found, float) - np.asarray(small, float)) ** 2)))


def test_previews_approach_the_image(pipeline: Pipeline) -> None:
    steps, image = events(pipeline)
    previews = [step.preview() for step in steps]
    assert len(previews) == 8
    assert {one.size for one in previews} == {(16, 16)}
    errors = [distance(one, image.image) for one in previews]
    assert errors[-1] < 32, "the last preview shows what the image shows"
    assert errors[-1] < 0.7 * errors[0]
    blank = Image.new("RGB", (16, 16), tuple(int(v) for v in np.asarray(image.image).mean(axis=(0, 1))))
    assert errors[-1] < distance(blank, image.image) / 1.5, "it is not only the right colour"


def test_an_estimate_is_where_the_velocity_leads(pipeline: Pipeline) -> None:
    """At the last step of euler, that is where the latents go."""
    steps, image = events(pipeline, steps=3)
    np.testing.assert_allclose(steps[-1].estimate[0], image.latents, rtol=1e-5, atol=1e-5)
    assert np.abs(steps[0].estimate - steps[0].latents).max() > 0.1


def test_a_preview_keeps_what_the_mask_keeps(pipeline: Pipeline) -> None:
    source, mask = Image.new("RGB", (128, 128), (200, 30, 30)), Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 128))
    steps, image = events(pipeline, steps=3, image=source, mask=mask)
    for step in steps:
        np.testing.assert_array_equal(step.estimate[0][:, :, :8], image.latents[:, :, :8])


def test_each_image_of_a_batch_has_its_preview(pipeline: Pipeline) -> None:
    found = list(pipeline.stream(PROMPT, seed=12, size=(64, 64), steps=2, count=2, batch_size=2))
    last = [event for event in found if isinstance(event, StepEvent)][-1]
    images = [event for event in found if isinstance(event, ImageEvent)]
    for index, image in enumerate(images):
        alone, _ = events(pipeline, size=(64, 64), steps=2, seed=12 + index)
        assert alone[-1].preview().tobytes() == last.preview(index).tobytes()
        assert distance(last.preview(index), image.image) < 60
    assert last.preview(0).tobytes() != last.preview(1).tobytes()


def test_the_map_is_linear() -> None:
    colours = PreviewMap(((1.0, 0.0, 0.0), (0.0, 0.5, 0.0)), (0.0, 0.0, -1.0), 0.0)
    latents = np.array([[[-1.0, 1.0]], [[0.0, 2.0]]], np.float32)  # two channels of one row
    found = np.asarray(preview_image(latents, colours))
    np.testing.assert_array_equal(found, [[[0, 128, 0], [255, 255, 0]]])


def test_the_exporter_fits_the_bundles_own_autoencoder(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest.preview is not None
    assert len(manifest.preview.factors) == manifest.config.vae.latent_channels
    assert 0 < manifest.preview.residual < 128
    assert np.abs(manifest.preview.factors).max() > 0


@pytest.mark.deep
def test_a_linear_autoencoder_is_found_exactly() -> None:
    from zimage_export.measure.preview_map import _fitted

    rng = np.random.default_rng(0)
    places, factors, bias = rng.normal(0, 2, (500, 16)), rng.normal(0, 1, (16, 3)), rng.normal(0, 1, 3)
    found = _fitted(places, places @ factors + bias)
    np.testing.assert_allclose(found.factors, factors, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.bias, bias, rtol=0, atol=1e-3)
    assert found.residual < 0.1
    still = _fitted(np.concatenate([places, np.zeros((500, 1))], axis=1), places @ factors + bias)
    np.testing.assert_allclose(still.factors[16], 0, atol=1e-6)  # a channel that never moves


def without_map(opened: Bundle) -> Bundle:
    return replace(opened, manifest=replace(opened.manifest, preview=None))


def test_bundles_made_before_open_and_refuse_previews_alone(bundle: Path, pipeline: Pipeline) -> None:
    opened = Bundle.open(bundle)
    document = json.loads(opened.manifest.to_json())
    del document["preview"]
    assert Manifest.from_json(json.dumps(document), "manifest.json") == without_map(opened).manifest
    assert without_map(opened).manifest.fingerprint == opened.manifest.fingerprint
    older = Pipeline.on(without_map(pipeline.bundle), pipeline.executor)
    steps, _ = events(older, size=(32, 32), steps=1)
    with pytest.raises(RequestError, match="export it again"):
        steps[0].preview()


@pytest.mark.parametrize(
    "wrong",
    [{"factors": [[1, 2]]}, {"bias": [1, 2]}, {"bias": "red"}, {"factors": [[1, 2, "blue"]]}, {"residual": None}],
    ids=str,
)
def test_a_damaged_map_is_named(bundle: Path, wrong: dict[str, Any]) -> None:
    document = json.loads(Bundle.open(bundle).manifest.to_json())
    document["preview"] |= wrong
    with pytest.raises(BundleError, match=r"manifest.json: preview"):
        Manifest.from_json(json.dumps(document), "manifest.json")


# The command


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_command_rewrites_a_preview_after_each_step(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    write = preview.write_preview

    def watched(image: Image.Image, path: Path) -> None:
        write(image, path)
        written.append(path.read_bytes())

    monkeypatch.setattr(preview, "write_preview", watched)
    options = ("--size", "64x48", "--steps", 3, "--seed", 1, "-o", "a.png", "--preview", "now.png")
    outcome = call_rt(capsys, "run", PROMPT, "--executor", "cpu", *options)
    assert outcome.lines == ["a.png"]
    assert len(set(written)) == len(written) == 3
    assert sorted(path.name for path in Path().iterdir()) == ["a.png", "now.png"]
    with Image.open("now.png") as image, Image.open("a.png") as whole:
        assert image.size == (8, 6)
        assert distance(image.convert("RGB"), whole.convert("RGB")) < 64


def test_a_preview_that_cannot_be_written_is_refused_at_once(capsys: Capture, bundle: Path) -> None:
    run = ("run", PROMPT, "-m", bundle, "--size", "32x32", "--steps", 1)
    with unchanged(Path()):
        assert_one_line_error(call_rt(capsys, *run, "--preview", "now.gif"), "now.gif")
        assert_one_line_error(call_rt(capsys, *run, "--preview", "nowhere/now.png"), "nowhere")
        same = ("--preview", "a.png", "-o", "a.png")
        assert_one_line_error(call_rt(capsys, *run, *same), "--preview", "--output", status=2)


def test_a_preview_of_a_bundle_without_a_map_is_refused(
    capsys: Capture, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_bundle = Bundle.open
    monkeypatch.setattr(Bundle, "open", lambda path: without_map(open_bundle(path)))
    with unchanged(Path()):
        outcome = call_rt(capsys, "run", PROMPT, "-m", bundle, "--preview", "now.png")
        assert_one_line_error(outcome, "--preview", "export it again")


def test_a_preview_of_1024_is_128_wide(pipeline: Pipeline) -> None:
    colours = pipeline.bundle.manifest.preview
    assert colours is not None
    latents: FloatArray = np.random.default_rng(0).standard_normal((16, 128, 128), dtype=np.float32)
    assert preview_image(latents, colours).size == (128, 128)
