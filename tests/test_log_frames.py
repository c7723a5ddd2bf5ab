"""Frames in any bytes: what is found is what was written, whatever lies around it."""

import time

from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.log.frames import (
    HEADER_BYTES,
    MAGIC,
    BadRange,
    Frame,
    decode_frame,
    decode_heads,
    encode_head,
    scan,
    take_heads,
)
from log_helpers import step, stored
from understudy.v1.log_pb2 import LogEntry

payloads = st.lists(st.binary(max_size=200), min_size=1, max_size=8)
junk = st.lists(
    st.sampled_from([MAGIC, bytes(HEADER_BYTES), b"\x01\0\0\0"]) | st.binary(max_size=40)
).map(b"".join)


def accept(entry: LogEntry, num_bad_bytes: int) -> bool:
    return True


def frame(number: int, payload: bytes) -> bytes:
    entry = stored(number)
    entry.index = number
    return encode_head(entry, payload) + payload


def frames_of(data: bytes) -> dict[int, bytes]:
    """Payloads by index of all frames in some bytes."""
    return {
        found.entry.index: data[found.offset + found.head_bytes : found.end]
        for found in scan(data, accept)
        if isinstance(found, Frame)
    }


@given(payloads)
def test_frames_are_found_as_they_were_written(payloads: list[bytes]) -> None:
    data = b"".join(frame(number, payload) for number, payload in enumerate(payloads))
    assert frames_of(data) == dict(enumerate(payloads))
    assert all(isinstance(found, Frame) for found in scan(data, accept))


@given(junk, st.integers(0, 100))
def test_any_bytes_are_covered_and_nothing_is_raised(data: bytes, offset: int) -> None:
    decode_frame(data, min(offset, len(data)))
    end = 0
    for found in scan(data, accept):
        assert found.offset == end
        end = found.end
    assert end == len(data)


@given(payloads, st.data())
def test_a_changed_byte_costs_one_frame_and_makes_no_other(
    payloads: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(frame(number, payload) for number, payload in enumerate(payloads))
    place = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.integers(1, 255))
    damaged = whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :]
    written = dict(enumerate(payloads))
    found = frames_of(damaged)
    assert found.items() <= written.items()
    assert len(found) == len(written) - 1


@given(payloads, st.data())
def test_what_is_cut_off_costs_only_itself(payloads: list[bytes], data: st.DataObject) -> None:
    frames = [frame(number, payload) for number, payload in enumerate(payloads)]
    whole = b"".join(frames)
    end = data.draw(st.integers(0, len(whole)))
    num_whole, length = 0, 0
    while num_whole < len(frames) and length + len(frames[num_whole]) <= end:
        length += len(frames[num_whole])
        num_whole += 1
    assert frames_of(whole[:end]) == dict(enumerate(payloads[:num_whole]))


@given(junk, junk)
@settings(max_examples=300)
def test_a_frame_is_found_between_any_bytes(before: bytes, after: bytes) -> None:
    assert frames_of(before + frame(7, b"payload") + after)[7] == b"payload"


def test_a_header_that_declares_more_than_there_is_costs_nothing() -> None:
    head = MAGIC + b"\xff" * 12
    assert list(scan(head, accept)) == [BadRange(0, len(head))]


def test_headers_with_long_lengths_cost_no_quadratic_time() -> None:
    num_headers = 2**18
    heads = (
        MAGIC + (0).to_bytes(4, "little") + (16 * (num_headers - i - 1)).to_bytes(4, "little")
        for i in range(num_headers)
    )
    data = b"".join(head + bytes(4) for head in heads)
    start = time.monotonic()
    ranges = list(scan(data, accept))
    assert time.monotonic() - start < 10  # a full search would read 500 GB
    assert ranges == [BadRange(0, len(data), searched=False)]


def test_a_meta_that_is_no_entry_is_no_frame_though_its_checksum_is_right() -> None:
    meta = b"\xff\xff\xff"
    lengths = len(meta).to_bytes(4, "little") + bytes(4)
    checksum = crc32c(meta, crc32c(lengths)).to_bytes(4, "little")
    assert decode_frame(MAGIC + lengths + checksum + meta) is None


def test_heads_say_where_frames_are() -> None:
    data = b"".join(frame(number, bytes(number * 10)) for number in range(5))
    heads = take_heads(data)
    assert heads is not None
    assert list(decode_heads(heads)) == list(scan(data, accept))
    assert take_heads(data + b"?") is None


def test_an_entry_of_a_later_version_keeps_its_place() -> None:
    meta = step(1).SerializeToString() + b"\xfa\x3e\x01x"  # field 1007, which nobody knows
    later = LogEntry.FromString(meta)
    data = encode_head(later, b"")
    assert frames_of(data) == {0: b""}
