"""torch's CPU noise in numpy: the same seed starts from the same latents as diffusers and ComfyUI do.

``torch.randn(..., generator=torch.Generator("cpu").manual_seed(seed))`` draws 32-bit words from MT19937, makes
uniforms of their low 24 bits, and turns blocks of 16 of them into normals with the Box-Muller transform: the
first 8 of a block are radii, the last 8 are angles. Source: ``normal_fill`` in ATen's ``DistributionTemplates.h``.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError

_BLOCK = 16
_PARALLEL = 0.9995  # A1111's limit for the cosine of the angle between noises

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


@dataclass(frozen=True)
class BatchNoise:
    """The noise of a batch, draw after draw: each image's from its own seed, as if it were alone."""

    generators: tuple[TorchGenerator, ...]
    shape: tuple[int, ...]  # of one image's: [1, channels, height / 8, width / 8]

    def draw(self) -> NDArray[np.float32]:
        """The next normals: [batch, channels, height / 8, width / 8]."""
        return np.concatenate([generator.normals(self.shape) for generator in self.generators])


def mixed(own: NDArray[np.float32], other: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Noise between two, [batch, …] each, along the arc from `own` (`share` 0) to `other` (1), image by image.

    A1111's variations mix so, column by column of the latents; over an image's whole noise, no column of few values
    decides alone. Noises that point the same way are mixed along the line between them.
    """
    return np.stack([_between(one, another, share) for one, another in zip(own, other, strict=True)])


def _between(own: NDArray[np.float32], other: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    lengths = np.linalg.norm(own.astype(np.float64)) * np.linalg.norm(other.astype(np.float64))
    cosine = float(np.vdot(own.astype(np.float64), other.astype(np.float64)) / lengths)
    weights = (1 - share, share)
    if abs(cosine) < _PARALLEL:
        angle = math.acos(cosine)
        weights = (math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle))
    return np.float32(weights[0]) * own + np.float32(weights[1]) * other


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    blocks = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = np.float32(2 * math.pi) * blocks[:, 1]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).reshape(-1)
