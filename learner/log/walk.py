"""The way through a log, segment by segment: which entries count, and what is wrong with the rest.

Recovery and the read-only reader go this way alike, so that they find the same.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from learner.log.frames import HEADER_BYTES, Frame, extend_chain, scan
from learner.log.segments import Location
from understudy.v1.log_pb2 import LogEntry


@dataclass(kw_only=True, slots=True)
class Findings:
    """What a log holds."""

    num_entries: int = 0
    """Sound entries."""
    num_bytes: int = 0
    """Bytes of all segments, without the torn tail."""
    torn_bytes: int = 0
    """Bytes of the newest segment that follow its last sound entry: a write that did not end."""
    bad_ranges: list[Location] = field(default_factory=list)
    """Bytes that are no entry, elsewhere: damage."""
    num_missing: int = 0
    """Numbers that no sound entry has, though later ones exist: what damage cost."""


@dataclass(kw_only=True, slots=True)
class Tail:
    """The end of a segment; where the next entry goes, unless the segment is sealed."""

    segment: int
    offset: int = 0
    num_entries: int = 0
    chain: int = 0
    """Checksum over the frames' checksums."""
    sealed: bool = False

    def add(self, frame: Frame) -> None:
        """A frame follows."""
        self.offset = frame.end
        self.num_entries += 1
        self.chain = extend_chain(self.chain, frame.checksum)
        self.sealed = frame.entry.HasField("segment_sealed")


class Walk:
    """Goes through the segments of a log, each once, in order."""

    def __init__(self) -> None:
        self.findings = Findings()
        self.next_index = 0
        self.tail = Tail(segment=0, sealed=True)
        """End of the segment that was gone through last."""
        self._complete = True

    def scan(self, segment: int, data: bytes, *, newest: bool) -> Iterator[Frame]:
        """Go through a segment's bytes, and check them all."""
        self._begin(segment)
        findings = self.findings
        findings.num_bytes += len(data)
        for found in scan(data, self._accepts):
            if isinstance(found, Frame):
                self._add(found)
                yield found
            elif newest and found.end == len(data) and found.searched:
                findings.torn_bytes += found.num_bytes
                findings.num_bytes -= found.num_bytes
            else:
                findings.bad_ranges.append(Location(segment, found.offset, found.num_bytes))
                self.tail.offset = found.end

    def follow(self, segment: int, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Go through a segment that is known to be sound."""
        self._begin(segment)
        for frame in frames:
            self.next_index = frame.entry.index + 1
            self.findings.num_bytes += frame.num_bytes
            self._add(frame)
            yield frame

    def _begin(self, segment: int) -> None:
        """Whether all entries before this segment are known decides what its first may be."""
        self._complete = self.tail.sealed and segment == self.tail.segment + 1
        self.tail = Tail(segment=segment)

    def _add(self, frame: Frame) -> None:
        self.findings.num_entries += 1
        self.tail.add(frame)

    def _accepts(self, entry: LogEntry, num_bad_bytes: int) -> bool:
        """Numbers rise, and skip no more than bad bytes can have held. What a damaged payload may
        hold, bytes of a frame that some actor made up, must not shut out the entries behind it."""
        num_skipped = entry.index - self.next_index
        if num_skipped < 0 or (self._complete and num_skipped > num_bad_bytes // HEADER_BYTES):
            return False
        self.findings.num_missing += num_skipped
        self.next_index = entry.index + 1
        self._complete = True
        return True
