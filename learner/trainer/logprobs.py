"""Log-probabilities of chosen tokens, without the logits of all tokens at one time."""

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK = 4096
"""Positions whose logits exist at one time: 2.5 GB in float32 for 151k tokens."""


def chosen_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperature: float
) -> Tensor:
    """log softmax(hidden @ head.T / temperature) at the targets, in float32.

    Past one chunk of positions, logits are computed again for the backward pass, chunk by chunk.

    Args:
        hidden_ND: final hidden states of N positions.
        head_VD: output embedding.
        targets_N: token that follows each position.
        temperature: divides the logits, above 0.
    """
    if len(targets_N) <= CHUNK:
        return _chunk_logprobs(hidden_ND, head_VD, targets_N, temperature)
    chunks = [
        checkpoint(_chunk_logprobs, hidden, head_VD, targets, temperature, use_reentrant=False)
        for hidden, targets in zip(
            torch.split(hidden_ND, CHUNK), torch.split(targets_N, CHUNK), strict=True
        )
    ]
    return torch.cat(chunks)


def _chunk_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperature: float
) -> Tensor:
    logits_NV = functional.linear(hidden_ND, head_VD).float() / temperature
    return -functional.cross_entropy(logits_NV, targets_N, reduction="none")
