"""Under control we generate what diffusers generates, with every published version, in fp32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from control_tools import (
    LITE,
    TWO,
    TWO_ONE,
    Controlled,
    Version,
    all_of_ours,
    diffusers_controlnet,
    ours,
    theirs,
    with_lora,
    write_lora,
)
from parity import Guided, check_parity, relative_error

from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep

Nets = Callable[..., Path]


def both(pipeline: Pipeline, reference: Any, version: Version, net: Path, case: Controlled) -> None:
    expected = theirs(reference, diffusers_controlnet(version), case)
    check_parity(ours(pipeline, net, case), expected)


@pytest.mark.parametrize(
    "case", [Controlled((64, 64), 1.0, 2), Controlled((80, 112), 0.65, 2, 7, guided=Guided())], ids=["square", "guided"]
)
def test_every_version(
    pipeline: Pipeline, diffusers_pipeline: Any, version: Version, net_of: Nets, case: Controlled
) -> None:
    both(pipeline, diffusers_pipeline, version, net_of(version), case)


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.25, 0.8)])
def test_a_window_of_the_steps(
    pipeline: Pipeline, diffusers_pipeline: Any, net_of: Nets, window: tuple[float, float]
) -> None:
    both(pipeline, diffusers_pipeline, LITE, net_of(LITE), Controlled((64, 48), 1.0, 4, window=window))


@pytest.mark.parametrize("version", [TWO, TWO_ONE], ids=lambda version: version.name)
def test_inpainting(pipeline: Pipeline, diffusers_pipeline: Any, version: Version, net_of: Nets) -> None:
    case = Controlled((80, 48), 0.65, 2, inpaints=True)
    both(pipeline, diffusers_pipeline, version, net_of(version), case)


def test_what_is_compared_makes_a_difference(pipeline: Pipeline, net_of: Nets) -> None:
    """Or parity would prove nothing."""
    full = Controlled((64, 48), 1.0, 3)
    cases = [full, Controlled((64, 48), 0.65, 3), Controlled((64, 48), 1.0, 3, window=(0.0, 0.5))]
    cases.append(Controlled((64, 48), 1.0, 3, inpaints=True))
    found = [ours(pipeline, net_of(LITE), case).latents for case in cases]
    found += [ours(pipeline, net_of(TWO), full).latents, ours(pipeline, None, full).latents]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert relative_error(one, other) > 0.01


def test_a_batch_and_several_images_are_single_ones(pipeline: Pipeline, net_of: Nets) -> None:
    case = Controlled((64, 48), 0.8, 2)
    batched = all_of_ours(pipeline, net_of(LITE), case, count=3, batch_size=2)
    for index, found in enumerate(batched):
        check_parity(found, ours(pipeline, net_of(LITE), case, seed=case.seed + index))
    assert not np.array_equal(batched[0].latents, batched[1].latents)


def test_lora_changes_what_the_control_sees(pipeline: Pipeline, checkpoint: Path, net_of: Nets, tmp_path: Path) -> None:
    """diffusers' ControlNet shares the transformer's modules, and so its LoRA."""
    case, path = Controlled((64, 48), 0.8, 2), write_lora(tmp_path / "refiners.safetensors")
    expected = theirs(with_lora(checkpoint, path, 0.7), diffusers_controlnet(LITE), case)
    found = ours(pipeline, net_of(LITE), case, loras=[(path, 0.7)])
    check_parity(found, expected)
    assert relative_error(ours(pipeline, net_of(LITE), case).latents, expected.latents) > 0.01
