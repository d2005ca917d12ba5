"""Groups on the executors for GPUs, in memory for everything and in memory that makes stages take turns."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from executor_tools import CASE, EVERYTHING, Make, least, sizes_of
from group_tools import in_groups, singles
from PIL import Image
from webgpu_adapter import require_adapter

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.events import Request
from zimage_runtime.executors.ort.cuda import cuda_executor
from zimage_runtime.executors.ort.device import OrtDevice
from zimage_runtime.executors.protocol import UNLIMITED
from zimage_runtime.executors.tensorrt.block_catalog import VariantSpec
from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep

SIZE = CASE.size


@pytest.fixture
def requests(tmp_path: Path) -> list[Request]:
    """Prompts of several lengths, guidance, a source image, another number of steps."""
    pixels = np.random.default_rng(1).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "source.png")
    return [
        Request("a fox", size=SIZE, steps=2, seed=1),
        Request("a lighthouse " * 20, size=SIZE, steps=3, seed=2, cfg_scale=2.0, negative="a hen"),
        Request("a fox", size=SIZE, steps=2, seed=3),
        Request("a hen", size=SIZE, steps=2, seed=4, image=tmp_path / "source.png", strength=0.6),
        Request("", size=SIZE, steps=2, seed=5),
    ]


def check(pipeline: Pipeline, requests: list[Request]) -> list[int]:
    """Asserts that groups change no bit, and returns their sizes."""
    expected = singles(pipeline, requests)
    assert len(set(expected.values())) == len(requests)
    found, sizes = in_groups(pipeline, requests)
    assert found == expected
    return sizes


@pytest.mark.parametrize("takes_turns", [False, True])
def test_cudas_programs_with_the_cpu_in_the_gpus_place(
    opened: Bundle, requests: list[Request], takes_turns: bool
) -> None:
    budget = UNLIMITED
    if takes_turns:
        with Pipeline.on(opened, cuda_executor(opened, budget=budget, device=OrtDevice("cpu"))) as large:
            budget = large.prepare(requests[1]).plan.peak - 1
    with Pipeline.on(opened, cuda_executor(opened, budget=budget, device=OrtDevice("cpu"))) as pipeline:
        assert (pipeline.prepare(requests[1]).plan.group > 1) == takes_turns
        assert max(check(pipeline, requests)) > 1


@pytest.mark.parametrize("budget", ["everything", "least"])
def test_tensorrts_blocks_on_a_stand_in(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec, requests: list[Request], budget: str
) -> None:
    without_source = [request for request in requests if request.image is None]
    sizes = replace(sizes_of(opened, CASE, len(cpu.token_ids(requests[1].prompt))), conditionings=2)
    _, pipeline = make(EVERYTHING if budget == "everything" else least(opened, spec, sizes))
    assert check(pipeline, without_source) == [4]


@pytest.mark.slow  # a software adapter takes a minute
def test_webgpus_programs_on_an_adapter(opened: Bundle, requests: list[Request]) -> None:
    require_adapter()
    from zimage_runtime.executors.ort.webgpu import webgpu_executor
    from zimage_runtime.executors.ort.webgpu_adapters import find_adapter

    with Pipeline.on(opened, webgpu_executor(opened, find_adapter(), budget=UNLIMITED)) as pipeline:
        small = [replace(request, size=(32, 32), steps=1) for request in requests[:3]]
        assert check(pipeline, small) == [3]
