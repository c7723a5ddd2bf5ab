"""Ratios of two policies, from the logarithms that they are kept as."""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Where the logarithm of a ratio ends: e^20 is 4.9e8, whose square float32 still holds."""


def ratio_of(log_ratios: Tensor) -> Tensor:
    """exp(min(x, MAX_LOG_RATIO)): never inf, and without gradient where the bound holds."""
    return torch.exp(log_ratios.clamp(max=MAX_LOG_RATIO))
