"""GSPO's clipped surrogate: one ratio an episode, in the form with a gradient a token."""

from torch import Tensor

from learner.trainer.losses.objectives.clip import clipped_surrogate
from learner.trainer.losses.ratios import ratio_of
from learner.trainer.losses.tokens import PolicyLoss, Tokens, mean_by
from understudy.config import AlgorithmConfig


def sequence_clip(
    *,
    logprobs_N: Tensor,
    proximal_logprobs_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    tokens: Tokens,
    config: AlgorithmConfig,
) -> PolicyLoss:
    """Loss of each token, with the ratio of its episode of n tokens.

        s = (product of pi / pi_prox over the episode)^(1/n)
        s_t = sg(s) pi_t / sg(pi_t), so that its value is s and its gradient s grad log pi_t
        -w min(s_t A_t, clip(s_t, 1 - clip_low, 1 + clip_high) A_t)

    In the mean over an episode whose w and A are all equal, that has GSPO's own value and gradient.
    Source: arXiv 2507.18071, section 4.3 (GSPO-token).

    Args:
        logprobs_N: log pi, with gradient.
        proximal_logprobs_N: log pi_prox; taken without gradient, as are the next two.
        advantages_N: A of each token.
        weights_N: w, of a correction.
        tokens: with their episodes.
        config: clip_low and clip_high, thousand times smaller than for tokens.
    """
    log_ratios_N = logprobs_N.detach() - proximal_logprobs_N.detach()
    means_E = mean_by(log_ratios_N, tokens.episode_N, tokens.num_episodes)
    ratios_N = ratio_of(means_E[tokens.episode_N] + (logprobs_N - logprobs_N.detach()))
    return clipped_surrogate(ratios_N, advantages_N.detach(), weights_N.detach(), config)
