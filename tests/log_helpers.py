"""Logs that tests write and read."""

import asyncio
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from learner.log.index import NAME, SegmentIndex
from learner.log.reader import LogReader
from learner.log.recovery import Recovery
from learner.log.segments import Location
from learner.log.walk import Findings
from learner.log.writer import DurableLog, LogLimits
from understudy.v1.log_pb2 import LogEntry, RecordOrigin, StepCompleted, TrajectoryStored

LIMITS = LogLimits(segment_bytes=2**26, buffer_bytes=2**26, quota_bytes=2**40)
SMALL = replace(LIMITS, segment_bytes=1000)
RUN = "test"
Entries = list[tuple[LogEntry, Location]]


def stored(number: int) -> LogEntry:
    """An entry that carries a number and has a payload."""
    return LogEntry(trajectory_stored=TrajectoryStored(origin=RecordOrigin(sequence=number)))


def step(number: int) -> LogEntry:
    """An entry that carries a number and has no payload."""
    return LogEntry(step_completed=StepCompleted(step=number))


def payload(number: int) -> bytes:
    """About 200 bytes that belong to a number."""
    return b"%d," % number * 60


def numbers(entries: Iterable[tuple[LogEntry, Location]]) -> list[int]:
    """Numbers of all entries that `stored` made."""
    return [
        entry.trajectory_stored.origin.sequence
        for entry, _ in entries
        if entry.HasField("trajectory_stored")
    ]


async def open_log(
    folder: Path, limits: LogLimits = LIMITS, entries: Entries | None = None
) -> DurableLog:
    """A log, and the entries that it was recovered from."""

    def on_entry(entry: LogEntry, location: Location) -> None:
        if entries is not None:
            entries.append((entry, location))

    return await DurableLog.open(folder, RUN, limits, on_entry)


async def write(folder: Path, count: int, limits: LogLimits = LIMITS) -> list[Location]:
    """Append numbered entries, each with its payload, and close."""
    log = await open_log(folder, limits)
    locations = [log.append(stored(number), payload(number)) for number in range(count)]
    await log.close()
    return locations


async def recover(folder: Path) -> tuple[Entries, Findings]:
    """What a start makes of a folder."""
    entries: Entries = []
    recovery = Recovery(
        folder, RUN, SegmentIndex(folder), lambda entry, at: entries.append((entry, at))
    )
    await recovery.run()
    return entries, recovery.findings


def read(folder: Path) -> tuple[Entries, Findings]:
    """What the reader makes of a folder."""
    reader = LogReader(folder)
    return list(reader), reader.findings


def copy(folder: Path, to: Path, *, index: bool = True) -> Path:
    """A folder as a crash would leave it now."""
    shutil.copytree(folder, to)
    if not index:
        (to / NAME).unlink(missing_ok=True)
    return to


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def cut(path: Path, num_bytes: int) -> None:
    """Shorten a file."""
    os.truncate(path, num_bytes)


async def turns(count: int = 3) -> None:
    """Let other tasks run."""
    for _ in range(count):
        await asyncio.sleep(0)
