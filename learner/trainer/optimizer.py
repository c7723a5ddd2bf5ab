"""AdamW over sharded parameters, its learning rate over time, and gradient clipping."""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from understudy.config import TrainConfig
from understudy.errors import UnderstudyError


class NonFiniteGradientError(UnderstudyError):
    """A gradient that nothing can be learned from."""


class Optimizer:
    """Clips, steps and clears. Every rank calls it at the same time.

    Args:
        parameters: those that do not learn are left out.
        config: rates and limits.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainConfig) -> None:
        self._parameters = [each for each in parameters if each.requires_grad]
        self._max_grad_norm = config.max_grad_norm
        self.betas = config.betas
        self.weight_decay = config.weight_decay
        # Torch's operations on lists take no tensors of different meshes.
        self._groups = _by_mesh(self._parameters)
        self._device = cast("DTensor", self._parameters[0]).device_mesh.device_type
        """Where collectives are, which parameters need not be."""
        self._adamw = torch.optim.AdamW(
            [{"params": group} for group in self._groups],
            lr=0.0,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, learning_rate: float) -> float:
        """Take a step and return the gradient's norm before clipping.

        Raises:
            NonFiniteGradientError: nothing was changed, and the gradient is cleared.
        """
        value = self._clip()
        if not math.isfinite(value):
            self.clear()
            raise NonFiniteGradientError(f"gradient norm is {value}; lower the learning rate")
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.clear()
        return value

    def _clip(self) -> float:
        """Clip the gradient to its norm over all parameters and ranks; returns what that was."""
        shards = [p.grad.to_local() for p in self._parameters if isinstance(p.grad, DTensor)]
        # Each element of the model is on one rank alone, so that squares add up; one sum over all
        # ranks, so that all of them get the same bits and clip alike.
        total = nn.utils.get_total_norm(shards).square().to(self._device)
        dist.all_reduce(total)
        total = total.sqrt()
        for group in self._groups:
            nn.utils.clip_grads_with_norm_(group, self._max_grad_norm, total)
        return float(total)

    def clear(self) -> None:
        """Forget the gradient."""
        self._adamw.zero_grad()

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


def _by_mesh(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        assert isinstance(parameter, DTensor)
        groups.setdefault(parameter.device_mesh, []).append(parameter)
    return list(groups.values())


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
