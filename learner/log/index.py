"""The index: a cache of what sealed segments hold but for payloads, so that a start reads less.

One SQLite row a segment: its size, and the heads of its frames. A row counts only if the file has
that size and ends with the same seal, which sums up the checksums of all frames before it. The
file may be deleted at any time; whatever is wrong with it costs time and nothing else.
"""

import contextlib
import logging
import sqlite3
import threading
from pathlib import Path
from typing import Any

from crc32c import crc32c

from learner.log.frames import Frame, decode_heads, extend_chain, take_heads
from learner.log.segments import segment_path

NAME = "index.sqlite"
_TABLE = """
CREATE TABLE IF NOT EXISTS segments (
  segment INTEGER PRIMARY KEY, num_bytes INTEGER, heads BLOB, crc32c INTEGER
) STRICT
"""
_log = logging.getLogger(__name__)


class SegmentIndex:
    """The index of a log's folder. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / NAME
        self._lock = threading.Lock()

    def get(self, segment: int) -> list[Frame] | None:
        """Frames of a sealed segment; None if they are not known."""
        rows = self._execute(
            "SELECT num_bytes, heads, crc32c FROM segments WHERE segment = ?", segment
        )
        if not rows or not isinstance(rows[0][1], bytes):
            return None
        num_bytes, heads, checksum = rows[0]
        if crc32c(heads) != checksum:
            return None
        try:
            frames = list(decode_heads(heads))
        except ValueError:  # of another format
            return None
        return frames if self._agrees(segment, num_bytes, heads, frames) else None

    def put(self, segment: int, data: bytes) -> None:
        """Keep what a sealed segment holds, unless it is damaged."""
        heads = take_heads(data)
        if heads is None:
            return
        self._execute(
            "INSERT OR REPLACE INTO segments VALUES (?, ?, ?, ?)",
            *(segment, len(data), heads, crc32c(heads)),
        )

    def _agrees(self, segment: int, num_bytes: int, heads: bytes, frames: list[Frame]) -> bool:
        """Whether a row is about the file that has the segment's name now."""
        if not frames or not _chained(frames) or frames[-1].end != num_bytes:
            return False
        seal_bytes = frames[-1].num_bytes
        with segment_path(self._folder, segment).open("rb") as file:
            if file.seek(0, 2) != num_bytes:
                return False
            file.seek(-seal_bytes, 2)
            return file.read() == heads[-seal_bytes:]

    def _execute(self, statement: str, *values: object) -> list[Any]:
        with self._lock:
            try:
                with contextlib.closing(sqlite3.connect(self._path, timeout=1)) as connection:
                    # What a crash leaves half written is found out: nothing has to be durable.
                    connection.execute("PRAGMA synchronous = OFF")
                    connection.execute("PRAGMA journal_mode = MEMORY")
                    connection.execute(_TABLE)
                    with connection:
                        return connection.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                _log.warning("%s is built anew: %s", self._path, error)
                with contextlib.suppress(OSError):
                    self._path.unlink()
                return []


def _chained(frames: list[Frame]) -> bool:
    """Whether the last frame is a seal that fits those before it."""
    chain = 0
    for frame in frames[:-1]:
        chain = extend_chain(chain, frame.checksum)
    seal = frames[-1].entry
    return seal.HasField("segment_sealed") and seal.segment_sealed.chain_crc32c == chain
