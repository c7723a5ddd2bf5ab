"""Generalised advantage estimation on steps."""

import torch
from torch import Tensor

from learner.trainer.losses.estimators.recursion import accumulate, next_values
from learner.trainer.losses.tokens import Steps, Targets
from understudy.config import AlgorithmConfig


@torch.no_grad()
def gae(
    *,
    log_ratios_K: Tensor,
    values_K: Tensor,
    end_values_E: Tensor,
    steps: Steps,
    config: AlgorithmConfig,
) -> Targets:
    """Exponentially weighted temporal differences.

        delta_k = r_k + gamma V_{k+1} - V_k
        A_k = delta_k + gamma lambda A_{k+1}
        target of V_k = A_k + V_k

    It takes the steps as they came: what the sampling policy's age does is left to the correction.
    Source: arXiv 1506.02438, equation 16, in its recursive form.

    Args:
        log_ratios_K: not used; they are V-trace's.
        values_K: V of the steps' states.
        end_values_E: V of the episodes' last states; counts where they were cut short.
        steps: with their rewards.
        config: gamma and trace_decay, which is lambda.
    """
    next_values_K = next_values(values_K, end_values_E, steps)
    deltas_K = steps.rewards_K + config.gamma * next_values_K - values_K
    decays_K = torch.full_like(deltas_K, config.gamma * config.trace_decay)
    advantages_K = accumulate(deltas_K, decays_K, steps)
    return Targets(advantages_K=advantages_K, values_K=advantages_K + values_K)
