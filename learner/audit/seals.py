"""The account of segments: each begins with its number and its run, and ends with its seal."""

from learner.audit.entries import Item
from learner.audit.violations import Place, Rule, Violations
from learner.log.frames import extend_chain
from understudy.v1 import log_pb2


class Seals:
    """Where the segments begin and end."""

    def __init__(self, violations: Violations) -> None:
        self.run_id = ""
        """Run that the log is of."""
        self.num_segments = 0
        self._violations = violations
        self._segment = 0
        self._sealed = True
        self._num_entries = self._chain = 0

    def take(self, item: Item) -> None:
        """The next entry."""
        entry, segment = item.entry, item.place.segment
        if segment != self._segment:
            self._begin(item.place)
        elif self._sealed:
            self._add(f"an entry behind the seal of segment {segment}")
        opens = entry.HasField("segment_opened")
        if opens:
            self._open(entry.segment_opened, segment)
        if opens != (self._num_entries == 0):
            self._add("the segment's opening is not its first entry, or not its only one")
        if entry.HasField("segment_sealed"):
            self._seal(entry.segment_sealed)
        self._num_entries += 1
        self._chain = extend_chain(self._chain, item.checksum)

    def _begin(self, place: Place) -> None:
        if not self._sealed:
            self._add(f"segment {self._segment} has no seal, though segment {place.segment} is")
        if place.segment != self._segment + 1:
            self._add(f"segment {place.segment}, where {self._segment + 1} was next")
        self._segment = place.segment
        self._sealed = False
        self._num_entries = self._chain = 0
        self.num_segments += 1

    def _open(self, event: log_pb2.SegmentOpened, segment: int) -> None:
        self.run_id = self.run_id or event.run_id
        if (event.run_id, event.segment) != (self.run_id, segment):
            self._add(f"segment {event.segment} of run {event.run_id!r} stands here")

    def _seal(self, event: log_pb2.SegmentSealed) -> None:
        self._sealed = True
        if (event.num_entries, event.chain_crc32c) != (self._num_entries, self._chain):
            self._add(f"the seal is of {event.num_entries} entries, other than those before it")

    def _add(self, what: str) -> None:
        self._violations.add(Rule.SEGMENT, what)
