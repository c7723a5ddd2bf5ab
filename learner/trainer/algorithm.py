"""The configured algorithm: one row of estimator x correction x objective x aggregation.

mu, pi_old, V_old --proximal, correction, critic--> weights, advantages, targets   no gradient
pi, V ------------objective, KL, entropy, value error, aggregation---------------> loss
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from learner.trainer.losses import table
from learner.trainer.losses.kl import reverse_kl
from learner.trainer.losses.ratios import ratio_of
from learner.trainer.losses.tokens import Outputs, Targets, Tokens, Totals, mean_by, sum_by
from learner.trainer.losses.value import squared_error
from understudy.config import AlgorithmConfig
from understudy.errors import ConfigError

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a pack, and what it was made of; no gradient but in `total`."""

    total: Tensor
    """Its part of the batch's loss: those of all packs on all ranks add up."""
    losses_N: Tensor
    """Of the objective alone."""
    importance_N: Tensor
    """pi_old / mu."""
    weights_N: Tensor
    """What the correction made of it."""
    clipped_N: Tensor
    """bool, the objective's clip took the gradient."""
    advantages_N: Tensor
    value_errors_K: Tensor | None
    """V - target of each step."""
    targets_K: Tensor | None
    """Of the values."""


class Algorithm:
    """Looks up the parts that the config names, and puts them together.

    Raises:
        ConfigError: a part or a plug-in is not there.
    """

    def __init__(self, config: AlgorithmConfig) -> None:
        for module in config.plugins:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ConfigError(
                    f"learner.algorithm.plugins: {module!r} cannot be imported ({error}); put it "
                    "on the Python path of the trainer"
                ) from None
        self.config = config
        is_critic = config.estimator in table.CRITICS
        self._critic = table.CRITICS[config.estimator] if is_critic else None
        self.estimate = None if is_critic else _find(table.ESTIMATORS, "estimator", config)
        """Estimator by rewards alone; None where one with a value head is configured."""
        self._correct = _find(table.CORRECTIONS, "correction", config)
        self._object = _find(table.OBJECTIVES, "objective", config)
        self._aggregate = _find(table.AGGREGATIONS, "aggregation", config)
        self._proximal = table.PROXIMAL[config.proximal]

    @property
    def has_critic(self) -> bool:
        """Whether the policy needs a value head."""
        return self._critic is not None

    def loss(
        self,
        new: Outputs,
        old: Outputs,
        tokens: Tokens,
        advantages_E: Tensor,
        totals: Totals,
        reference_logprobs_N: Tensor | None = None,
    ) -> Loss:
        """Loss of whole episodes.

        Args:
            new: of the policy that is trained, with gradient.
            old: of the policy at the start of the batch, without.
            tokens: what else is known of them.
            advantages_E: by rewards alone; not used where there is a critic.
            totals: of all that one optimizer step learns from.
            reference_logprobs_N: of the policy that the run began with, for the KL term.
        """
        config = self.config
        log_importance_N = old.logprobs_N - tokens.behaviour_logprobs_N
        proximal_N = self._proximal(logprobs_N=old.logprobs_N, tokens=tokens)
        weights_N = self._correct(
            log_ratios_N=proximal_N - tokens.behaviour_logprobs_N, tokens=tokens, config=config
        )
        targets = self._targets(old, log_importance_N, tokens)
        advantages_N = (
            advantages_E[tokens.episode_N]
            if targets is None
            else targets.advantages_K[tokens.step_N]
        )
        policy = self._object(
            logprobs_N=new.logprobs_N,
            proximal_logprobs_N=proximal_N,
            advantages_N=advantages_N,
            weights_N=weights_N,
            tokens=tokens,
            config=config,
        )
        losses_N = policy.losses_N
        if reference_logprobs_N is not None:
            losses_N = losses_N + config.kl_coefficient * reverse_kl(
                logprobs=new.logprobs_N,
                reference_logprobs=reference_logprobs_N,
                weights=weights_N,
            )
        if new.entropies_N is not None:
            losses_N = losses_N - config.entropy_coefficient * weights_N * new.entropies_N
        total = self._aggregate(losses_N=losses_N, tokens=tokens, totals=totals, config=config)
        errors_K = None
        if targets is not None:
            assert new.values_N is not None
            values_K = new.values_N[tokens.steps.first_K]
            errors_K = (values_K - targets.values_K).detach()
            total = total + config.value_coefficient * squared_error(
                values_K=values_K, targets_K=targets.values_K, totals=totals
            )
        return Loss(
            total=total,
            losses_N=policy.losses_N.detach(),
            importance_N=ratio_of(log_importance_N),
            weights_N=weights_N,
            clipped_N=policy.clipped_N,
            advantages_N=advantages_N,
            value_errors_K=errors_K,
            targets_K=None if targets is None else targets.values_K,
        )

    def _targets(self, old: Outputs, log_importance_N: Tensor, tokens: Tokens) -> Targets | None:
        if self._critic is None:
            return None
        assert old.values_N is not None
        assert old.end_values_E is not None
        steps = tokens.steps
        merge = mean_by if self.config.step_ratio == "geometric" else sum_by
        return self._critic(
            log_ratios_K=merge(log_importance_N, tokens.step_N, tokens.num_steps),
            values_K=old.values_N[steps.first_K],
            end_values_E=old.end_values_E,
            steps=steps,
            config=self.config,
        )


def _find(parts: Mapping[str, Part], field: str, config: AlgorithmConfig) -> Part:
    name = getattr(config, field)
    if name not in parts:
        raise ConfigError(
            f"learner.algorithm.{field} = {name!r}: neither here nor registered by a plug-in; "
            f"known: {', '.join(sorted(parts))}"
        )
    return parts[name]
