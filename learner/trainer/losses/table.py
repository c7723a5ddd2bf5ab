"""The parts that an algorithm is put together from, by the names that the config has for them.

A part of one's own is a function in a file of one's own, registered there:

    @register_objective("mine")
    def mine(*, logprobs_N, proximal_logprobs_N, advantages_N, weights_N, tokens, config): ...

with the module's name in `learner.algorithm.plugins`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from learner.trainer.losses import proximal
from learner.trainer.losses.aggregations.constant import constant
from learner.trainer.losses.aggregations.sequence import sequence as sequence_mean
from learner.trainer.losses.aggregations.token import token as token_mean
from learner.trainer.losses.corrections.geometric_mask import geometric_mask
from learner.trainer.losses.corrections.sequence import sequence as sequence_weights
from learner.trainer.losses.corrections.step import step as step_weights
from learner.trainer.losses.corrections.token import token as token_weights
from learner.trainer.losses.corrections.token_mask import token_mask
from learner.trainer.losses.corrections.uncorrected import uncorrected
from learner.trainer.losses.estimators.batch_normalized import batch_normalized
from learner.trainer.losses.estimators.gae import gae
from learner.trainer.losses.estimators.group_mean import group_mean
from learner.trainer.losses.estimators.group_mean_batch_normalized import (
    group_mean_batch_normalized,
)
from learner.trainer.losses.estimators.group_normalized import group_normalized
from learner.trainer.losses.estimators.leave_one_out import leave_one_out
from learner.trainer.losses.estimators.rewards import Array
from learner.trainer.losses.estimators.vtrace import vtrace
from learner.trainer.losses.objectives.clip import clip
from learner.trainer.losses.objectives.clipped_weight import clipped_weight
from learner.trainer.losses.objectives.policy_gradient import policy_gradient
from learner.trainer.losses.objectives.sequence_clip import sequence_clip
from learner.trainer.losses.tokens import PolicyLoss, Steps, Targets, Tokens, Totals
from understudy.config import AlgorithmConfig

__all__ = [
    "AGGREGATIONS",
    "CORRECTIONS",
    "CRITICS",
    "ESTIMATORS",
    "OBJECTIVES",
    "PROXIMAL",
    "Aggregation",
    "Correction",
    "Critic",
    "Estimator",
    "Objective",
    "PolicyLoss",
    "Proximal",
    "Targets",
    "register_aggregation",
    "register_correction",
    "register_critic",
    "register_estimator",
    "register_objective",
]

Part = TypeVar("Part")

Estimator = Callable[[Sequence[Array]], list[Array]]
"""Rewards of all groups of a batch -> an advantage an episode."""


class Critic(Protocol):
    """Estimator of steps, with the values that a head gives their states."""

    def __call__(
        self,
        *,
        log_ratios_K: Tensor,
        values_K: Tensor,
        end_values_E: Tensor,
        steps: Steps,
        config: AlgorithmConfig,
    ) -> Targets:
        """See estimators/gae.py."""


class Correction(Protocol):
    """Weights of tokens, without gradient."""

    def __call__(self, *, log_ratios_N: Tensor, tokens: Tokens, config: AlgorithmConfig) -> Tensor:
        """See corrections/token.py."""


class Proximal(Protocol):
    """Policy that the objective's ratio starts from."""

    def __call__(self, *, logprobs_N: Tensor, tokens: Tokens) -> Tensor:
        """See proximal.py."""


class Objective(Protocol):
    """Losses of tokens."""

    def __call__(
        self,
        *,
        logprobs_N: Tensor,
        proximal_logprobs_N: Tensor,
        advantages_N: Tensor,
        weights_N: Tensor,
        tokens: Tokens,
        config: AlgorithmConfig,
    ) -> PolicyLoss:
        """See objectives/clip.py."""


class Aggregation(Protocol):
    """Part of a batch's loss."""

    def __call__(
        self, *, losses_N: Tensor, tokens: Tokens, totals: Totals, config: AlgorithmConfig
    ) -> Tensor:
        """See aggregations/token.py."""


ESTIMATORS: dict[str, Estimator] = {
    "group_normalized": group_normalized,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "batch_normalized": batch_normalized,
    "group_mean_batch_normalized": group_mean_batch_normalized,
}
CRITICS: dict[str, Critic] = {"gae": gae, "vtrace": vtrace}
CORRECTIONS: dict[str, Correction] = {
    "none": uncorrected,
    "token": token_weights,
    "sequence": sequence_weights,
    "step": step_weights,
    "token_mask": token_mask,
    "geometric_mask": geometric_mask,
}
PROXIMAL: dict[str, Proximal] = {
    "recomputed": proximal.recomputed,
    "behaviour": proximal.behaviour,
    "interpolated": proximal.interpolated,
}
OBJECTIVES: dict[str, Objective] = {
    "policy_gradient": policy_gradient,
    "clip": clip,
    "sequence_clip": sequence_clip,
    "clipped_weight": clipped_weight,
}
AGGREGATIONS: dict[str, Aggregation] = {
    "token": token_mean,
    "sequence": sequence_mean,
    "constant": constant,
}


def register_estimator(name: str) -> Callable[[Estimator], Estimator]:
    """Make an estimator by rewards alone known by a name; for decorating it."""
    return _register(ESTIMATORS, name)


def register_critic(name: str) -> Callable[[Critic], Critic]:
    """Make an estimator with a value head known by a name; for decorating it."""
    return _register(CRITICS, name)


def register_correction(name: str) -> Callable[[Correction], Correction]:
    """Make a correction known by a name; for decorating it."""
    return _register(CORRECTIONS, name)


def register_objective(name: str) -> Callable[[Objective], Objective]:
    """Make an objective known by a name; for decorating it."""
    return _register(OBJECTIVES, name)


def register_aggregation(name: str) -> Callable[[Aggregation], Aggregation]:
    """Make an aggregation known by a name; for decorating it."""
    return _register(AGGREGATIONS, name)


def _register(parts: dict[str, Part], name: str) -> Callable[[Part], Part]:
    def add(part: Part) -> Part:
        if name in parts:
            raise ValueError(f"{name!r} is registered already; take another name")
        parts[name] = part
        return part

    return add
