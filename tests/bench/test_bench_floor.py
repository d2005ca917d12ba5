"""Operations against torch's counter on diffusers' modules, and the floors that they set."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zimage_export.synthetic.checkpoint import SMALL
from zimage_rt.bench import run as runs
from zimage_rt.bench.floor import NO_DEVICE, NO_GPU_RATE, Rates, floor_of, unknown_rates
from zimage_rt.bench.job import Done
from zimage_rt.bench.jobs import Planned, open_bundles
from zimage_rt.bench.run import Runner
from zimage_rt.bench.schema import Case, Floor, Reading
from zimage_rt.bench.watch import Watched
from zimage_runtime.machine.nvml import Unmeasured
from zimage_runtime.model.geometry import image_geometry, padded
from zimage_runtime.model.operations import decode_operations, step_operations, text_operations

CONFIG = SMALL.config
TOKENS = 20


def counted(call: Any) -> float:
    """Of matrix products, convolutions and attention, by torch, which counts attention where it is decomposed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("size", [(64, 64), (80, 112)])
def test_a_step_takes_what_torch_counts(diffusers_pipeline: Any, size: tuple[int, int]) -> None:
    geometry = image_geometry(*size, CONFIG)
    model = diffusers_pipeline.transformer
    latents = torch.randn(CONFIG.transformer.in_channels, 1, geometry.latent_height, geometry.latent_width)
    caption = torch.randn(TOKENS, CONFIG.transformer.cap_feat_dim)
    found = counted(lambda: model([latents], torch.tensor([0.5]), [caption], return_dict=False))
    # torch counts the caption and the modulation with every step; we do once what does not depend on it
    d, m = CONFIG.transformer, padded(TOKENS)
    block = 2.0 * m * (4 * d.dim**2 + 3 * d.dim * d.ffn_dim) + 4.0 * m * m * d.dim
    once = 2.0 * m * d.cap_feat_dim * d.dim + d.n_refiner_layers * block
    timestep = 2.0 * (256 * 1024 + 1024 * d.adaln_dim)
    modulation = 2.0 * d.adaln_dim * (d.modulated_blocks * 4 * d.dim + d.dim)
    whole = step_operations(CONFIG, geometry, TOKENS).total + once + timestep + modulation
    # the last layer runs on caption tokens, too, in diffusers; its result there is thrown away
    whole += 2.0 * m * d.dim * d.patch_dim
    assert whole == pytest.approx(found, rel=0.01)


def test_the_text_encoder_takes_what_torch_counts(diffusers_pipeline: Any) -> None:
    text, model = CONFIG.text_encoder, diffusers_pipeline.text_encoder
    found = counted(lambda: model(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False))
    d, m = CONFIG.transformer, padded(TOKENS)
    block = 2.0 * m * (4 * d.dim**2 + 3 * d.dim * d.ffn_dim) + 4.0 * m * m * d.dim
    caption = 2.0 * TOKENS * d.cap_feat_dim * d.dim + d.n_refiner_layers * block
    encoder = text_operations(CONFIG, TOKENS).total - caption
    head = 2.0 * TOKENS * text.hidden_size * text.vocab_size if hasattr(model, "lm_head") else 0.0
    expected = encoder * text.num_hidden_layers / text.used_layers + head  # torch ran the layer that we leave out
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("size", [(64, 64), (80, 112)])
def test_decoding_takes_what_torch_counts(diffusers_pipeline: Any, size: tuple[int, int]) -> None:
    geometry = image_geometry(*size, CONFIG)
    shape = (1, CONFIG.vae.latent_channels, geometry.latent_height, geometry.latent_width)
    found = counted(lambda: diffusers_pipeline.vae.decode(torch.randn(shape)))
    assert decode_operations(CONFIG, geometry).total == pytest.approx(found, rel=0.001)


def case(precision: str) -> Case:
    return Case("zimage-rt", "b", precision, "", "cpu", 64, 64, 8, 1, "", 1, 1)


def test_integers_speed_up_linear_layers_alone() -> None:
    geometry = image_geometry(64, 64, CONFIG)
    rates = Rates(Reading(1e9), Reading(4e9))
    floats, integers = (floor_of(case(p), CONFIG, geometry, TOKENS, rates, 1.0) for p in ("fp32", "int8"))
    step = step_operations(CONFIG, geometry, TOKENS)
    assert floats.step.value == pytest.approx(step.total / 1e9)
    assert integers.step.value == pytest.approx(step.linear / 4e9 + step.other / 1e9)
    assert integers.decode.value == floats.decode.value
    assert floats.step_fraction.value == floats.step.value  # of a step of one second


def test_without_a_rate_there_is_no_floor() -> None:
    floor = floor_of(case("fp32"), CONFIG, image_geometry(64, 64, CONFIG), TOKENS, unknown_rates("no idea"), 1.0)
    assert floor.step.value is None
    assert floor.step_fraction.reason == "no idea"


GPU_CASES = {
    "an executor that the manifest lists": ("zimage-rt", "cuda", None),
    "an executor that the manifest does not list": ("zimage-rt", "tensorrt", None),
    "a baseline that ran on a GPU": ("diffusers-bf16", "diffusers-bf16", True),
    "a baseline that does not know": ("stable-diffusion.cpp", "stable-diffusion.cpp", None),
}


@pytest.mark.parametrize("name", GPU_CASES)
def test_a_case_on_a_gpu_has_no_floor_and_never_the_processors(
    name: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without NVML, where nothing but the case itself says that there is a GPU."""
    system, executor, on_gpu = GPU_CASES[name]
    floor = measured_floor(bundle, tmp_path, monkeypatch, system, executor, on_gpu)
    for reading in (floor.float_rate, floor.integer_rate, floor.step, floor.step_fraction):
        assert reading.value is None
        assert reading.reason == (NO_DEVICE if system == "stable-diffusion.cpp" else NO_GPU_RATE)


@pytest.mark.parametrize(
    ("system", "executor", "on_gpu"), [("zimage-rt", "cpu", None), ("diffusers", "diffusers", False)]
)
def test_a_case_on_the_processor_has_its_floor(
    system: str, executor: str, on_gpu: bool | None, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured_floor(bundle, tmp_path, monkeypatch, system, executor, on_gpu).float_rate.value == 1e9


def measured_floor(
    bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch, system: str, executor: str, on_gpu: bool | None
) -> Floor:
    """The floor in the row of a worker that only reports where it ran."""
    done = Done(on_gpu, None, (), {})
    watched = Watched(0.0, 1.0, (), (), done, None, (), Unmeasured("no NVML"), (), {})
    monkeypatch.setattr(runs, "watch", lambda *_, **__: watched)
    monkeypatch.setattr(runs, "cpu_rates", lambda: Rates(Reading(1e9), Reading(4e9)))
    (opened,) = open_bundles([str(bundle)])
    measured = replace(case("fp32"), system=system, executor=executor)
    planned = Planned(measured, opened.path, opened, "no reference")
    monkeypatch.setattr(Runner, "_converted", lambda self, planned: planned.model)
    (row,) = Runner(out, [opened], Unmeasured("no NVML"), "zimage-rt bench").run([planned])
    assert row.floor is not None
    return row.floor
