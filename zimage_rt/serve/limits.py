"""What one request may ask for. Whatever is refused here costs the engine nothing."""

from dataclasses import dataclass

from zimage_runtime.bundle.manifest import Manifest
from zimage_runtime.errors import RequestError
from zimage_runtime.model.geometry import image_geometry

from .orders import Wanted

MAX_PROMPT = 32_000
"""Characters, as OpenAI's API has it. The model sees the first 512 tokens."""

MAX_LORAS = 8


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on requests."""

    max_pixels: int = 3840 * 2160  # of an image that is generated; OpenAI's largest
    max_steps: int = 50
    max_count: int = 16  # images of a request
    max_queue: int = 64  # requests that wait
    max_body: int = 64 << 20  # bytes of a request
    max_bodies: int = 256 << 20  # bytes of all requests that have no answer yet
    max_sources: int = 512 << 20  # bytes of the source images and masks of all requests that wait
    max_source_pixels: int = 50_000_000  # of a source image or mask

    def check(self, wanted: Wanted, manifest: Manifest) -> None:
        """Raises `RequestError` for what is out of bounds or not valid, by the rules of `zimage-rt run`."""
        images = {"the image": wanted.image, "the mask": wanted.mask, "the control image": wanted.control}
        wanted.request(*(name if data else None for name, data in images.items()))  # which are decoded later
        for name, text in (("prompt", wanted.prompt), ("negative prompt", wanted.negative)):
            if len(text) > MAX_PROMPT:
                raise RequestError(f"the {name} has {len(text)} characters; at most {MAX_PROMPT} are allowed")
        size = wanted.size or (manifest.defaults.width, manifest.defaults.height)
        geometry = image_geometry(*size, manifest.config)
        if geometry.width * geometry.height > self.max_pixels:
            raise RequestError(
                f"{geometry.width}x{geometry.height} has more than the {self.max_pixels} pixels that this server allows"
            )
        if (wanted.steps or 0) > self.max_steps:
            raise RequestError(f"steps must be 1 to {self.max_steps} on this server, not {wanted.steps}")
        if wanted.count > self.max_count:
            raise RequestError(f"a request may ask for 1 to {self.max_count} images, not {wanted.count}")
        if len(wanted.loras) > MAX_LORAS:
            raise RequestError(f"a request may name up to {MAX_LORAS} LoRA, not {len(wanted.loras)}")
