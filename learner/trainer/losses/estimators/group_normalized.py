"""GRPO's advantage: a reward among those of its group, in their deviations."""

from collections.abc import Sequence

from learner.trainer.losses.estimators.rewards import EPSILON, Array


def group_normalized(groups: Sequence[Array]) -> list[Array]:
    """A_i = (R_i - mean(R)) / (std(R) + EPSILON), over the G episodes of one group.

    The deviation has G in its denominator. A group of equal rewards has advantages of 0.
    Source: arXiv 2402.03300, section 4.1.2 (outcome supervision).
    """
    return [(rewards - rewards.mean()) / (rewards.std() + EPSILON) for rewards in groups]
