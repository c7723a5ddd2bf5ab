"""Which ranks of the trainer are there: each keeps a stream open, which breaks if it stands still.

A step may take minutes, so that silence says nothing. A connection whose pings nobody answers does:
it is closed within 10 s (keepalive, rpc/channels.py).
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator

from learner.intake.refusals import RefusedError
from learner.intake.state import RunState
from understudy import metrics
from understudy.v1 import batch_pb2

_log = logging.getLogger(__name__)
Requests = AsyncIterator[batch_pb2.AttendRequest]


class Attendance:
    """Counts ranks while their streams are open, and says which were cut off.

    Args:
        state: of the run, whose newest trainer counts.
        draining: set when this process ends.
    """

    def __init__(self, state: RunState, draining: asyncio.Event) -> None:
        self._state = state
        self._draining = draining
        self._present: Counter[tuple[int, int]] = Counter()
        """Open streams by epoch and rank."""

    async def follow(self, requests: Requests) -> None:
        """Return when a rank has left, was cut off, or this process ends.

        Raises:
            RefusedError: BAD_RANK, OLD_EPOCH.
        """
        first = await anext(requests, None)
        if first is None or first.rank >= first.world_size:
            raise RefusedError("BAD_RANK", "the first message says which of how many ranks it is")
        if first.epoch != self._state.trainer_epoch:
            raise RefusedError(
                "OLD_EPOCH",
                f"epoch {first.epoch}; the present trainer's is {self._state.trainer_epoch}",
            )
        self._count(first, 1)
        left = False
        try:
            left = await self._until_gone(requests)
        finally:
            self._count(first, -1)
            if not left and not self._draining.is_set():
                self._say_lost(first)

    async def _until_gone(self, requests: Requests) -> bool:
        """Whether the rank said so."""
        leaving = asyncio.create_task(_leaving(requests))
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait((leaving, draining), return_when=asyncio.FIRST_COMPLETED)
            return leaving.done() and leaving.result()
        finally:
            leaving.cancel()
            draining.cancel()

    def _count(self, rank: batch_pb2.AttendRequest, change: int) -> None:
        self._present[rank.epoch, rank.rank] += change
        self._present += Counter()  # without those that nobody holds
        metrics.TRAINER_RANKS.set(
            sum(epoch == self._state.trainer_epoch for epoch, _ in self._present)
        )

    def _say_lost(self, rank: batch_pb2.AttendRequest) -> None:
        if rank.epoch != self._state.trainer_epoch or self._present[rank.epoch, rank.rank]:
            return  # another trainer is there, or the rank itself on another connection
        _log.warning(
            "trainer rank %d of %d (epoch %d) does not answer: its process has ended or stands "
            "still, or its machine cannot be reached; see its log",
            *(rank.rank, rank.world_size, rank.epoch),
        )


async def _leaving(requests: Requests) -> bool:
    async for request in requests:
        if request.leaving:
            return True
    return False
