"""The entries of a log with their payloads, in one pass over its bytes.

As `learner.log.reader.LogReader` reads them, but with the payload at hand: what is hashed is what
the checksum covered, though retention may give the segment other bytes meanwhile.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from learner.audit.violations import Place
from learner.log.segments import list_segments, read_segment
from learner.log.walk import Findings, Walk
from understudy.errors import ConfigError, UnderstudyError
from understudy.v1.log_pb2 import LogEntry


class Item(NamedTuple):
    """A sound entry."""

    entry: LogEntry
    place: Place
    payload: memoryview
    """Valid until the next entry is asked for."""
    checksum: int
    """Its frame's."""
    newest: bool
    """It stands in the newest segment, which has no seal yet."""


class Entries:
    """A run's log. Iterate as often as needed; a segment at a time is in memory.

    Args:
        run: the run's folder.

    Raises:
        ConfigError: there is no log.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "log"
        self.findings = Findings()
        """What the latest iteration found; complete once it has ended."""
        if not list_segments(self.folder):
            raise ConfigError(
                f"RUN = '{run}': {self.folder} has no segments; name the folder of a run that its "
                "intake has begun, for example runs/demo"
            )

    def __iter__(self) -> Iterator[Item]:
        walk = Walk()
        self.findings = walk.findings
        segments = list_segments(self.folder)
        for segment in segments:
            newest = segment == segments[-1]
            data = self._read(segment)
            with memoryview(data) as view:
                for frame in walk.scan(segment, data, newest=newest):
                    place = Place(frame.entry.index, segment, frame.offset)
                    payload = view[frame.offset + frame.head_bytes : frame.end]
                    yield Item(frame.entry, place, payload, frame.checksum, newest)
                    payload.release()

    def _read(self, segment: int) -> bytes:
        try:
            return read_segment(self.folder, segment)
        except OSError as error:
            raise UnderstudyError(f"{error.filename}: {error.strerror}; check the disk") from None
