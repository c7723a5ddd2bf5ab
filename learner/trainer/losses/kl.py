"""The price of leaving the reference policy, on tokens."""

from torch import Tensor

from learner.trainer.losses.ratios import ratio_of


def reverse_kl(*, logprobs: Tensor, reference_logprobs: Tensor, weights: Tensor) -> Tensor:
    """Loss [N] whose gradient, in the mean over sampled tokens, is that of KL(pi || pi_ref).

        loss = w (log pi - log pi_ref)^2 / 2

    As a loss, this estimator (k2) has the divergence's own gradient on tokens that pi sampled;
    w corrects for tokens of an older policy. Its value is not the divergence: k3 estimates that.
    Source: arXiv 2510.01555.

    Args:
        logprobs: [N] log pi, with gradient.
        reference_logprobs: [N] log pi_ref, of the policy that the run began with.
        weights: [N] of a correction, without gradient.
    """
    return weights * (logprobs - reference_logprobs).square() / 2


def kl_values(log_ratio: Tensor) -> Tensor:
    """Estimate [N], never below 0, of KL(pi || pi_other) from log pi_other - log pi (k3).

    The exponential is bounded as in ratios.py. Source: http://joschu.net/blog/kl-approx.html.
    """
    return ratio_of(log_ratio) - 1 - log_ratio
