"""Truncated importance weights of steps: V-trace's rho."""

import torch
from torch import Tensor

from learner.trainer.losses.ratios import ratio_of
from learner.trainer.losses.tokens import Tokens, mean_by, sum_by
from understudy.config import AlgorithmConfig


@torch.no_grad()
def step(*, log_ratios_N: Tensor, tokens: Tokens, config: AlgorithmConfig) -> Tensor:
    """Weights [N]: min(w of the token's step, cap), V-trace's rho.

        w of a step = (product of its tokens' w)^(1 / number of tokens)     step_ratio "geometric"
        w of a step = product of its tokens' w                              step_ratio "product"

    Source: arXiv 1802.01561, section 4.2; the geometric mean as GSPO's, 2507.18071.

    Args:
        log_ratios_N: log w, with w = pi_prox / mu of each token.
        tokens: with their steps.
        config: step_ratio and importance_cap (rho-bar).
    """
    merge = mean_by if config.step_ratio == "geometric" else sum_by
    log_ratios_K = merge(log_ratios_N, tokens.step_N, tokens.num_steps)
    return ratio_of(log_ratios_K).clamp(max=config.importance_cap)[tokens.step_N]
