"""Truncated importance weights, token by token."""

import torch
from torch import Tensor

from learner.trainer.losses.ratios import ratio_of
from learner.trainer.losses.tokens import Tokens
from understudy.config import AlgorithmConfig


@torch.no_grad()
def token(*, log_ratios_N: Tensor, tokens: Tokens, config: AlgorithmConfig) -> Tensor:
    """Weights [N]: min(w, cap), with w = pi_prox / mu of the token alone.

    Sources: arXiv 2110.00641, 2505.24298 for w; the cap as in 1802.01561.

    Args:
        log_ratios_N: log w.
        tokens: not used.
        config: importance_cap.
    """
    return ratio_of(log_ratios_N).clamp(max=config.importance_cap)
