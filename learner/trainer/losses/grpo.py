"""GRPO's clipped surrogate on tokens, corrected for experience that an older policy sampled."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GrpoTokens:
    """What the loss computed for each of N tokens; all without gradient but `losses`."""

    losses: Tensor
    """[N] loss of each token; their sum over the batch is divided by the number of its tokens."""
    importance: Tensor
    """[N] pi_old / mu, before the cap."""
    clipped: Tensor
    """[N] true where the clip takes away the gradient."""


def grpo(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    importance_cap: float,
) -> GrpoTokens:
    """Loss of each token.

        r = pi / pi_old
        w = min(pi_old / mu, importance_cap), without gradient
        loss = -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    pi_old is the learner's policy at the start of the batch and mu the one that sampled the token:
    the clip bounds how far one batch moves the policy, and w what the experience's age does.
    Sources: arXiv 2402.03300 (the surrogate), 2503.14476 (tokens, two clips), 2505.24298 (pi_old
    apart from mu).

    Args:
        logprobs: [N] log pi, with gradient.
        old_logprobs: [N] log pi_old; logprobs.detach() where a batch is one update.
        behaviour_logprobs: [N] log mu, as recorded when the token was sampled.
        advantages: [N]
    """
    ratio = torch.exp(logprobs - old_logprobs)
    importance = torch.exp(old_logprobs - behaviour_logprobs).detach()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    weights = importance.clamp(max=importance_cap)
    return GrpoTokens(
        losses=-weights * torch.minimum(unclipped, clipped),
        importance=importance,
        clipped=(clipped < unclipped).detach(),
    )
