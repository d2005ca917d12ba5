"""The array types that cross module borders."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
"""Float32 values; shapes are given where one is used."""
