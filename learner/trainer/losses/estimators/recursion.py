"""What the estimators with a critic share: going backwards over the steps of each episode."""

import torch
from torch import Tensor

from learner.trainer.losses.tokens import Steps


def last_steps(steps: Steps) -> Tensor:
    """[K] bool, the step is its episode's last."""
    ends_K = torch.ones_like(steps.episode_K, dtype=torch.bool)
    ends_K[:-1] = steps.episode_K[1:] != steps.episode_K[:-1]
    return ends_K


def next_values(values_K: Tensor, end_values_E: Tensor, steps: Steps) -> Tensor:
    """[K] V of the state after each step.

    After an episode's last step that is 0 where its environment ended it, and end_values_E where
    it was cut short.
    """
    ends_E = torch.where(steps.truncated_E, end_values_E, 0.0)
    return torch.where(last_steps(steps), ends_E[steps.episode_K], values_K.roll(-1))


def accumulate(terms_K: Tensor, decays_K: Tensor, steps: Steps) -> Tensor:
    """[K] x_k = terms_k + decays_k x_{k+1}, where x after an episode's last step is 0.

    A loop over plain numbers: one copy from the device and one back, and 20,000 steps take
    milliseconds, where a loop over tensors takes most of a second.
    """
    decays_K = torch.where(last_steps(steps), 0.0, decays_K)
    following, backwards = 0.0, []
    for term, decay in zip(reversed(terms_K.tolist()), reversed(decays_K.tolist()), strict=True):
        following = term + decay * following
        backwards.append(following)
    return terms_K.new_tensor(backwards[::-1])
