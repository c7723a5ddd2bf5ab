"""[learner.lora]: adapters that learn in the place of all weights."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from understudy.config.base import Section
from understudy.config.shared import Positive

MAX_RANK = 512
"""Largest rank that vLLM serves."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_EMBEDDINGS = ("embed_tokens", "lm_head")
_EXPERTS = ("experts", "gate_up_proj")


class LoraConfig(Section):
    """[learner.lora]: low-rank adapters (LoRA), which learn while the model itself stays."""

    rank: Annotated[int, Field(ge=0, le=MAX_RANK)] = 0
    """Rank of each adapter; 0 has none: all weights learn. vLLM serves ranks up to 512."""
    alpha: Positive = 16.0
    """What an adapter computes counts alpha / rank times."""
    target_modules: tuple[str, ...] = PROJECTIONS
    """Linear layers that get an adapter, by the last part of their names, in every layer."""

    @model_validator(mode="after")
    def _targets_can_be_adapted(self) -> Self:
        if self.rank and not self.target_modules:
            raise ValueError(
                f"target_modules is empty, so that nothing would learn; name some of "
                f"{', '.join(PROJECTIONS)}, or set rank = 0"
            )
        for name in self.target_modules:
            if name in _EMBEDDINGS:
                raise ValueError(
                    f"target_modules has '{name}', which may be tied to the other end of the model "
                    "and is not served with an adapter; leave it out"
                )
            if name in _EXPERTS:
                raise ValueError(
                    f"target_modules has '{name}': the experts of a mixture are fused and cannot "
                    "have adapters; leave it out"
                )
        return self
