"""Recovery: what a start makes of the files that the last process left.

    newest segment:  frames | sound | sound | torn tail  -> cut off
    any segment:     frames | sound | bad range | sound  -> copied to quarantine/, alarm, skipped

Nothing of what a flush returned for is ever in a torn tail, as long as the disk keeps its promises.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from learner.log.frames import Frame
from learner.log.index import SegmentIndex
from learner.log.segments import (
    Location,
    list_segments,
    read_segment,
    segment_path,
)
from learner.log.walk import Findings, Walk
from understudy.errors import ConfigError
from understudy.files import NEW_SUFFIX, sync
from understudy.v1.log_pb2 import LogEntry

OnEntry = Callable[[LogEntry, Location], None]
"""Told of each sound entry, and where it stands."""

_log = logging.getLogger(__name__)


class Recovery:
    """Repairs a log and tells its owner all entries.

    Args:
        folder: the log's folder; nobody else writes there.
        run_id: run that the log must be of.
        index: used for sealed segments, and brought up to date.
        on_entry: told of every sound entry in order.
    """

    def __init__(self, folder: Path, run_id: str, index: SegmentIndex, on_entry: OnEntry) -> None:
        self._folder = folder
        self._run_id = run_id
        self.index = index
        self._on_entry = on_entry
        self.walk = Walk()

    @property
    def findings(self) -> Findings:
        """What was found, and what was cut off."""
        return self.walk.findings

    async def run(self) -> None:
        """Go through all segments. Other tasks get a turn after each.

        Raises:
            ConfigError: the log is of another run.
            OSError: a file cannot be read or repaired.
        """
        for path in self._folder.glob(f"*{NEW_SUFFIX}"):
            path.unlink()
        segments = list_segments(self._folder)
        for segment in segments[:-1]:
            self._take_older(segment)
            await asyncio.sleep(0)
        if segments:
            self._take_newest(segments[-1])
        sync(self._folder)
        self._report()

    def _take_older(self, segment: int) -> None:
        known = self.index.get(segment)
        # Numbers that do not follow are a matter for a scan, which says what is missing.
        if known and known[0].entry.index == self.walk.next_index:
            self._tell(segment, self.walk.follow(segment, known))
            return
        data = read_segment(self._folder, segment)
        self._tell(segment, self.walk.scan(segment, data, newest=False))
        if not self._quarantine(segment, data) and self.walk.tail.sealed:
            self.index.put(segment, data)

    def _take_newest(self, segment: int) -> None:
        path = segment_path(self._folder, segment)
        _settle(path)
        data = read_segment(self._folder, segment)
        before = self.walk.tail
        self._tell(segment, self.walk.scan(segment, data, newest=True))
        self._quarantine(segment, data)
        if not self.walk.tail.offset:  # the end came while the segment was being created
            path.unlink()
            self.walk.tail = before
        elif self.findings.torn_bytes:
            _cut(path, self.walk.tail.offset)

    def _tell(self, segment: int, frames: Iterable[Frame]) -> None:
        for frame in frames:
            opened = frame.entry.segment_opened
            if frame.entry.HasField("segment_opened") and opened.run_id != self._run_id:
                raise ConfigError(
                    f"run.name = {self._run_id!r}: {self._folder} holds the log of run "
                    f"{opened.run_id!r}; choose that name, or another run.directory"
                )
            self._on_entry(frame.entry, Location(segment, frame.offset, frame.num_bytes))

    def _quarantine(self, segment: int, data: bytes) -> bool:
        """Copy a segment's bad ranges to where people find them; they stay in the segment, too."""
        bad_ranges = [bad for bad in self.findings.bad_ranges if bad.segment == segment]
        for bad in bad_ranges:
            path = self._folder / "quarantine" / f"{segment:012d}-{bad.offset}.bin"
            path.parent.mkdir(exist_ok=True)
            if not path.exists() or path.stat().st_size != bad.num_bytes:
                path.write_bytes(data[bad.offset : bad.offset + bad.num_bytes])
            _log.error(
                "the log is damaged: segment %d has no sound entry in %d bytes from %d on; "
                "%s has a copy; audit the run",
                *(segment, bad.num_bytes, bad.offset, path),
            )
        return bool(bad_ranges)

    def _report(self) -> None:
        findings = self.findings
        if findings.num_missing:
            _log.error("the log is damaged: %d entries are missing", findings.num_missing)
        if findings.torn_bytes:
            _log.warning("cut off %d bytes of an unfinished write", findings.torn_bytes)


def _settle(path: Path) -> None:
    """Have memory and disk agree about a file. What a killed process wrote may not be on disk yet,
    and its owner will act on it; after an I/O error memory may hold what the disk never got."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _cut(path: Path, num_bytes: int) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.ftruncate(descriptor, num_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
