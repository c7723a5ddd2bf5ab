"""What losses are computed on: tokens, the steps that they belong to, and sums by either.

Shapes: N sampled tokens, K steps, E episodes. Steps are in order of episode, then of time. So are
tokens, but where an agent has several parts: then they lie by part, and step_N has their times.

    episodes  |      0       |   1   |
    steps     |  0  |   1    |   2   |      K = 3 turns
    tokens    | a b | c d e  | f g h |      N = 8: step_N = 0 0 1 1 1 2 2 2
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a critic's estimators go by: turns or single tokens; each has at least one token."""

    first_K: Tensor
    """int64, index of the step's first token; its state is what that token was sampled in."""
    episode_K: Tensor
    """int64, index of its episode."""
    rewards_K: Tensor
    """Reward that the environment gave after it."""
    truncated_E: Tensor
    """bool, the episode was cut short: its last state still has a value. False: it terminated."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Sampled tokens of whole episodes, without the policy that learns from them."""

    behaviour_logprobs_N: Tensor
    """log mu, as recorded when each token was sampled."""
    staleness_N: Tensor
    """Steps that its policy is behind, 0 or more, in the dtype of the log-probabilities."""
    step_N: Tensor
    """int64, index of its step."""
    episode_N: Tensor
    """int64, index of its episode."""
    steps: Steps

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.episode_N)

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.steps.episode_K)

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self.steps.truncated_E)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the policy says of N sampled tokens of E episodes, in float32."""

    logprobs_N: Tensor
    """log pi of each token."""
    entropies_N: Tensor | None = None
    """Entropy of the distribution that each was sampled from, where it was asked for."""
    values_N: Tensor | None = None
    """Value of the state that each was sampled in, where there is a value head."""
    end_values_E: Tensor | None = None
    """Value of the last state of each episode."""

    def detached(self) -> "Outputs":
        """The same without gradient."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        return Outputs(**{name: value.detach() for name, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sizes of everything that one optimizer step learns from, on all ranks."""

    num_tokens: float
    """Sampled tokens."""
    num_steps: float
    """Turns, or tokens again, as a critic's estimator has them."""
    num_episodes: float


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a critic's estimator makes of K steps; nothing has a gradient."""

    advantages_K: Tensor
    """Of the steps; every token of a step has its step's."""
    values_K: Tensor
    """What the value head should say of the steps' states."""


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """What an objective makes of N tokens."""

    losses_N: Tensor
    """Loss of each token, with gradient; an aggregation adds them up."""
    clipped_N: Tensor
    """bool, the objective's clip takes away the token's gradient, or cuts its weight."""


def sum_by(values: Tensor, index: Tensor, num: int) -> Tensor:
    """Sums [num] of values with the same index."""
    return values.new_zeros(num).index_add(0, index, values)


def mean_by(values: Tensor, index: Tensor, num: int) -> Tensor:
    """Means [num] of values with the same index; 0 where there is none."""
    ones = values.new_zeros(num).index_add(0, index, values.new_ones(len(index)))
    return sum_by(values, index, num) / ones.clamp(min=1)
