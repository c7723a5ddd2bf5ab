"""Actors: their incarnations and how far each one's records were taken."""

import asyncio
from collections import deque
from dataclasses import dataclass, field, replace

from learner.intake.refusals import RefusedError

RECENT_DIGESTS = 1024
"""Records of an incarnation whose digests are kept, to tell a resend from another record."""


@dataclass(kw_only=True, slots=True, eq=False)
class Incarnation:
    """One life of an actor process, as seen through its newest stream."""

    number: int
    next_sequence: int = 0
    """All records below were stored or rejected."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a record is taken, so that a stream that takes over begins behind it."""
    digests: deque[bytes] = field(default_factory=lambda: deque(maxlen=RECENT_DIGESTS))
    """Of the newest records below, oldest first."""

    def answered(self, digest: bytes) -> None:
        """The next record was stored or rejected."""
        self.next_sequence += 1
        self.digests.append(digest)

    def conflicts(self, sequence: int, digest: bytes) -> bool:
        """Whether a recent record below had another digest."""
        index = sequence - self.next_sequence + len(self.digests)
        return index >= 0 and self.digests[index] != digest


class Actors:
    """Gives every actor process an incarnation; a newer one of the same name fences the older."""

    def __init__(self, first_incarnation: int) -> None:
        self._next_number = first_incarnation
        self._first_number = first_incarnation
        self._newest: dict[str, Incarnation] = {}

    async def welcome(self, actor_id: str, number: int, first_unacked: int) -> Incarnation:
        """Open a stream of an actor, new (number 0) or known. An incarnation that an earlier start
        of the intake gave is not known any more: the actor gets a new one, from sequence 0.

        Raises:
            RefusedError: OLD_INCARNATION, BAD_HELLO.
        """
        newest = self._newest.get(actor_id)
        if newest is None:
            return self._welcome(actor_id, None, number, first_unacked)
        async with newest.lock:
            return self._welcome(actor_id, self._newest[actor_id], number, first_unacked)

    def _welcome(
        self, actor_id: str, newest: Incarnation | None, number: int, first_unacked: int
    ) -> Incarnation:
        if number < self._first_number:
            taken = Incarnation(number=self._next_number)
            self._next_number += 1
        elif newest is None or number > newest.number:
            raise RefusedError(
                "BAD_HELLO", f"incarnation {number} was never given to {actor_id!r}; send 0"
            )
        elif number < newest.number:
            raise RefusedError(
                "OLD_INCARNATION",
                f"incarnation {number} of {actor_id!r} was followed by {newest.number}; names of "
                "living actors are unique",
            )
        elif first_unacked > newest.next_sequence:
            raise RefusedError(
                "BAD_HELLO",
                f"first_unacked_sequence {first_unacked} is above {newest.next_sequence}, the next "
                "one that is expected",
            )
        else:
            # A new object: the older stream of this incarnation finds itself replaced.
            taken = replace(newest, digests=newest.digests.copy())
        self._newest[actor_id] = taken
        return taken

    def require_newest(self, actor_id: str, incarnation: Incarnation) -> None:
        """Raise OLD_INCARNATION if another stream of the actor was opened since."""
        if self._newest[actor_id] is not incarnation:
            raise RefusedError(
                "OLD_INCARNATION",
                f"another stream of {actor_id!r} took over from incarnation {incarnation.number}",
            )
