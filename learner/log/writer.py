"""The writer: appends entries, decides where they stand, and says when they are durable.

    append --> committer: buffer --> one thread: pwritev, fdatasync --> flush returns
                  |                                |
    read <--------+---------- files <--------------+--> sealed segments --> index

| call   | waits for                                            | woken by              |
|--------|------------------------------------------------------|-----------------------|
| append | nothing                                              |                       |
| flush  | a commit that holds all that was appended before it  | the commit, a failure |
| room   | the buffer to be below its limit, and free space     | a commit, retention   |
"""

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

from learner.log.committer import Committer
from learner.log.errors import LogFailedError, failure
from learner.log.frames import HEADER_BYTES, Frame, checksum_of, encode_head
from learner.log.index import SegmentIndex
from learner.log.lock import lock_folder
from learner.log.recovery import OnEntry, Recovery
from learner.log.segments import Location, SegmentFiles, read_segment
from learner.log.walk import Tail
from understudy import failpoints
from understudy.files import make_folder
from understudy.v1.log_pb2 import LogEntry, SegmentOpened, SegmentSealed


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLimits:
    """How large a log's parts may become."""

    segment_bytes: int
    """A segment ends before the entry whose payload would take it beyond this."""
    buffer_bytes: int
    """`room` waits while this much is not durable yet."""
    quota_bytes: int
    """`room` waits while all segments together have this much. `append` never does: the accounts
    must go on."""


class DurableLog:
    """A run's log, open for writing. One owner, on one event loop; made by `open`."""

    def __init__(
        self, folder: Path, run_id: str, limits: LogLimits, lock: int, recovery: Recovery
    ) -> None:
        self.folder = folder
        self.findings = recovery.findings
        """What recovery found."""
        self.num_bytes = self.findings.num_bytes
        """Bytes of all segments, with what is not durable yet."""
        self.files = SegmentFiles(folder)
        self.index = recovery.index
        self._run_id = run_id
        self._limits = limits
        self._lock: int | None = lock
        self._tail = recovery.walk.tail
        self._next_index = recovery.walk.next_index
        self._durable_segment = self._tail.segment
        self._committer = Committer(folder, self._on_durable)
        self._background: set[asyncio.Task[None]] = set()
        if self._tail.sealed:
            self._open_segment(self._tail.segment + 1)

    @classmethod
    async def open(
        cls, folder: Path, run_id: str, limits: LogLimits, on_entry: OnEntry
    ) -> "DurableLog":
        """Recover a log, or begin one, and open it for writing.

        Args:
            folder: the log's own folder, `<run>/log`; created if it is not there.
            run_id: run that the log must be of.
            limits: how large its parts may become.
            on_entry: told of every sound entry and its location, in order, before this returns.
                Other tasks run between segments.

        Raises:
            ConfigError: another process has the log open, or it is of another run.
            LogFailedError: a file cannot be read or repaired.
        """
        lock = -1
        try:
            make_folder(folder)
            lock = lock_folder(folder, run_id)
            recovery = Recovery(folder, run_id, SegmentIndex(folder), on_entry)
            await recovery.run()
            return cls(folder, run_id, limits, lock, recovery)
        except BaseException as error:  # whatever it is, the next attempt needs the lock
            if lock >= 0:
                os.close(lock)
            if isinstance(error, OSError):
                raise LogFailedError(failure(folder, error)) from error
            raise

    @property
    def unsynced_bytes(self) -> int:
        """Bytes that were appended and are not durable yet."""
        return self._committer.num_bytes

    @property
    def num_segments(self) -> int:
        """Number of the newest segment; they count from 1."""
        return self._tail.segment

    @property
    def throttled(self) -> str:
        """Why nothing should be appended that can wait: "no space" or "quota"; empty if it may."""
        if self._committer.no_space:
            return "no space"
        return "quota" if self.num_bytes >= self._limits.quota_bytes else ""

    @property
    def failed(self) -> str:
        """Why the log failed, in one line for people; empty while it works."""
        return self._committer.failed

    def append(self, entry: LogEntry, payload: bytes = b"") -> Location:
        """Add an entry. Its index and time are set here; it is durable once a later flush returns.

        Raises:
            LogFailedError: the log failed.
        """
        self._committer.check()
        fresh = self._tail.num_entries <= 1
        if not fresh and self._tail.offset + len(payload) > self._limits.segment_bytes:
            self._seal_segment()
            self._open_segment(self._tail.segment + 1)
        location = self._add(entry, payload)
        failpoints.hit("log.after_append")
        return location

    async def flush(self) -> None:
        """Return once everything that was appended before this call is durable.

        Raises:
            LogFailedError: the log failed.
        """
        await self._committer.flush()

    async def room(self) -> None:
        """Return once something may be appended that can wait.

        Raises:
            LogFailedError: the log failed.
        """
        self._committer.check()
        while self.throttled or self.unsynced_bytes >= self._limits.buffer_bytes:
            await self._committer.changed()

    def read(self, location: Location) -> tuple[LogEntry, bytes]:
        """An entry and its payload, durable or not.

        Raises:
            BadEntryError: the entry is damaged, or retention moved it.
            OSError: the segment cannot be read.
        """
        buffered = self._committer.get(location)
        if buffered:
            head, payload = buffered
            return LogEntry.FromString(head[HEADER_BYTES:]), payload
        return self.files.read(location)

    async def wait_failed(self) -> None:
        """Wait for the log to fail.

        Raises:
            LogFailedError: it did; this never returns.
        """
        await self._committer.wait_failed()

    async def close(self) -> None:
        """Write what was appended, unless the log failed or there is no space, and let go. A second
        call does nothing."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        await self._committer.close()
        await asyncio.gather(*self._background, return_exceptions=True)
        self.files.close()
        os.close(lock)

    def _seal_segment(self) -> None:
        tail = self._tail
        seal = SegmentSealed(num_entries=tail.num_entries, chain_crc32c=tail.chain)
        self._add(LogEntry(segment_sealed=seal))

    def _open_segment(self, segment: int) -> None:
        self._tail = Tail(segment=segment)
        self._add(LogEntry(segment_opened=SegmentOpened(run_id=self._run_id, segment=segment)))

    def _add(self, entry: LogEntry, payload: bytes = b"") -> Location:
        entry.index = self._next_index
        entry.time_us = time.time_ns() // 1000
        head = encode_head(entry, payload)
        frame = Frame(self._tail.offset, len(head), len(payload), checksum_of(head), entry)
        location = Location(self._tail.segment, frame.offset, frame.num_bytes)
        self._tail.add(frame)
        self._next_index += 1
        self.num_bytes += frame.num_bytes
        self._committer.add(location, head, payload)
        return location

    def _on_durable(self, segment: int) -> None:
        """A commit to a segment; once to a later one, the one before is sealed for good."""
        sealed, self._durable_segment = self._durable_segment, segment
        if 0 < sealed < segment:
            task = asyncio.create_task(asyncio.to_thread(self._put_into_index, sealed))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    def _put_into_index(self, segment: int) -> None:
        self.index.put(segment, read_segment(self.folder, segment))

    # For retention.

    def is_sealed(self, segment: int) -> bool:
        """Whether a segment has ended, durably; it may be rewritten."""
        return 0 < segment < self._durable_segment

    def resized(self, num_bytes: int) -> None:
        """A segment was rewritten, and has this many bytes more than before."""
        self.num_bytes += num_bytes
        self._committer.notify()

    def fail(self, error: OSError) -> None:
        """Rewriting a segment failed so that the disk cannot be trusted; the log fails."""
        self._committer.fail(error)
