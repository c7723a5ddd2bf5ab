"""DAPO's mean over tokens."""

from torch import Tensor

from learner.trainer.losses.tokens import Tokens, Totals
from understudy.config import AlgorithmConfig


def token(*, losses_N: Tensor, tokens: Tokens, totals: Totals, config: AlgorithmConfig) -> Tensor:
    """Sum of losses / num_tokens: every token of a batch counts alike.

    Source: arXiv 2503.14476, section 3.3 (DAPO).

    Args:
        losses_N: of this part's tokens, with gradient.
        tokens: not used.
        totals: of all parts on all ranks.
        config: not used.
    """
    return losses_N.sum() / max(totals.num_tokens, 1)
