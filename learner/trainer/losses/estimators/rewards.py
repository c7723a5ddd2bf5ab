"""What the estimators that go by rewards alone share."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

EPSILON = 1e-6
"""Added to deviations, so that equal rewards have advantages of 0."""


def deviation_of(groups: Sequence[Array]) -> float:
    """Standard deviation of all values of all groups, with their number in the denominator."""
    return float(np.std(np.concatenate(groups))) if groups else 0.0
