"""No correction: tokens count alike, whoever sampled them."""

import torch
from torch import Tensor

from learner.trainer.losses.tokens import Tokens
from understudy.config import AlgorithmConfig


@torch.no_grad()
def uncorrected(*, log_ratios_N: Tensor, tokens: Tokens, config: AlgorithmConfig) -> Tensor:
    """Weights [N] of 1.

    Args:
        log_ratios_N: log pi_prox / mu, of which only the shape counts.
        tokens: not used.
        config: not used.
    """
    return torch.ones_like(log_ratios_N)
