"""torch's CPU noise in numpy: the same seed starts from the same latents as diffusers and ComfyUI do.

``torch.randn(..., generator=torch.Generator("cpu").manual_seed(seed))`` draws 32-bit words from MT19937, makes
uniforms of their low 24 bits, and turns blocks of 16 of them into normals with the Box-Muller transform: the
first 8 of a block are radii, the last 8 are angles. Source: ``normal_fill`` in ATen's ``DistributionTemplates.h``.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError

_BLOCK = 16

MAX_SEED = 2**64 - 1
"""The largest seed that torch accepts without a warning."""


class TorchGenerator:
    """A stream of normals equal to a torch CPU generator's, within 3e-7. Draws follow one another as in torch."""

    def __init__(self, seed: int) -> None:
        """Raises `RequestError` for a seed out of range. Only its low 32 bits count, as in torch."""
        if not 0 <= seed <= MAX_SEED:
            raise RequestError(f"seed must be 0 to {MAX_SEED}, not {seed}")
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)

    def _uniforms(self, count: int) -> NDArray[np.float32]:
        raw = self._words.randint(0, 2**32, size=count, dtype=np.uint32)
        return (raw & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def normals(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard normals of `shape`, of at least 16 values (torch draws fewer in another way)."""
        size = math.prod(shape)
        if size < _BLOCK:
            raise RequestError(f"noise of {size} values is not supported; at least {_BLOCK} are")
        values = self._uniforms(size)
        whole = size - size % _BLOCK
        values[:whole] = _box_muller(values[:whole])
        if whole != size:  # as in torch, the last 16 are drawn again and replaced
            values[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))
        return values.reshape(shape)


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    blocks = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = np.float32(2 * math.pi) * blocks[:, 1]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).reshape(-1)
