"""The proximal policy, which the objective's ratio starts from and its clip keeps near.

It stands apart from mu, the policy that sampled a token, so that the clip bounds what one batch
does, and the correction what the experience's age does. Sources: arXiv 2110.00641, 2505.24298.
"""

import torch
from torch import Tensor

from learner.trainer.losses.tokens import Tokens


def recomputed(*, logprobs_N: Tensor, tokens: Tokens) -> Tensor:
    """log pi_old: the learner's policy as the batch begins.

    Args:
        logprobs_N: log pi_old, without gradient.
        tokens: what else is known of them.
    """
    return logprobs_N


def behaviour(*, logprobs_N: Tensor, tokens: Tokens) -> Tensor:
    """log mu: the policy that sampled each token, so that nothing is left to correct.

    Args:
        logprobs_N: log pi_old, without gradient.
        tokens: what else is known of them.
    """
    return tokens.behaviour_logprobs_N


def interpolated(*, logprobs_N: Tensor, tokens: Tokens) -> Tensor:
    """Between both in logarithms: log pi_prox = a log mu + (1 - a) log pi_old.

        a = 1 / d of a token that is d >= 1 steps old; 0 at d = 0

    That is where the policy one step before the learner's would lie if the logarithms moved by
    as much with every step. Source: arXiv 2512.06547.

    Args:
        logprobs_N: log pi_old, without gradient.
        tokens: with mu and staleness.
    """
    staleness_N = tokens.staleness_N.to(logprobs_N.dtype)
    share_N = torch.where(staleness_N > 0, 1 / staleness_N.clamp(min=1), 0.0)
    return torch.lerp(logprobs_N, tokens.behaviour_logprobs_N.to(logprobs_N.dtype), share_N)
