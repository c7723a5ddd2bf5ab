"""The reader: goes through a log from outside, also while an intake writes it. Never writes."""

from collections.abc import Iterator
from pathlib import Path

from learner.log.segments import Location, SegmentFiles, list_segments, read_segment
from learner.log.walk import Findings, Walk
from understudy.v1.log_pb2 import LogEntry


class LogReader:
    """A log's entries, every byte checked. Iterate as often as needed.

    Args:
        folder: the log's own folder, `<run>/log`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = SegmentFiles(folder)
        self.findings = Findings()
        """What the latest iteration found; complete once it has ended. A torn tail is no damage
        while an intake runs: it is what is being written."""

    def __iter__(self) -> Iterator[tuple[LogEntry, Location]]:
        walk = Walk()
        self.findings = walk.findings
        segments = list_segments(self._folder)
        for segment in segments:
            data = read_segment(self._folder, segment)
            for frame in walk.scan(segment, data, newest=segment == segments[-1]):
                yield frame.entry, Location(segment, frame.offset, frame.num_bytes)

    def read(self, location: Location) -> tuple[LogEntry, bytes]:
        """An entry and its payload.

        Raises:
            BadEntryError: the entry is damaged, or retention moved it.
            OSError: the segment cannot be read.
        """
        return self._files.read(location)

    def close(self) -> None:
        """Close all files."""
        self._files.close()
