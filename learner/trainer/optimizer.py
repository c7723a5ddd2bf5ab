"""AdamW over sharded parameters, its learning rate over time, and gradient clipping."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from understudy.config import TrainConfig
from understudy.errors import UnderstudyError


class Optimizer:
    """Clips, steps and clears. Every rank calls it at the same time."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainConfig) -> None:
        self._parameters = list(parameters)
        self._max_grad_norm = config.max_grad_norm
        self.betas = config.betas
        self.weight_decay = config.weight_decay
        self._adamw = torch.optim.AdamW(
            self._parameters,
            lr=0.0,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, learning_rate: float) -> float:
        """Take a step and return the gradient's norm before clipping.

        Raises:
            UnderstudyError: when the gradient is not finite; nothing was changed.
        """
        norm = nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(value):
            raise UnderstudyError(f"gradient norm is {value}; lower the learning rate")
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad()
        return value

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's state of a parameter; before the first step, what that would begin with.

        Returns:
            `exp_avg` and `exp_avg_sq`, sharded as the parameter is, and the scalar `step`. They are
            the tensors that AdamW uses: what is written into them counts.
        """
        state: dict[str, Tensor] = self._adamw.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        return state


def warmed_up(step: int, peak: float, warmup_steps: int) -> float:
    """Learning rate of a step, from 0: rises in equal parts to `peak`, which holds from then on."""
    return peak * min(1.0, (step + 1) / (warmup_steps + 1))


def cosine(step: int, num_steps: int, peak: float, warmup_steps: int, final_share: float) -> float:
    """Learning rate of a step: warm-up, then half a cosine down to `final_share` of the peak."""
    if step < warmup_steps:
        return warmed_up(step, peak, warmup_steps)
    progress = (step - warmup_steps) / max(num_steps - 1 - warmup_steps, 1)
    share = final_share + (1 - final_share) * (1 + math.cos(math.pi * progress)) / 2
    return peak * share
