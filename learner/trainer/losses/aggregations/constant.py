"""Dr. GRPO's mean over episodes of sums over their tokens, divided by a constant."""

from torch import Tensor

from learner.trainer.losses.tokens import Tokens, Totals
from understudy.config import AlgorithmConfig


def constant(
    *, losses_N: Tensor, tokens: Tokens, totals: Totals, config: AlgorithmConfig
) -> Tensor:
    """Sum of losses / (num_episodes constant_length).

    Unlike in a mean over tokens, what a token counts does not depend on how long its own or other
    episodes are. Source: arXiv 2503.20783 (Dr. GRPO).

    Args:
        losses_N: of this part's tokens, with gradient.
        tokens: not used.
        totals: of all parts on all ranks.
        config: constant_length.
    """
    return losses_N.sum() / (max(totals.num_episodes, 1) * config.constant_length)
