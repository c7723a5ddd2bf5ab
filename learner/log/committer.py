"""The committer: holds what was appended until it is durable, and has one thread write it.

While a run of frames is on its way to the disk, further ones gather for the next: callers share
commits however many they are.

| call    | waits for                                        | woken by             |
|---------|--------------------------------------------------|----------------------|
| flush   | a commit that holds all that was added before it | the commit, a failure|
| changed | anything                                         | the same, `notify`   |
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from learner.log.errors import NO_SPACE, LogFailedError, failure
from learner.log.segments import Location
from learner.log.tail_file import TailFile

_RETRY_SECONDS = 1.0
_log = logging.getLogger(__name__)


class Committer:
    """Makes frames durable in the order in which they are added.

    Args:
        folder: the log's folder.
        on_durable: told of each commit's segment.
    """

    def __init__(self, folder: Path, on_durable: Callable[[int], None]) -> None:
        self.failed = ""
        """Why nothing is written any more, in one line for people; empty while it is."""
        self.no_space = False
        """Whether the latest attempt found the disk full."""
        self.num_bytes = 0
        """Bytes that are not durable yet."""
        self._folder = folder
        self._on_durable = on_durable
        # In order; a frame stays until it is durable. Payloads are not copied.
        self._buffer: dict[Location, tuple[bytes, bytes]] = {}
        self._num_added = self._num_durable = 0
        self._closing = False
        self._added = asyncio.Event()
        self._changed = asyncio.Event()
        self._failure = asyncio.Event()
        self._file = TailFile(folder)
        self._thread = ThreadPoolExecutor(1, "log")
        self._task = asyncio.create_task(self._commit_all())

    def add(self, location: Location, head: bytes, payload: bytes) -> None:
        """Take a frame that belongs at a location, behind all others."""
        self._buffer[location] = head, payload
        self._num_added += 1
        self.num_bytes += location.num_bytes
        self._added.set()

    def get(self, location: Location) -> tuple[bytes, bytes] | None:
        """Head and payload of a frame that is not durable yet."""
        return self._buffer.get(location)

    async def flush(self) -> None:
        """Return once all frames that were added before this call are durable.

        Raises:
            LogFailedError: they never will be.
        """
        wanted = self._num_added
        self.check()
        while self._num_durable < wanted:
            await self.changed()

    async def changed(self) -> None:
        """Return once something has changed.

        Raises:
            LogFailedError: that the log failed did.
        """
        await self._changed.wait()
        self.check()

    def notify(self) -> None:
        """Wake all that wait for a change, and have whoever waits next wait anew."""
        self._changed.set()
        self._changed = asyncio.Event()

    def check(self) -> None:
        """Raise LogFailedError if the log failed."""
        if self.failed:
            raise LogFailedError(self.failed)

    def fail(self, error: OSError) -> None:
        """End for good: nothing is acknowledged after an error that cannot be undone."""
        if not self.failed:
            self.failed = failure(self._folder, error)
            _log.error("%s", self.failed)
            self._failure.set()
            self.notify()

    async def wait_failed(self) -> None:
        """Raise LogFailedError once the log has failed; never return."""
        await self._failure.wait()
        self.check()

    async def close(self) -> None:
        """Write what was added, unless the log failed or there is no space."""
        self._closing = True
        with contextlib.suppress(LogFailedError):
            await self.flush()
        if self._buffer:
            _log.warning("%d entries of the log were never durable", len(self._buffer))
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()
        self._file.close()

    async def _commit_all(self) -> None:
        """Consumes the buffer; waits for a frame; ends when the log fails."""
        try:
            while not self.failed:
                await self._added.wait()
                self._added.clear()
                while self._buffer and not self.failed:
                    await self._commit_run()
        except OSError as error:
            self.fail(error)
        except Exception as error:  # our mistake: nobody may wait for a commit that never comes
            self.fail(OSError(0, repr(error)))
            raise

    async def _commit_run(self) -> None:
        """Commit what is buffered of the oldest segment there."""
        first = next(iter(self._buffer))
        run = list(itertools.takewhile(lambda at: at.segment == first.segment, self._buffer))
        buffers = [part for at in run for part in self._buffer[at]]
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(
                self._thread, self._file.commit, first.segment, first.offset, buffers
            )
        except OSError as error:
            if error.errno not in NO_SPACE or self._closing:
                raise
            await self._wait_for_space(error)
            return
        self.no_space = False
        for location in run:
            del self._buffer[location]
        self._num_durable += len(run)
        self.num_bytes -= sum(location.num_bytes for location in run)
        self._on_durable(first.segment)
        self.notify()

    async def _wait_for_space(self, error: OSError) -> None:
        if not self.no_space:
            _log.error("%s: %s; nothing is stored until there is", error.filename, error.strerror)
        self.no_space = True
        self.notify()
        await asyncio.sleep(_RETRY_SECONDS)
