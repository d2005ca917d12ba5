"""Each way of getting the model subtly wrong, done on purpose: the parity gate must catch every one.

A break is a change to the product's functions, or to a copy of its bundle, in front of the unchanged gate.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from facts import raises_with
from parity import Case, Drawing, check_parity, draw, draw_with_diffusers

from zimage_export.build import BuildOptions, build
from zimage_export.graphs.layers import Layers
from zimage_export.source.checkpoint import Checkpoint
from zimage_runtime import prepare, stages
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.tensors import read_header
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.executors.ort.cpu import CpuSession
from zimage_runtime.model import geometry, schedule
from zimage_runtime.model.config import TextEncoderConfig
from zimage_runtime.model.geometry import ImageGeometry, Rotary
from zimage_runtime.model.linears import Linear
from zimage_runtime.model.schedule import Schedule
from zimage_runtime.model.tokenizer import PromptTokenizer
from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep

# 35 image tokens and a caption that is no multiple of 32 either: both have pads
CASE = Case("a red fox in the snow", (80, 112), 4, 3)

Positions = np.ndarray[Any, np.dtype[np.int64]]


@pytest.fixture(scope="module")
def expected(diffusers_pipeline: Any) -> Drawing:
    return draw_with_diffusers(diffusers_pipeline, CASE)


def assert_passes(bundle: Path, expected: Drawing) -> None:
    check_parity(draw(Pipeline.from_bundle(bundle), CASE)[0], expected)


def assert_caught(bundle: Path, expected: Drawing, what: str = "latents") -> None:
    """Generating still works; it is the gate that fails."""
    (drawing,) = draw(Pipeline.from_bundle(bundle), CASE)
    with raises_with(AssertionError, what, "diffusers"):
        check_parity(drawing, expected)


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to break."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.fixture
def rebuild(checkpoint: Path, tmp_path: Path) -> Callable[[], Path]:
    """Exports the checkpoint again with whatever is broken by then."""

    def run() -> Path:
        out = tmp_path / "rebuilt"
        build(str(checkpoint), out, BuildOptions(), Progress(quiet=True))
        return out

    return run


def test_nothing_broken_passes(
    bundle: Path, copy: Path, rebuild: Callable[[], Path], expected: Drawing, checkpoint: Path
) -> None:
    for path in (bundle, copy, rebuild()):
        assert_passes(path, expected)
    tokens = caption_tokens(bundle)
    assert tokens % 32, "the case has no caption pads, so nothing here would test them"


# Positions and pads


def caption_tokens(bundle: Path) -> int:
    return len(PromptTokenizer(bundle / "tokenizer.json").encode(CASE.prompt))


def test_caption_pads_that_stand_still(bundle: Path, expected: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = caption_tokens(bundle)

    def broken(padded_tokens: int) -> Positions:
        positions = geometry.caption_positions(padded_tokens)
        positions[tokens:] = 0
        return positions

    monkeypatch.setattr(stages, "caption_positions", broken)
    assert_caught(bundle, expected)


def test_an_image_that_starts_where_the_caption_without_pads_ends(
    bundle: Path, expected: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = caption_tokens(bundle)
    monkeypatch.setattr(stages, "image_positions", lambda size, _: geometry.image_positions(size, tokens))
    assert_caught(bundle, expected)


@pytest.mark.parametrize("kind", ["counting on", "at the image's time"])
def test_image_pads_elsewhere(kind: str, bundle: Path, expected: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(size: ImageGeometry, padded_caption: int) -> Positions:
        positions = geometry.image_positions(size, padded_caption)
        count = size.rows * size.columns
        positions[count:, 0] = padded_caption + 1
        if kind == "counting on":
            positions[count:, 1], positions[count:, 2] = np.divmod(np.arange(count, len(positions)), size.columns)
        return positions

    monkeypatch.setattr(stages, "image_positions", broken)
    assert_caught(bundle, expected)


def test_rows_and_columns_swapped(bundle: Path, expected: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        stages, "image_positions", lambda size, caption: geometry.image_positions(size, caption)[:, [0, 2, 1]]
    )
    assert_caught(bundle, expected)


@pytest.mark.parametrize("token", ["cap_pad_token", "x_pad_token"])
def test_a_pad_token_of_zeros(token: str, copy: Path, expected: Drawing) -> None:
    path = copy / "transformer" / "weights.safetensors"
    entry = read_header(path)[token]
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(bytes(entry.nbytes))
    assert_caught(copy, expected)


# The text encoder


def test_the_last_text_layer_not_dropped(
    rebuild: Callable[[], Path], expected: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextEncoderConfig, "used_layers", property(lambda self: self.num_hidden_layers))
    assert_caught(rebuild(), expected)


def test_one_text_layer_too_few(
    rebuild: Callable[[], Path], expected: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextEncoderConfig, "used_layers", property(lambda self: self.num_hidden_layers - 2))
    assert_caught(rebuild(), expected)


def test_the_final_text_norm_applied(
    bundle: Path, checkpoint: Path, expected: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = Checkpoint.open(checkpoint).text_encoder.get("norm.weight").read()
    encode_text = CpuSession.encode_text

    def broken(self: CpuSession, embeddings: FloatArray, rotary: Rotary) -> FloatArray:
        hidden = encode_text(self, embeddings, rotary)
        return hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + np.float32(1e-6)) * weight

    monkeypatch.setattr(CpuSession, "encode_text", broken)
    assert_caught(bundle, expected)


def test_the_prompt_without_its_template(bundle: Path, expected: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_runtime.model.tokenizer.apply_template", lambda prompt: prompt)
    assert_caught(bundle, expected)


# Graphs


@pytest.mark.parametrize("interleaved", [True, False], ids=["transformer", "text encoder"])
def test_the_other_rotary_embedding(
    interleaved: bool, rebuild: Callable[[], Path], expected: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transformer rotates neighbouring channels and the text encoder halves; each is given the other's."""
    rotary = Layers.rotary

    def broken(self: Layers, *args: Any, **kwargs: Any) -> str:
        if kwargs["interleaved"] is interleaved:
            kwargs["interleaved"] = not interleaved
        return rotary(self, *args, **kwargs)

    monkeypatch.setattr(Layers, "rotary", broken)
    assert_caught(rebuild(), expected)


