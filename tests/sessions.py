"""A session of a pipeline's executor, for tests that look at one stage."""

from zimage_runtime.executors.protocol import Session, Work
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.pipeline import Pipeline


def session(pipeline: Pipeline, size: tuple[int, int] = (64, 64), tokens: int = 32) -> Session:
    """An open session for a small request with a source image. Nobody closes it: what it loads stays as planned."""
    geometry = image_geometry(*size, pipeline.bundle.manifest.config)
    executor = pipeline.executor
    return executor.session(executor.plan(Work(geometry=geometry, tokens=tokens, encodes=True))).__enter__()
