"""From the rewards of a group's episodes to their advantages."""

import numpy as np
import numpy.typing as npt

EPSILON = 1e-6

Array = npt.NDArray[np.float64]


def group_advantages(rewards: npt.ArrayLike) -> Array:
    """(reward - mean) / (standard deviation + EPSILON) of one group, over all its episodes.

    A group of equal rewards has advantages of 0. Source: arXiv 2402.03300, outcome supervision.
    """
    values = np.asarray(rewards, np.float64)
    advantages: Array = (values - values.mean()) / (values.std() + EPSILON)
    return advantages
