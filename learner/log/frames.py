"""Frames: how an entry stands on disk, and how frames are found in any bytes.

    magic "USL1" | meta_bytes u32 | payload_bytes u32 | crc32c u32 | meta | payload

Integers are little-endian. The checksum covers the two lengths, the meta (a serialized LogEntry)
and the payload. All but the payload is called the head.
"""

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from crc32c import crc32c
from google.protobuf.message import DecodeError

from understudy.v1.log_pb2 import LogEntry

MAGIC = b"USL1"
_HEADER = struct.Struct("<4sIII")
_LENGTHS = slice(4, 12)
_CHECKSUM = slice(12, 16)
HEADER_BYTES = _HEADER.size

_MAX_WASTE = 32
"""A search for the next frame checks at most this many times the bytes that it searches, so that
bytes full of magics with long lengths cost no quadratic time. What is left then counts as bad."""


class Frame(NamedTuple):
    """A sound frame."""

    offset: int
    head_bytes: int
    payload_bytes: int
    checksum: int
    entry: LogEntry

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return self.head_bytes + self.payload_bytes

    @property
    def end(self) -> int:
        """Where the next frame begins."""
        return self.offset + self.num_bytes


class BadRange(NamedTuple):
    """Bytes that are no frame."""

    offset: int
    num_bytes: int
    searched: bool = True
    """There is no frame in them; else the search for one was given up."""

    @property
    def end(self) -> int:
        """Where the next frame begins, or the bytes end."""
        return self.offset + self.num_bytes


Accepts = Callable[[LogEntry, int], bool]
"""Whether an entry may follow, given how many bad bytes lie between it and the one before."""


def encode_head(entry: LogEntry, payload: bytes) -> bytes:
    """What precedes the payload in a frame."""
    meta = entry.SerializeToString()
    unsigned = _HEADER.pack(MAGIC, len(meta), len(payload), 0)
    checksum = crc32c(payload, crc32c(meta, crc32c(unsigned[_LENGTHS])))
    return _HEADER.pack(MAGIC, len(meta), len(payload), checksum) + meta


def extend_chain(chain: int, checksum: int) -> int:
    """The checksum over frames' checksums, with one more."""
    return crc32c(checksum.to_bytes(4, "little"), chain)


def decode_frame(data: bytes, offset: int = 0) -> Frame | None:
    """The frame at an offset of any bytes; None if there is no sound one."""
    head_bytes, payload_bytes = _sizes(data, offset)
    if not head_bytes:
        return None
    with memoryview(data) as view:
        body = view[offset + HEADER_BYTES : offset + head_bytes + payload_bytes]
        checksum = crc32c(body, crc32c(_part(data, offset, _LENGTHS)))
    if checksum != int.from_bytes(_part(data, offset, _CHECKSUM), "little"):
        return None
    entry = _decode_meta(data[offset + HEADER_BYTES : offset + head_bytes])
    return Frame(offset, head_bytes, payload_bytes, checksum, entry) if entry else None


def scan(data: bytes, accepts: Accepts) -> Iterator[Frame | BadRange]:
    """Divide any bytes into frames and bad ranges, which together cover them in order.

    Args:
        data: a segment's bytes.
        accepts: asked for each sound frame; one that it refuses is searched for others.
    """
    position = good = 0
    budget = _MAX_WASTE * (len(data) + 2**15)
    while position < len(data) and budget >= 0:
        frame = decode_frame(data, position)
        if frame and accepts(frame.entry, position - good):
            if good < position:
                yield BadRange(good, position - good)
            yield frame
            position = good = frame.end
        else:
            budget -= sum(_sizes(data, position))
            position = data.find(MAGIC, position + 1) % (len(data) + 1)  # none: -1, the end
    if good < len(data):
        yield BadRange(good, len(data) - good, budget >= 0)


def checksum_of(head: bytes) -> int:
    """The checksum that a head declares."""
    return int.from_bytes(head[_CHECKSUM], "little")


def take_heads(data: bytes) -> bytes | None:
    """The heads of a segment's frames, one after the other; None if other bytes are among them."""
    heads, offset = [], 0
    while offset < len(data):
        head_bytes, payload_bytes = _sizes(data, offset)
        if not head_bytes:
            return None
        heads.append(data[offset : offset + head_bytes])
        offset += head_bytes + payload_bytes
    return b"".join(heads)


def decode_heads(heads: bytes) -> Iterator[Frame]:
    """Frames of a segment, from what `take_heads` returned; their checksums are not checked.

    Raises:
        ValueError: the bytes are nothing that `take_heads` returned.
    """
    position = offset = 0
    while position < len(heads):
        if position + HEADER_BYTES > len(heads):
            raise ValueError("cut within a head")
        _, meta_bytes, payload_bytes, checksum = _HEADER.unpack_from(heads, position)
        head_bytes = HEADER_BYTES + meta_bytes
        entry = _decode_meta(heads[position + HEADER_BYTES : position + head_bytes])
        if entry is None:
            raise ValueError("no entry")
        frame = Frame(offset, head_bytes, payload_bytes, checksum, entry)
        yield frame
        position, offset = position + head_bytes, frame.end


def _sizes(data: bytes, offset: int) -> tuple[int, int]:
    """Bytes of head and payload as a header at the offset declares them; 0 if none can be there."""
    if not data.startswith(MAGIC, offset) or len(data) - offset < HEADER_BYTES:
        return 0, 0
    _, meta_bytes, payload_bytes, _ = _HEADER.unpack_from(data, offset)
    if HEADER_BYTES + meta_bytes + payload_bytes > len(data) - offset:
        return 0, 0
    return HEADER_BYTES + meta_bytes, payload_bytes


def _part(data: bytes, offset: int, part: slice) -> bytes:
    return data[offset + part.start : offset + part.stop]


def _decode_meta(meta: bytes) -> LogEntry | None:
    try:
        return LogEntry.FromString(meta)
    except DecodeError:
        return None
