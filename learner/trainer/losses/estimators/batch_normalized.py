"""REINFORCE++'s advantage: a reward among those of the whole batch, in their deviations."""

from collections.abc import Sequence

import numpy as np

from learner.trainer.losses.estimators.rewards import EPSILON, Array, deviation_of


def batch_normalized(groups: Sequence[Array]) -> list[Array]:
    """A_i = (R_i - mean(R)) / (std(R) + EPSILON), over all episodes of the batch.

    Source: arXiv 2501.03262 (REINFORCE++), over episodes rather than tokens: the divergence is a
    term of the loss here, not of the reward, so all tokens of an episode have one advantage.
    """
    mean = np.concatenate(groups).mean() if groups else 0.0
    scale = deviation_of(groups) + EPSILON
    return [(rewards - mean) / scale for rewards in groups]
