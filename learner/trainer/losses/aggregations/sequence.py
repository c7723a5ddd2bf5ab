"""GRPO's mean over episodes of the means over their tokens."""

from torch import Tensor

from learner.trainer.losses.tokens import Tokens, Totals, mean_by
from understudy.config import AlgorithmConfig


def sequence(
    *, losses_N: Tensor, tokens: Tokens, totals: Totals, config: AlgorithmConfig
) -> Tensor:
    """Sum over episodes of the mean of their tokens' losses / num_episodes.

    Every episode counts alike, so that tokens of long ones count less. Source: arXiv 2402.03300,
    equation 3.

    Args:
        losses_N: of this part's tokens, with gradient.
        tokens: with their episodes; each of them is here with all its tokens.
        totals: of all parts on all ranks.
        config: not used.
    """
    means_E = mean_by(losses_N, tokens.episode_N, tokens.num_episodes)
    return means_E.sum() / max(totals.num_episodes, 1)
