"""IcePop: tokens that the two policies disagree on are left out."""

import torch
from torch import Tensor

from learner.trainer.losses.ratios import ratio_of
from learner.trainer.losses.tokens import Tokens
from understudy.config import AlgorithmConfig


@torch.no_grad()
def token_mask(*, log_ratios_N: Tensor, tokens: Tokens, config: AlgorithmConfig) -> Tensor:
    """Weights [N]: w where mask_low <= w <= mask_high, else 0, with w = pi_prox / mu of the token.

    Source: IcePop, arXiv 2510.18855.

    Args:
        log_ratios_N: log w.
        tokens: not used.
        config: mask_low and mask_high.
    """
    weights_N = ratio_of(log_ratios_N)
    inside_N = (weights_N >= config.mask_low) & (weights_N <= config.mask_high)
    return torch.where(inside_N, weights_N, 0.0)
