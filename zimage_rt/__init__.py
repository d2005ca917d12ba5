"""Z-Image Turbo on the GPU or CPU you already have.

>>> from zimage_rt import Pipeline
>>> with Pipeline.from_bundle("z-image-turbo-fp32") as pipeline:
...     pipeline.generate("a red fox in the snow", size=(1024, 1024), seed=7).save("fox.png")

Importing this package loads nothing else; names are resolved when first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zimage_runtime.errors import ZImageRuntimeError
    from zimage_runtime.pipeline import CaptionEvent, EncodeEvent, ImageEvent, NoticeEvent, Pipeline, Result, StepEvent

    from .demo import demo_bundle

__all__ = [
    "CaptionEvent",
    "EncodeEvent",
    "ImageEvent",
    "NoticeEvent",
    "Pipeline",
    "Result",
    "StepEvent",
    "ZImageRuntimeError",
    "demo_bundle",
]

_HOMES = {
    "CaptionEvent": "zimage_runtime.pipeline",
    "EncodeEvent": "zimage_runtime.pipeline",
    "NoticeEvent": "zimage_runtime.pipeline",
    "ImageEvent": "zimage_runtime.pipeline",
    "Pipeline": "zimage_runtime.pipeline",
    "Result": "zimage_runtime.pipeline",
    "StepEvent": "zimage_runtime.pipeline",
    "ZImageRuntimeError": "zimage_runtime.errors",
    "demo_bundle": "zimage_rt.demo",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
