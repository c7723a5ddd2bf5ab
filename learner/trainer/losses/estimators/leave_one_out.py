"""RLOO's advantage: a reward above the mean of the group's others."""

from collections.abc import Sequence

import numpy as np

from learner.trainer.losses.estimators.rewards import Array


def leave_one_out(groups: Sequence[Array]) -> list[Array]:
    """A_i = R_i - sum of R_j over j != i / (G - 1), of a group of G episodes.

    The baseline does not depend on episode i, so it adds no bias. An episode without others has
    an advantage of 0. Source: arXiv 2402.14740 (RLOO).
    """
    return [_above_others(rewards) for rewards in groups]


def _above_others(rewards: Array) -> Array:
    num_others = len(rewards) - 1
    if num_others < 1:
        return np.zeros_like(rewards)
    above: Array = rewards - (rewards.sum() - rewards) / num_others
    return above
