"""CISPO: the ratio is a clipped weight, and every token keeps a gradient."""

from torch import Tensor

from learner.trainer.losses.ratios import ratio_of
from learner.trainer.losses.tokens import PolicyLoss, Tokens
from understudy.config import AlgorithmConfig


def clipped_weight(
    *,
    logprobs_N: Tensor,
    proximal_logprobs_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    tokens: Tokens,
    config: AlgorithmConfig,
) -> PolicyLoss:
    """Loss of each token, with r = pi / pi_prox.

        -w sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi

    The gradient is -w clip(r) A grad log pi. The value says little: log pi is not a loss. Source:
    arXiv 2506.13585 (section 3.1), without a lower clip there.

    Args:
        logprobs_N: log pi, with gradient.
        proximal_logprobs_N: log pi_prox; taken without gradient, as are the next two.
        advantages_N: A of each token.
        weights_N: w, of a correction.
        tokens: not used.
        config: clip_low and clip_high.
    """
    ratios_N = ratio_of(logprobs_N.detach() - proximal_logprobs_N.detach())
    factors_N = ratios_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    return PolicyLoss(
        losses_N=-weights_N.detach() * factors_N * advantages_N.detach() * logprobs_N,
        clipped_N=factors_N != ratios_N,
    )
