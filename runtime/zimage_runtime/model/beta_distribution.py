"""Quantiles of the symmetric beta distribution, in float64: what scipy.stats.beta.ppf gives, without scipy."""

import math

import numpy as np
from numpy.typing import NDArray

_BISECTIONS = 60  # to the last bit of a float64 between 0 and 1/2
_TERMS = 200  # of the series, whose terms shrink by half or more


def beta_quantiles(probabilities: NDArray[np.float64], shape: float) -> NDArray[np.float64]:
    """The values of Beta(`shape`, `shape`) below which each probability, from 0 to 1, lies."""
    return np.array([_quantile(float(probability), shape) for probability in probabilities])


def _quantile(probability: float, shape: float) -> float:
    if probability > 0.5:  # by symmetry: the series below is for the lower half
        return 1.0 - _quantile(1.0 - probability, shape)
    low, high = 0.0, 0.5
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _distribution(middle, shape) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _distribution(x: float, shape: float) -> float:
    """The probability of a value below `x`, for `x` up to 1/2.

    The incomplete beta function as a series of positive terms (DLMF 8.17.8): x^a (1-x)^b / (a B(a, b)) times the sum
    of (a+b)_n / (a+1)_n x^n.
    """
    if x <= 0:
        return 0.0
    term = total = 1.0
    for n in range(_TERMS):
        term *= (2 * shape + n) / (shape + 1 + n) * x
        total += term
        if term < 1e-17 * total:
            break
    log_beta = 2 * math.lgamma(shape) - math.lgamma(2 * shape)
    return total * math.exp(shape * (math.log(x) + math.log1p(-x)) - log_beta) / shape
