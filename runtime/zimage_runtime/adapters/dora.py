"""DoRA: the norm of each output channel of a changed weight is set, which is one factor per channel.

For a weight W, a change Δ with its scale (and the weight that the user gives), and magnitudes m, the factor is
m / ‖W + Δ‖ by rows. Where several files change a layer, each changes what those before it made, and W in the norm is
the published weight: W₁ = f₁ ∘ (W + Δ₁), W₂ = f₂ ∘ (W₁ + Δ₂). All this is as PEFT has it.
"""

import numpy as np

from ..arrays import FloatArray
from ..bundle.stored_weights import PublishedRows
from .reader import Delta

_PIECE_BYTES = 4 << 20  # of float32
EPSILON = np.float32(np.finfo(np.float32).eps)
"""What is added to a norm, as LyCORIS does: no layer of zeros is divided by."""


def row_factors(changed: FloatArray, magnitudes: FloatArray) -> FloatArray:
    """[rows]: the factor of each row of a changed weight."""
    norms = np.sqrt(np.einsum("ij,ij->i", changed, changed))
    factors: FloatArray = magnitudes.reshape(-1) / (norms + EPSILON)
    return factors


def channel_factors(delta: Delta, scale: float, published: PublishedRows) -> FloatArray:
    """[out]: the factors of a change times `scale`; reads the layer's weight once, a few rows at a time."""
    assert delta.magnitude is not None
    out, width = delta.target.shape
    factors, step = np.empty(out, np.float32), max(_PIECE_BYTES // (4 * width), 1)
    for start in range(0, out, step):
        stop = min(start + step, out)
        rows = published.rows(delta.target.name, start, stop) + np.float32(scale) * delta.form.rows(start, stop)
        factors[start:stop] = row_factors(rows, delta.magnitude.rows(start, stop))
    return factors
