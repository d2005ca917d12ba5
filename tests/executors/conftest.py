"""A pipeline on a stand-in device that runs the float32 twins of its block programs, and the `cpu` executor's."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from device_stand_in import StandInDevice
from executor_tools import EVERYTHING, Make
from onnx_engines import OnnxEngines, twin_spec, twins

from zimage_export.engines.block_graphs import BlockProgram
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.executors.tensorrt.block_catalog import VariantSpec
from zimage_runtime.executors.tensorrt.executor import TensorRtExecutor
from zimage_runtime.executors.tensorrt.plan import CONTEXT_BYTES
from zimage_runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


@pytest.fixture(scope="module")
def programs(opened: Bundle) -> list[BlockProgram]:
    return twins(opened)


@pytest.fixture(scope="module")
def spec(opened: Bundle, programs: list[BlockProgram]) -> VariantSpec:
    return twin_spec(opened, programs)


@pytest.fixture(scope="module")
def cpu(bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(bundle, "cpu")


@pytest.fixture
def make(opened: Bundle, programs: list[BlockProgram], spec: VariantSpec) -> Iterator[Make]:
    """Makes a pipeline on a stand-in device whose memory is exactly the budget. Afterwards, nothing may be left."""
    made: list[tuple[StandInDevice, TensorRtExecutor]] = []

    def make_pipeline(
        vram: int = EVERYTHING,
        *,
        seed: int = 0,
        pinnable: int = 0,
        clean: bool = True,
        note: Callable[[str], object] = lambda text: None,
    ) -> tuple[StandInDevice, Pipeline]:
        device = StandInDevice(limit=vram - CONTEXT_BYTES, seed=seed)
        engines = OnnxEngines(device, programs, spec)
        executor = TensorRtExecutor(opened, device, engines, spec, vram, pinnable, note=note)
        if clean:
            made.append((device, executor))
        return device, Pipeline.on(opened, executor)

    yield make_pipeline
    for device, executor in made:
        device.fail = lambda call: False
        executor.close()
        device.assert_clean()
