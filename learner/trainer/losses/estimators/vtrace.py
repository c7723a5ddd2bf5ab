"""V-trace on steps: values of the learner's policy, from what older policies did."""

import torch
from torch import Tensor

from learner.trainer.losses.estimators.recursion import accumulate, last_steps, next_values
from learner.trainer.losses.ratios import ratio_of
from learner.trainer.losses.tokens import Steps, Targets
from understudy.config import AlgorithmConfig


@torch.no_grad()
def vtrace(
    *,
    log_ratios_K: Tensor,
    values_K: Tensor,
    end_values_E: Tensor,
    steps: Steps,
    config: AlgorithmConfig,
) -> Targets:
    """Targets of values, and advantages without the weight rho.

        rho_k = min(rho_bar, w_k)        c_k = lambda min(c_bar, w_k)       w_k = pi_old / mu
        delta_k = rho_k (r_k + gamma V_{k+1} - V_k)
        v_k = V_k + delta_k + gamma c_k (v_{k+1} - V_{k+1})
        A_k = r_k + gamma v_{k+1} - V_k

    The paper's policy gradient has rho_k A_k: that factor is the correction `step`, which has the
    same ratios and the same cap. Source: arXiv 1802.01561, equation 1, remarks 1 and 2, section
    4.2; rho_bar is 1 there, and at 1 or above, w_k = 1 makes v the n-step return.

    Args:
        log_ratios_K: log w, one of a step, already merged from its tokens.
        values_K: V of the steps' states.
        end_values_E: V of the episodes' last states; counts where they were cut short.
        steps: with their rewards.
        config: gamma, trace_decay (lambda), importance_cap (rho_bar) and c_bar.
    """
    ratios_K = ratio_of(log_ratios_K)
    rhos_K = ratios_K.clamp(max=config.importance_cap)
    traces_K = config.trace_decay * ratios_K.clamp(max=config.c_bar)
    next_values_K = next_values(values_K, end_values_E, steps)
    deltas_K = rhos_K * (steps.rewards_K + config.gamma * next_values_K - values_K)
    excesses_K = accumulate(deltas_K, config.gamma * traces_K, steps)  # v - V
    next_excesses_K = torch.where(last_steps(steps), 0.0, excesses_K.roll(-1))
    next_targets_K = next_values_K + next_excesses_K
    return Targets(
        advantages_K=steps.rewards_K + config.gamma * next_targets_K - values_K,
        values_K=values_K + excesses_K,
    )
