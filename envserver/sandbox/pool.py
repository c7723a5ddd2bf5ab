"""Boxes that stand ready, and what an episode holds of them.

refill   starts boxes until `warm` are free, one at a time
watch    looks at boxes in use, 20 times a second while a call runs, once a second otherwise
"""

import asyncio
import base64
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from envserver.sandbox import share
from envserver.sandbox.box import Box
from envserver.sandbox.layout import Layout
from envserver.sandbox.limits import Limits, Reply
from understudy import metrics

WATCH_SECONDS = 0.05
IDLE_LOOKS = 20
"""An idle box is looked at once in so many times."""
_log = logging.getLogger(__name__)


class Pool:
    """Starts boxes ahead of need. A box is used by one owner and never returned to others."""

    def __init__(self, layout: Layout, limits: Limits, num_warm: int) -> None:
        """Make an empty pool; `start` fills it."""
        self.layout = layout
        self.limits = limits
        self._num_warm = num_warm
        self._free: deque[Box] = deque()
        self._used: set[Box] = set()
        self._wanted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the first box, and others in the background. Raises OSError if none can start."""
        self._free.append(await Box.start(self.layout, self.limits))
        self._wanted.set()
        self._tasks = [asyncio.create_task(self._refill()), asyncio.create_task(self._watch())]

    async def take(self) -> Box:
        """A box that nobody has used. Raises OSError if none is free and none can start."""
        while self._free:
            box = self._free.popleft()
            self._count()
            if box.alive:
                break
            await box.close()
        else:
            box = await Box.start(self.layout, self.limits)
        self._used.add(box)
        return box

    async def discard(self, box: Box) -> None:
        """End a box that was taken."""
        self._used.discard(box)
        await box.close()

    async def close(self) -> None:
        """End all boxes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for box in (*self._free, *self._used):
            await box.close()
        self._free.clear()
        self._used.clear()
        self._count()

    def _count(self) -> None:
        metrics.SANDBOX_FREE_BOXES.set(len(self._free))
        self._wanted.set()

    async def _refill(self) -> None:
        while await self._wanted.wait():
            self._wanted.clear()
            while len(self._free) < self._num_warm:
                try:
                    self._free.append(await Box.start(self.layout, self.limits, share.SMALL))
                except OSError as error:  # of memory or processes, perhaps for now only
                    _log.error("the sandbox's pool: %s", error)
                    await asyncio.sleep(1.0)
                metrics.SANDBOX_FREE_BOXES.set(len(self._free))

    async def _watch(self) -> None:
        look = 0
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            look += 1
            for box in tuple(self._used):
                if box.alive and (box.busy or look % IDLE_LOOKS == 0):
                    box.check()


class Workspace:
    """The sandbox as one episode sees it: a box from the first call, a fresh one after a limit."""

    def __init__(self, pool: Pool, files: Mapping[str, bytes] | None = None) -> None:
        """Take the pool, and files by name that lie in every box's folder."""
        self.pool = pool
        self._files = files or {}
        self._box: Box | None = None

    async def call(self, op: str, **arguments: object) -> Reply:
        """One call in the episode's box. Raises OSError if no box can be had."""
        lost = await self._lose()
        box = self._box or await self._open()
        reply = await box.call(op, **arguments)
        if reply.ended:
            await self.close()
        return replace(reply, output=lost + reply.output)

    async def close(self) -> None:
        """End the box, if there is one."""
        if box := self._box:
            self._box = None
            await self.pool.discard(box)

    async def _lose(self) -> str:
        """Part with a box that a limit ended between two calls, and say so."""
        if not self._box or self._box.alive:
            return ""
        reason = self.pool.limits.explain(self._box.outcome)
        await self.close()
        return f"Before this call: {reason}\n"

    async def _open(self) -> Box:
        self._box = await self.pool.take()
        for name, data in self._files.items():
            await self._box.call("write", name=name, data=base64.b64encode(data).decode())
        return self._box
