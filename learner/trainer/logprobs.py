"""Log-probabilities of chosen tokens, without the logits of all tokens at one time."""

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK = 4096
"""Positions whose logits exist at one time: 2.5 GB in float32 for 151k tokens."""


def chosen_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    temperature: float,
    *,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ head.T / temperature) at the targets, in float32.

    Past one chunk of positions, logits are computed again for the backward pass, chunk by chunk.

    Args:
        hidden_ND: final hidden states of N positions.
        head_VD: output embedding.
        targets_N: token that follows each position.
        temperature: divides the logits, above 0.
        with_entropy: whether the entropies of the distributions are wanted, in nats.

    Returns:
        [N] log-probabilities; [N] entropies, or None.
    """
    arguments = head_VD, temperature, with_entropy
    if len(targets_N) <= CHUNK:
        logprobs_N, entropies_N = _chunk(hidden_ND, targets_N, *arguments)
    else:
        pieces = zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK), strict=True)
        chunks = [checkpoint(_chunk, *piece, *arguments, use_reentrant=False) for piece in pieces]
        logprobs_N, entropies_N = map(torch.cat, zip(*chunks, strict=True))
    return logprobs_N, entropies_N if with_entropy else None


def _chunk(
    hidden_ND: Tensor, targets_N: Tensor, head_VD: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies; the latter empty if they are not wanted."""
    logits_NV = functional.linear(hidden_ND, head_VD).float() / temperature
    if not with_entropy:
        logprobs_N = -functional.cross_entropy(logits_NV, targets_N, reduction="none")
        return logprobs_N, logprobs_N.new_empty(0)
    logprobs_NV = logits_NV.log_softmax(-1)
    entropies_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return -functional.nll_loss(logprobs_NV, targets_N, reduction="none"), entropies_N
