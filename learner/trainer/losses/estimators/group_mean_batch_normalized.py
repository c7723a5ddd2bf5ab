"""The advantage of REINFORCE++ with baseline: above the group's mean, in the batch's deviations."""

from collections.abc import Sequence

from learner.trainer.losses.estimators.group_mean import group_mean
from learner.trainer.losses.estimators.rewards import EPSILON, Array, deviation_of


def group_mean_batch_normalized(groups: Sequence[Array]) -> list[Array]:
    """A_i = B_i / (std(B) + EPSILON), with B_i = R_i - mean(R of its group), B of the whole batch.

    The mean of B, which the paper takes off as well, is 0. A group of equal rewards has advantages
    of 0. Source: arXiv 2501.03262 (REINFORCE++ with baseline).
    """
    centred = group_mean(groups)
    scale = deviation_of(centred) + EPSILON
    return [advantages / scale for advantages in centred]
