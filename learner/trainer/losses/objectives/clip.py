"""PPO's clipped surrogate on tokens, with two clips."""

import torch
from torch import Tensor

from learner.trainer.losses.ratios import ratio_of
from learner.trainer.losses.tokens import PolicyLoss, Tokens
from understudy.config import AlgorithmConfig


def clip(
    *,
    logprobs_N: Tensor,
    proximal_logprobs_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    tokens: Tokens,
    config: AlgorithmConfig,
) -> PolicyLoss:
    """Loss of each token, with r = pi / pi_prox.

        -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    The gradient is -w r A grad log pi, or 0 where r has left the clip in the direction in which A
    pulls. Sources: arXiv 1707.06347, equation 7; 2402.03300 (GRPO), 2503.14476, section 3.1 (two
    clips); 2110.00641, 2505.24298 (w, and pi_prox apart from mu).

    Args:
        logprobs_N: log pi, with gradient.
        proximal_logprobs_N: log pi_prox; taken without gradient, as are the next two.
        advantages_N: A of each token.
        weights_N: w, of a correction.
        tokens: not used.
        config: clip_low and clip_high.
    """
    ratios_N = ratio_of(logprobs_N - proximal_logprobs_N.detach())
    return clipped_surrogate(ratios_N, advantages_N.detach(), weights_N.detach(), config)


def clipped_surrogate(
    ratios_N: Tensor, advantages_N: Tensor, weights_N: Tensor, config: AlgorithmConfig
) -> PolicyLoss:
    """-w min(r A, clip(r) A) [N], whatever r is a ratio of; gradient through the ratios."""
    unclipped_N = ratios_N * advantages_N
    clipped_N = ratios_N.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages_N
    return PolicyLoss(
        losses_N=-weights_N * torch.minimum(unclipped_N, clipped_N),
        clipped_N=(clipped_N < unclipped_N).detach(),
    )
