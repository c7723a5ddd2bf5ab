"""Segments: the files of a log, and how to find and read an entry in them."""

import os
import threading
from pathlib import Path
from typing import NamedTuple

from learner.log.errors import BadEntryError
from learner.log.frames import decode_frame
from understudy.v1.log_pb2 import LogEntry

SUFFIX = ".seg"

_MAX_OPEN_FILES = 16


class Location(NamedTuple):
    """Where an entry's frame stands."""

    segment: int
    offset: int
    num_bytes: int


def segment_path(folder: Path, segment: int) -> Path:
    """File of a segment."""
    return folder / f"{segment:012d}{SUFFIX}"


def list_segments(folder: Path) -> list[int]:
    """Numbers of the segments that have a file, ascending."""
    return sorted(int(path.stem) for path in folder.glob(f"*{SUFFIX}") if path.stem.isdigit())


def read_segment(folder: Path, segment: int) -> bytes:
    """All bytes of a segment. Not mapped: a bad sector, or a file that another process cuts, would
    be a SIGBUS then instead of an error."""
    return segment_path(folder, segment).read_bytes()


class SegmentFiles:
    """Reads single entries, on any thread, and keeps the files open that were read last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[int, int] = {}
        self._held: set[int] = set()
        self._lock = threading.RLock()

    def read(self, location: Location) -> tuple[LogEntry, bytes]:
        """An entry and its payload, checked.

        Raises:
            BadEntryError: there is no sound entry of this size.
        """
        with self._lock:
            descriptor = self._descriptor(location.segment)
            data = os.pread(descriptor, location.num_bytes, location.offset)
        frame = decode_frame(data)
        if frame is None or frame.num_bytes != location.num_bytes:
            path = segment_path(self._folder, location.segment)
            raise BadEntryError(f"{path}: no sound entry at {location.offset}; audit the run")
        return frame.entry, data[frame.head_bytes :]

    def hold(self, segment: int) -> None:
        """Keep reading a segment from the file that has its name now."""
        with self._lock:
            self._descriptor(segment)
            self._held.add(segment)

    def forget(self, segment: int) -> None:
        """Read a segment from the file that has its name from now on."""
        with self._lock:
            self._held.discard(segment)
            if segment in self._open:
                os.close(self._open.pop(segment))

    def close(self) -> None:
        """Close all files."""
        for segment in list(self._open):
            self.forget(segment)

    def _descriptor(self, segment: int) -> int:
        descriptor = self._open.pop(segment, -1)
        if descriptor < 0:
            descriptor = os.open(segment_path(self._folder, segment), os.O_RDONLY)
        self._open[segment] = descriptor  # now last: dicts keep the order of insertion
        if len(self._open) > _MAX_OPEN_FILES + len(self._held):
            self.forget(next(old for old in self._open if old not in self._held))
        return descriptor
