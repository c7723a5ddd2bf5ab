"""[learner.algorithm]: what a batch of experience teaches, put together from named parts.

    rewards --estimator--> advantages
    pi_prox / mu --correction--> weights
    pi / pi_prox, advantages, weights --objective--> token losses --aggregation--> loss

A named algorithm is a row of values for these fields; whatever is set beside the name counts
instead. See docs/algorithms.md.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from understudy.config.base import Section
from understudy.config.shared import Positive

Share = Annotated[float, Field(ge=0, le=1)]

GROUP_ESTIMATORS = (
    "group_normalized",
    "group_mean",
    "leave_one_out",
    "batch_normalized",
    "group_mean_batch_normalized",
)
"""Advantages from rewards alone, one an episode."""
CRITIC_ESTIMATORS = ("gae", "vtrace")
"""Advantages of steps, with the help of a value head."""
CORRECTIONS = ("none", "token", "sequence", "step", "token_mask", "geometric_mask")
OBJECTIVES = ("policy_gradient", "clip", "sequence_clip", "clipped_weight")
AGGREGATIONS = ("token", "sequence", "constant")

ROWS: Mapping[str, Mapping[str, Any]] = {
    "reinforce": {
        "estimator": "group_mean",
        "objective": "policy_gradient",
        "aggregation": "token",
    },
    "grpo": {"clip_high": 0.2, "aggregation": "sequence"},
    "dapo": {},
    "dr_grpo": {"estimator": "group_mean", "clip_high": 0.2, "aggregation": "constant"},
    "rloo": {
        "estimator": "leave_one_out",
        "objective": "policy_gradient",
        "aggregation": "constant",
    },
    "reinforce_pp": {"estimator": "group_mean_batch_normalized", "clip_high": 0.2},
    "gspo": {
        "objective": "sequence_clip",
        "aggregation": "sequence",
        "correction": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    "cispo": {"objective": "clipped_weight", "clip_low": 0.999, "clip_high": 2.0},
    "ppo": {"estimator": "gae", "clip_high": 0.2},
    "vtrace": {
        "estimator": "vtrace",
        "correction": "step",
        "objective": "policy_gradient",
        "importance_cap": 1.0,
    },
}
"""What each name sets; the other fields keep their defaults, which are DAPO's."""


class AlgorithmConfig(Section):
    """[learner.algorithm]: estimator, correction, objective and aggregation."""

    name: str = "dapo"
    """Row of the table: reinforce, grpo, dapo, dr_grpo, rloo, reinforce_pp, gspo, cispo, ppo,
    vtrace. Fields that are set beside it count instead of the row's."""
    estimator: str = "group_normalized"
    """Advantages: group_normalized, group_mean, leave_one_out, batch_normalized or
    group_mean_batch_normalized, from rewards; gae or vtrace, with a value head."""
    correction: str = "token"
    """Weight of a token that another policy sampled: none, token, sequence, step, token_mask,
    geometric_mask."""
    proximal: Literal["recomputed", "behaviour", "interpolated"] = "recomputed"
    """Policy that the objective's ratio starts from: the learner's as the batch begins; the one
    that sampled; or a mean of both, more of the learner's the older the token is."""
    objective: str = "clip"
    """Loss of a token: policy_gradient, clip, sequence_clip (GSPO), clipped_weight (CISPO)."""
    aggregation: str = "token"
    """Mean of token losses: over tokens, over episodes' means, or by a constant length."""
    plugins: tuple[str, ...] = ()
    """Modules that register parts of their own; they are imported by the trainer."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip of the policy ratio: 1 - clip_low."""
    clip_high: Positive = 0.28
    """Upper clip of the policy ratio: 1 + clip_high."""
    importance_cap: Positive = 2.0
    """Cap of the weight of corrections token, sequence, step and geometric_mask (V-trace's
    rho-bar)."""
    mask_low: Positive = 0.5
    """Ratio under which token_mask and geometric_mask leave out a token or an episode."""
    mask_high: Positive = 2.0
    """Ratio above which they do."""
    constant_length: PositiveInt = 1024
    """Tokens by which aggregation `constant` divides an episode's sum."""
    gamma: Share = 1.0
    """Discount a step, of gae and vtrace."""
    trace_decay: Share = 1.0
    """Lambda of gae and vtrace."""
    c_bar: Positive = 1.0
    """V-trace's cap of the trace's ratios."""
    step: Literal["turn", "token"] = "turn"
    """What one step of gae and vtrace is."""
    step_ratio: Literal["geometric", "product"] = "geometric"
    """Ratio of a step: the geometric mean of its tokens' ratios, or their product, with which
    hardly any trace survives a few hundred tokens."""
    value_coefficient: Positive = 0.5
    """Weight of the value head's squared error."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the model that the run began with; 0 leaves it out."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of the policy's entropy, which is rewarded; 0 leaves it out."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_row(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        name = values.get("name", "dapo")
        if name not in ROWS:
            raise ValueError(f"name = {name!r} is no algorithm; known: {', '.join(ROWS)}")
        return {**ROWS[name], **values}

    @model_serializer(mode="wrap")
    def _leave_out_the_row(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is written says no more than the name does, so that another name can be set."""
        values: dict[str, Any] = write(self)
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        implied = {**defaults, **ROWS[self.name]}
        return {
            name: value
            for name, value in values.items()
            if name == "name" or getattr(self, name) != implied[name]
        }

    @model_validator(mode="after")
    def _parts_are_known(self) -> Self:
        known = {
            "estimator": GROUP_ESTIMATORS + CRITIC_ESTIMATORS,
            "correction": CORRECTIONS,
            "objective": OBJECTIVES,
            "aggregation": AGGREGATIONS,
        }
        for field, names in known.items():
            value = getattr(self, field)
            if value not in names and not self.plugins:
                raise ValueError(
                    f"{field} = {value!r} is not known; take one of {', '.join(names)}, or name "
                    "the module that registers it in plugins"
                )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.proximal == "behaviour" and self.correction != "none":
            raise ValueError(
                f"correction = {self.correction!r} has nothing to correct with proximal = "
                "'behaviour', whose ratio is against the sampling policy already; set correction "
                "= 'none', or proximal = 'recomputed'"
            )
        if self.mask_low >= self.mask_high:
            raise ValueError(
                f"mask_low = {self.mask_low} is not below mask_high = {self.mask_high}"
            )
        return self

    @property
    def learns_from_uniform_groups(self) -> bool:
        """Whether a group whose rewards are all equal has a gradient."""
        by_group = [name for name in GROUP_ESTIMATORS if name != "batch_normalized"]
        return self.estimator not in by_group
