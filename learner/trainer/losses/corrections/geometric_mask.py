"""Episodes that the two policies disagree on are left out; other tokens' weights are truncated."""

import torch
from torch import Tensor

from learner.trainer.losses.ratios import ratio_of
from learner.trainer.losses.tokens import Tokens, mean_by
from understudy.config import AlgorithmConfig


@torch.no_grad()
def geometric_mask(*, log_ratios_N: Tensor, tokens: Tokens, config: AlgorithmConfig) -> Tensor:
    """Weights [N]: min(w, cap), but 0 for all tokens of an episode whose mean ratio is outside.

        g = (product of w over the episode's n tokens)^(1/n)
        weight = min(w, cap) if mask_low <= g <= mask_high else 0

    g is a ratio per token, so that long episodes are not left out for their length. Source:
    https://richardli.xyz/rl-collapse (part 3, geometric sequence masking).

    Args:
        log_ratios_N: log w, with w = pi_prox / mu of each token.
        tokens: with their episodes.
        config: mask_low, mask_high and importance_cap.
    """
    means_E = ratio_of(mean_by(log_ratios_N, tokens.episode_N, tokens.num_episodes))
    inside_E = (means_E >= config.mask_low) & (means_E <= config.mask_high)
    weights_N = ratio_of(log_ratios_N).clamp(max=config.importance_cap)
    return torch.where(inside_E[tokens.episode_N], weights_N, 0.0)
