"""Token sequences, and how they are cut into padded micro-batches of like length.

Shapes: B rows, T tokens a row, N positions whose next token counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from understudy.trajectory import BoolArray, IntArray


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """Tokens, and which of them are learned from."""

    token_ids: IntArray
    """[T]"""
    loss_mask: BoolArray
    """[T] true for tokens that count; never the first one, which nothing predicts."""

    @property
    def num_targets(self) -> int:
        """Tokens that count."""
        return int(self.loss_mask.sum())


BUSY_TOKENS = 512
"""Tokens from which on a forward pass costs in proportion to them."""
MAX_PADDING = 0.1
"""Share of a row that may be padding where another forward pass is no loss."""

S = TypeVar("S", bound=TokenSequence)


@dataclass(frozen=True, kw_only=True)
class Microbatch(Generic[S]):
    """Sequences for one forward pass. Targets go through the sequences in order."""

    sequences: tuple[S, ...]
    tokens_BT: Tensor
    """Token ids, padded on the right."""
    positions_N: Tensor
    """Indices into the flattened B x T, each one before a token that counts."""
    targets_N: Tensor
    """The tokens that count."""

    @property
    def num_padded_tokens(self) -> int:
        """Tokens that the forward pass computes, padding included."""
        return self.tokens_BT.numel()


def cut(sequences: Sequence[S], max_tokens: int) -> list[list[S]]:
    """Sort by length and cut so that no piece has more than `max_tokens` once padded.

    A sequence that is longer by itself gets a piece of its own. A piece also ends where the next
    sequence would be padded by much, once it is large enough to keep a processor busy.
    """
    pieces: list[list[S]] = []
    longest = 0
    for sequence in sorted(sequences, key=lambda s: len(s.token_ids), reverse=True):
        length = len(sequence.token_ids)
        padded = longest * len(pieces[-1]) if pieces else 0
        much_padding = padded >= BUSY_TOKENS and length < longest * (1 - MAX_PADDING)
        if not pieces or padded + longest > max_tokens or much_padding:
            pieces.append([])
            longest = length
        pieces[-1].append(sequence)
    return pieces


def microbatches(
    sequences: Sequence[S], max_tokens: int, num: int, device: torch.device
) -> Iterator[Microbatch[S]]:
    """Cut and pad. At least `num` come: ranks must run as many forward passes as each other.

    Those that make up the number hold two padding tokens and no target.
    """
    pieces = cut(sequences, max_tokens)
    for piece in [*pieces, *[[] for _ in range(num - len(pieces))]]:
        yield pad(piece, device)


def pad(sequences: Sequence[S], device: torch.device) -> Microbatch[S]:
    """Pad sequences to the longest of them."""
    longest = max((len(s.token_ids) for s in sequences), default=2)
    tokens_BT = np.zeros((max(len(sequences), 1), longest), np.int64)
    counts_BT = np.zeros(tokens_BT.shape, bool)
    for row, sequence in enumerate(sequences):
        assert not sequence.loss_mask[:1].any(), "nothing predicts a sequence's first token"
        tokens_BT[row, : len(sequence.token_ids)] = sequence.token_ids
        counts_BT[row, : len(sequence.token_ids)] = sequence.loss_mask
    return Microbatch(
        sequences=tuple(sequences),
        tokens_BT=torch.from_numpy(tokens_BT).to(device),
        positions_N=torch.from_numpy(counts_BT.ravel().nonzero()[0] - 1).to(device),
        targets_N=torch.from_numpy(tokens_BT[counts_BT]).to(device),
    )


def padding_share(num_tokens: float, num_padded_tokens: float) -> float:
    """Share of computed tokens that are padding."""
    return 1 - num_tokens / num_padded_tokens if num_padded_tokens else 0.0
