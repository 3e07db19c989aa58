"""The choice of some of many rows, columns or tokens."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def evenly_spaced(number: int, most: int) -> NDArray[Any]:
    """Returns at most `most` evenly spaced indices from 0 to `number` - 1, both ends included."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(int))
