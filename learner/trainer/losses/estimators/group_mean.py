"""Dr. GRPO's advantage: a reward above the mean of its group."""

from collections.abc import Sequence

from learner.trainer.losses.estimators.rewards import Array


def group_mean(groups: Sequence[Array]) -> list[Array]:
    """A_i = R_i - mean(R), over the episodes of one group.

    Undivided, groups that are nearly all solved or nearly all failed weigh no more than others.
    Source: arXiv 2503.20783 (Dr. GRPO).
    """
    return [rewards - rewards.mean() for rewards in groups]
