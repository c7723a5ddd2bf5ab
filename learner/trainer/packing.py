"""Token sequences, and how they are packed end to end into passes without padding.

Shapes: T tokens a pack, S sequences, N positions whose next token counts; L layers, K experts a
token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from understudy.routes import RouteArray
from understudy.trajectory import BoolArray, IntArray


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """Tokens, and which of them are learned from."""

    token_ids: IntArray
    """[T]"""
    loss_mask: BoolArray
    """[T] true for tokens that count; never the first one, which nothing predicts."""
    routes: RouteArray | None = None
    """[T - 1, L, K] experts of all tokens but the last; None leaves them to the model."""

    @property
    def num_targets(self) -> int:
        """Tokens that count."""
        return int(self.loss_mask.sum())


S = TypeVar("S", bound=TokenSequence)

_NOTHING = TokenSequence(token_ids=np.zeros(2, np.int32), loss_mask=np.zeros(2, bool))
"""What an empty pack holds: ranks must run as many passes as each other."""


@dataclass(frozen=True, kw_only=True)
class Pack(Generic[S]):
    """Sequences for one pass, end to end; each attends to itself alone.

    They lie in order of length, so that those of equal length are neighbours. Targets and ends are
    in the order of `sequences` all the same.
    """

    sequences: tuple[S, ...]
    lengths: tuple[int, ...]
    """Of the sequences as they lie."""
    tokens_1T: Tensor
    """int64, token ids."""
    places_1T: Tensor
    """int64, each token's place in its sequence, from 0."""
    positions_N: Tensor
    """int64, indices into T, each one before a token that counts."""
    targets_N: Tensor
    """int64, the tokens that count."""
    ends_E: Tensor
    """int64, index of the last token of each sequence that ends an episode."""
    routes_LTK: Tensor | None = None
    """int16, experts of each token; -1 leaves them to the model, as None does all of them."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.tokens_1T.numel()


def fill(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Divide items among as few packs as first-fit decreasing finds.

    Args:
        sizes: tokens of each item; one that is larger than a pack gets a pack of its own.
        max_tokens: most tokens of a pack.

    Returns:
        The items' indices by pack, ascending. The same for the same sizes.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        fitting = (place for place, left in enumerate(room) if sizes[index] <= left)
        place = next(fitting, len(packs))
        if place == len(packs):
            packs.append([])
            room.append(max_tokens)
        packs[place].append(index)
        room[place] -= sizes[index]
    return [sorted(pack) for pack in packs]


def pack(
    sequences: Sequence[S], device: torch.device, last: Sequence[int] | None = None
) -> Pack[S]:
    """Lay sequences end to end on a device; none make a pack of two tokens and no target.

    Args:
        last: indices of the sequences that end an episode; all of them, if not given.
    """
    laid: Sequence[TokenSequence] = sequences or [_NOTHING]
    lengths = np.array([len(sequence.token_ids) for sequence in laid])
    order = np.argsort(lengths, kind="stable")
    starts = np.empty_like(lengths)
    starts[order] = np.cumsum(lengths[order]) - lengths[order]
    tokens_T = np.concatenate([laid[index].token_ids for index in order]).astype(np.int64)
    places_T = np.concatenate([np.arange(lengths[index]) for index in order])
    positions, targets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for sequence, start in zip(laid, starts, strict=True):
        assert not sequence.loss_mask[:1].any(), "nothing predicts a sequence's first token"
        counts = sequence.loss_mask.nonzero()[0]
        positions.append(start + counts - 1)
        targets.append(sequence.token_ids[counts].astype(np.int64))
    ends = (starts + lengths - 1)[: len(sequences)]
    return Pack(
        sequences=tuple(sequences),
        lengths=tuple(lengths[order].tolist()),
        tokens_1T=torch.from_numpy(tokens_T)[None].to(device),
        places_1T=torch.from_numpy(places_T)[None].to(device),
        positions_N=torch.from_numpy(np.concatenate(positions)).to(device),
        targets_N=torch.from_numpy(np.concatenate(targets)).to(device),
        ends_E=torch.from_numpy(ends if last is None else ends[list(last)]).to(device),
        routes_LTK=_lay_routes([laid[index] for index in order], device),
    )


def _lay_routes(laid: Sequence[TokenSequence], device: torch.device) -> Tensor | None:
    """Routes of sequences as they lie; None if none has any."""
    known = next((s.routes for s in laid if s.routes is not None), None)
    if known is None:
        return None
    num_tokens = sum(len(sequence.token_ids) for sequence in laid)
    routes_TLK = np.full((num_tokens, *known.shape[1:]), -1, np.int16)
    start = 0
    for sequence in laid:
        if sequence.routes is not None:
            routes_TLK[start : start + len(sequence.routes)] = sequence.routes
        start += len(sequence.token_ids)
    return torch.from_numpy(routes_TLK.transpose(1, 0, 2).copy()).to(device)
