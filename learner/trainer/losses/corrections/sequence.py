"""Truncated importance weights of whole episodes."""

import torch
from torch import Tensor

from learner.trainer.losses.ratios import ratio_of
from learner.trainer.losses.tokens import Tokens, sum_by
from understudy.config import AlgorithmConfig


@torch.no_grad()
def sequence(*, log_ratios_N: Tensor, tokens: Tokens, config: AlgorithmConfig) -> Tensor:
    """Weights [N]: min(product of w over all tokens of the token's episode, cap).

    Unbiased but for the cap; the product of a long episode is seldom near 1. Source:
    https://richardli.xyz/rl-collapse (part 2, Seq-TIS).

    Args:
        log_ratios_N: log w, with w = pi_prox / mu of each token.
        tokens: with their episodes.
        config: importance_cap.
    """
    log_products_E = sum_by(log_ratios_N, tokens.episode_N, tokens.num_episodes)
    return ratio_of(log_products_E).clamp(max=config.importance_cap)[tokens.episode_N]
