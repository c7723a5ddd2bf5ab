"""Attention over packed sequences, for any model of transformers.

On CPUs, sequences of equal length lie side by side in a pack: a run of them is a batch for the
fused kernel, without padding or mask. On GPUs, torch's own kernel for sequences of different
lengths takes a pack in one call; that path has not been run, for want of a GPU.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from understudy.errors import ConfigError

NAME = "packed"
"""The kernel's name among transformers' attn_implementation."""


class Extent(TypedDict):
    """Where sequences lie in a pack, as arguments that a model hands on to its attention.

    A tensor rather than numbers, by which torch.compile would compile each pack anew.
    """

    bounds: Tensor
    """int32, [S + 1] sums of lengths from 0, on the device."""
    longest: int


def extent_of(lengths: Sequence[int], device: torch.device) -> Extent:
    """Of sequences that lie end to end."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Extent(bounds=bounds.to(device), longest=max(lengths))


def packed_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    bounds: Tensor,
    longest: int,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention [1, T, H, D] within each sequence of a pack.

    Args:
        module: the attention's; not used.
        query_1HTD: H heads of D.
        key_1HTD: H or a divisor of H, as the values.
        value_1HTD: see key_1HTD.
        attention_mask: None, as there is no such mask for this kernel.
        scaling: factor of the scores.
        bounds: of the sequences as they lie, equal lengths side by side.
        longest: of them.
        sliding_window: of the model's, as far back as it attends.

    Raises:
        ConfigError: a sequence is longer than that.
    """
    if sliding_window is not None and longest > sliding_window:
        raise ConfigError(
            f"a sequence has {longest} tokens, and the model attends to {sliding_window}: "
            f"sliding windows are not supported; set learner.tasks.max_tokens = {sliding_window}"
        )
    states = query_1HTD[0], key_1HTD[0], value_1HTD[0]
    if query_1HTD.device.type == "cuda":
        return _on_gpu(*states, bounds, longest, scaling)[None], None
    return _on_cpu(*states, bounds.diff().tolist(), scaling)[None], None


def _on_cpu(
    query_HTD: Tensor, key_HTD: Tensor, value_HTD: Tensor, lengths: Sequence[int], scaling: float
) -> Tensor:
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    # Splits, whose backward pass is one concatenation; that of slices fills a whole tensor a slice.
    sizes = [length * num for length, num in runs]
    parts = (states.split(sizes, dim=1) for states in (query_HTD, key_HTD, value_HTD))
    outputs = []
    for (length, num), run in zip(runs, zip(*parts, strict=True), strict=True):
        query, key, value = (part.unflatten(1, (num, length)).transpose(0, 1) for part in run)
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _on_gpu(
    query_HTD: Tensor,
    key_HTD: Tensor,
    value_HTD: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (s.transpose(0, 1).contiguous() for s in (query_HTD, key_HTD, value_HTD))
    output = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query_HTD.shape[0] != key_HTD.shape[0],
    )
    assert isinstance(output, Tensor)
    return output


# Not part of a compiled layer: on CPUs it calls a kernel a length, in other numbers pack by pack.
AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
