"""A log's bytes: whatever they are, they are divided into frames and bad ranges."""

import contextlib
import random
import struct

from learner.log.frames import (
    MAGIC,
    BadRange,
    Frame,
    decode_frame,
    decode_heads,
    encode_head,
    scan,
    take_heads,
)
from learner.log.walk import Walk
from tests.fuzz.mutation import mutate_bytes, mutate_message
from understudy.v1.common_pb2 import TaskKey
from understudy.v1.log_pb2 import (
    LogEntry,
    RecordAnswered,
    RecordOrigin,
    SampleLeased,
    SegmentOpened,
    SegmentSealed,
    StepCompleted,
    TrajectoryStored,
)

MAX_LEN = 512
_RECORD = RecordOrigin(actor_id="a", incarnation=1, sequence=2)
_ENTRIES = (
    LogEntry(index=0, segment_opened=SegmentOpened(run_id="run")),
    LogEntry(index=1, sample_leased=SampleLeased(task_key=TaskKey(ordinal=1), lease_id=1)),
    LogEntry(index=2, trajectory_stored=TrajectoryStored(origin=_RECORD)),
    LogEntry(index=3, record_answered=RecordAnswered(origin=_RECORD, reason="CONFLICT")),
    LogEntry(index=4, step_completed=StepCompleted(step=1)),
    LogEntry(index=5, segment_sealed=SegmentSealed(chain_crc32c=7)),
)


def _encode(entry: LogEntry, payload: bytes = b"") -> bytes:
    return encode_head(entry, payload) + payload


def seeds() -> list[bytes]:
    """A segment, cut, with a gap, with a frame inside of a payload, and headers that lie."""
    frames = [_encode(entry, b"payload" * (entry.index % 3)) for entry in _ENTRIES]
    whole = b"".join(frames)
    nested = _encode(_ENTRIES[2], frames[1] + frames[4])
    lie = struct.pack("<4sIII", MAGIC, 8, 2**32 - 1, 0)
    magics = b"".join(struct.pack("<4sIII", MAGIC, 0, size, 0) for size in range(200, 0, -16))
    gap = frames[0] + b"USL1" * 9 + frames[5]
    return [whole, whole[:-3], gap, frames[0] + nested, whole + lie + whole, magics, MAGIC]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change an entry under a right checksum, drop, double or exchange frames, or change bytes."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        first, *others = data.split(MAGIC)
        pieces = [piece for piece in (first, *(MAGIC + other for other in others)) if piece]
        if pieces:
            index = rng.randrange(len(pieces))
            match rng.randrange(4):
                case 0:
                    del pieces[index]
                case 1:
                    pieces.insert(index, rng.choice(pieces))
                case 2:
                    rng.shuffle(pieces)
                case _:
                    pieces[index] = _change(pieces[index], rng)
            changed = b"".join(pieces)
            if len(changed) <= max_size:
                return changed
    return mutate_bytes(data, max_size, seed)


def _change(piece: bytes, rng: random.Random) -> bytes:
    frame = decode_frame(piece)
    if frame is None:
        return _encode(rng.choice(_ENTRIES), piece)
    mutate_message(frame.entry, rng)
    return _encode(frame.entry, piece[frame.head_bytes :])


def TestOneInput(data: bytes) -> None:
    """Scan as plain bytes or, one time in two, by the rules of a walk; then the heads alone."""
    if len(data) % 2:
        _check_scan(data)
    else:
        _check_walk(data, newest=len(data) % 4 == 0)
    with contextlib.suppress(ValueError):
        list(decode_heads(data))


def _check_scan(data: bytes) -> None:
    found = list(scan(data, lambda entry, num_bad: True))
    _check_cover(found, data)
    for item in found:
        assert not isinstance(item, Frame) or decode_frame(data, item.offset) == item
    if found and all(isinstance(item, Frame) for item in found):
        heads = take_heads(data)
        assert heads is not None
        assert list(decode_heads(heads)) == found


def _check_walk(data: bytes, newest: bool) -> None:
    walk = Walk()
    frames = list(walk.scan(1, data, newest=newest))
    indices = [frame.entry.index for frame in frames]
    assert indices == sorted(set(indices))
    findings = walk.findings
    num_bad = sum(bad.num_bytes for bad in findings.bad_ranges) + findings.torn_bytes
    assert num_bad + sum(frame.num_bytes for frame in frames) == len(data)
    assert findings.num_entries == len(frames)


def _check_cover(found: list[Frame | BadRange], data: bytes) -> None:
    position = 0
    for item in found:
        assert item.offset == position
        assert item.end > position
        position = item.end
    assert position == len(data)
