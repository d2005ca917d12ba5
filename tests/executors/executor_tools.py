"""What the tests of the tensorrt executor share."""

from collections.abc import Callable

from device_stand_in import StandInDevice
from parity import Case

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.executors.protocol import Work
from zimage_runtime.executors.tensorrt.block_catalog import VariantSpec
from zimage_runtime.executors.tensorrt.plan import smallest_budget
from zimage_runtime.executors.tensorrt.stage_sizes import STAGES, ImageSizes, stage_needs
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.pipeline import Pipeline

TOLERANCE = 1e-5  # relative, as of the other stages; the twins' float32 rounding comes to a few 1e-7
EVERYTHING = 1 << 30
CASE = Case("a red fox in the snow", (64, 96), steps=3, seed=5)


Make = Callable[..., tuple[StandInDevice, Pipeline]]


def sizes_of(opened: Bundle, case: Case, tokens: int, images: int = 1) -> ImageSizes:
    return ImageSizes.of(image_geometry(*case.size, opened.manifest.config), tokens, images)


def work_of(opened: Bundle, case: Case, tokens: int) -> Work:
    return Work(geometry=image_geometry(*case.size, opened.manifest.config), tokens=tokens)


def least(opened: Bundle, spec: VariantSpec, sizes: ImageSizes) -> int:
    config = opened.manifest.config
    return smallest_budget({program: stage_needs(program, spec, config, sizes) for program in STAGES}, sizes)
