"""Retention: takes payloads out of sealed segments. Entries stay, so that accounts always close."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from learner.log.errors import NO_SPACE, LogFailedError
from learner.log.frames import BadRange, Frame, checksum_of, encode_head, extend_chain, scan
from learner.log.segments import Location, read_segment, segment_path
from learner.log.writer import DurableLog
from understudy.files import write_durably
from understudy.v1.log_pb2 import LogEntry

MayTrim = Callable[[LogEntry], bool]
"""Whether an entry's payload may go."""

_log = logging.getLogger(__name__)


async def trim_segment(
    log: DurableLog, segment: int, may_trim: MayTrim
) -> dict[int, Location] | None:
    """Rewrite a sealed segment without the payloads that may go.

    After a crash the segment is the old or the new one. A damaged segment is left as it is; so is
    one whose copy finds no space.

    Args:
        log: the log, open for writing.
        segment: one for which `log.is_sealed` holds; no other call may be rewriting it.
        may_trim: asked on the event loop, for each entry that has a payload.

    Returns:
        New location of every entry by its old offset; empty if nothing changed, None if there was
        no space for the copy. Old locations can be read until this returns, new ones from then on:
        take them over before any other await.

    Raises:
        LogFailedError: the disk failed, and with it the log.
    """
    assert log.is_sealed(segment)
    try:
        data = await asyncio.to_thread(read_segment, log.folder, segment)
        frames = await asyncio.to_thread(_sound_frames, data)
        chosen = {frame.offset for frame in frames if frame.payload_bytes and may_trim(frame.entry)}
        if not chosen:
            return {}
        log.files.hold(segment)
        trimmed, moved = await asyncio.to_thread(_trim, segment, data, frames, chosen)
        await asyncio.to_thread(write_durably, segment_path(log.folder, segment), [trimmed])
    except OSError as error:
        log.files.forget(segment)
        if error.errno in NO_SPACE:
            _log.warning("no space to rewrite segment %d", segment)
            return None
        log.fail(error)
        raise LogFailedError(log.failed) from error
    await asyncio.to_thread(log.index.put, segment, trimmed)
    log.files.forget(segment)
    log.resized(len(trimmed) - len(data))
    return moved


def _sound_frames(data: bytes) -> list[Frame]:
    """All frames of a segment; none if it has bad ranges, which stay evidence."""
    frames = []
    for found in scan(data, lambda entry, num_bad_bytes: True):
        if isinstance(found, BadRange):
            return []
        frames.append(found)
    return frames


def _trim(
    segment: int, data: bytes, frames: Sequence[Frame], chosen: set[int]
) -> tuple[bytes, dict[int, Location]]:
    """A segment's bytes without the payloads at some offsets, and where the entries went."""
    parts: list[bytes] = []
    moved = {}
    offset = chain = 0
    for frame in frames:
        part, entry = data[frame.offset : frame.end], frame.entry
        if frame.offset in chosen:
            entry.trimmed_bytes = frame.payload_bytes
            part = encode_head(entry, b"")
        elif entry.HasField("segment_sealed"):
            entry.segment_sealed.chain_crc32c = chain
            part = encode_head(entry, b"")
        chain = extend_chain(chain, checksum_of(part))
        moved[frame.offset] = Location(segment, offset, len(part))
        parts.append(part)
        offset += len(part)
    return b"".join(parts), moved
