"""Credits: what one stream may have un-acked, and whether it kept to it."""

from dataclasses import dataclass

from learner.intake.refusals import RefusedError

MAX_PAYLOAD_BYTES = 16 * 2**20
"""Largest compressed payload that is accepted."""
MAX_RECORDS = 256
MAX_STREAM_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Grant:
    """Most records and payload bytes that may be un-acked."""

    records: int
    payload_bytes: int


def grant(free_bytes: int, num_streams: int, max_payload_bytes: int) -> Grant:
    """An equal share of the log's buffer; none while the disk takes nothing.

    A share is never below one record of the largest size, since less would stop a stream for good.
    A stream whose records the buffer has no room for is not read: what it sent waits with gRPC,
    which takes in no more than a window, so that memory is bounded by the buffer, a message a
    stream and those windows.
    """
    if not free_bytes:
        return Grant(records=0, payload_bytes=0)
    share = max(free_bytes // max(num_streams, 1), max_payload_bytes)
    return Grant(records=MAX_RECORDS, payload_bytes=min(share, MAX_STREAM_BYTES))


class Window:
    """The right edge up to which a stream may send. It never moves back: what was granted may be
    under way when the next, smaller grant is made."""

    def __init__(self) -> None:
        self.current = Grant(records=0, payload_bytes=0)
        self._taken_records = self._taken_bytes = 0
        self._edge_records = self._edge_bytes = 0

    def open(self, new: Grant) -> None:
        """All records so far are acked, with this grant."""
        self.current = new
        self._edge_records = max(self._edge_records, self._taken_records + new.records)
        self._edge_bytes = max(self._edge_bytes, self._taken_bytes + new.payload_bytes)

    def take(self, payload_bytes: int) -> None:
        """A record came. Raises CREDITS_EXCEEDED beyond the edge."""
        self._taken_records += 1
        self._taken_bytes += payload_bytes
        if self._taken_records > self._edge_records or self._taken_bytes > self._edge_bytes:
            raise RefusedError(
                "CREDITS_EXCEEDED",
                f"{self._taken_bytes} bytes in {self._taken_records} records of this stream, "
                f"credits reach to {self._edge_bytes} and {self._edge_records}; wait for an Ack",
            )