@pytest.mark.parametrize("branch", ["w1", "gate_proj"], ids=["transformer", "text encoder"])
def test_gate_and_value_of_swiglu_swapped(
    branch: str, rebuild: Callable[[], Path], expected: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = Layers.gated

    swapped = []

    def broken(self: Layers, x: str, gate: Linear, up: Linear, *args: Any, **kwargs: Any) -> str:
        if gate.name.endswith(branch):
            swapped.append(gate.name)
            gate, up = up, gate
        return gated(self, x, gate, up, *args, **kwargs)

    monkeypatch.setattr(Layers, "gated", broken)
    assert_caught(rebuild(), expected)
    assert swapped


def test_queries_and_keys_not_normalized(
    rebuild: Callable[[], Path], expected: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layers, "head_norm", lambda self, x, *args, **kwargs: x)
    assert_caught(rebuild(), expected)


# The schedule and the step


def edit_config(bundle: Path, part: str, key: str, value: float) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    assert key in manifest["config"][part]
    manifest["config"][part][key] = value
    path.write_text(json.dumps(manifest), "utf-8")


def test_sigmas_not_shifted(copy: Path, expected: Drawing) -> None:
    edit_config(copy, "scheduler", "shift", 1.0)
    assert_caught(copy, expected)


def test_the_velocity_of_the_other_sign(bundle: Path, expected: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    step_size = Schedule.step_size
    monkeypatch.setattr(Schedule, "step_size", lambda self, index: -step_size(self, index))
    assert_caught(bundle, expected)


def test_the_transformer_given_sigma_instead_of_time(
    bundle: Path, expected: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Schedule:
        right = schedule.make_schedule(*args)
        return dataclasses.replace(right, timesteps=right.sigmas[:-1])

    monkeypatch.setattr(prepare, "make_schedule", broken)
    assert_caught(bundle, expected)


def test_the_next_seed(bundle: Path, expected: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = stages.TorchGenerator
    monkeypatch.setattr(stages, "TorchGenerator", lambda seed: generator(seed + 1))
    assert_caught(bundle, expected)


# The autoencoder: the latents are right, so only the pixels show it


@pytest.mark.parametrize(("key", "value"), [("shift_factor", 0.0), ("scaling_factor", 0.3711)])
def test_latents_not_unscaled_rightly(key: str, value: float, copy: Path, expected: Drawing) -> None:
    edit_config(copy, "vae", key, value)
    assert_caught(copy, expected, "pixel")


def test_the_image_upside_down(bundle: Path, expected: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = CpuSession.decode
    monkeypatch.setattr(CpuSession, "decode", lambda self, latents: decode(self, latents)[:, :, ::-1])
    assert_caught(bundle, expected, "pixel")


# The gate itself


def test_a_blank_reference_proves_nothing(expected: Drawing) -> None:
    blank = dataclasses.replace(expected, pixels=np.zeros_like(expected.pixels))
    with raises_with(AssertionError, "blank"):
        check_parity(blank, blank)


def test_latents_just_beyond_the_tolerance(expected: Drawing) -> None:
    check_parity(dataclasses.replace(expected, latents=expected.latents * np.float32(1 + 0.9e-4)), expected)
    with raises_with(AssertionError, "latents"):
        check_parity(dataclasses.replace(expected, latents=expected.latents * np.float32(1 + 1.1e-4)), expected)


def test_latents_that_are_not_finite(expected: Drawing) -> None:
    with raises_with(AssertionError, "latents"):
        check_parity(dataclasses.replace(expected, latents=expected.latents * np.float32(np.nan)), expected)
