"""The policy gradient, unclipped."""

import torch
from torch import Tensor

from learner.trainer.losses.ratios import ratio_of
from learner.trainer.losses.tokens import PolicyLoss, Tokens
from understudy.config import AlgorithmConfig


def policy_gradient(
    *,
    logprobs_N: Tensor,
    proximal_logprobs_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    tokens: Tokens,
    config: AlgorithmConfig,
) -> PolicyLoss:
    """Loss -w r A of each token, with r = pi / pi_prox.

    Its gradient is -w r A grad log pi: at pi = pi_prox, where a batch is one update, REINFORCE's.
    Nothing bounds r but MAX_LOG_RATIO, above which a token has no gradient. Source: Williams 1992,
    https://doi.org/10.1007/BF00992696; as a surrogate, arXiv 1707.06347, equation 6.

    Args:
        logprobs_N: log pi, with gradient.
        proximal_logprobs_N: log pi_prox; taken without gradient, as are the next two.
        advantages_N: A of each token.
        weights_N: w, of a correction.
        tokens: not used.
        config: not used.
    """
    ratios_N = ratio_of(logprobs_N - proximal_logprobs_N.detach())
    return PolicyLoss(
        losses_N=-weights_N.detach() * ratios_N * advantages_N.detach(),
        clipped_N=torch.zeros_like(ratios_N, dtype=torch.bool),
    )
