"""The index is a cache: whatever becomes of it, a start finds the same."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from learner.log import recovery
from learner.log.frames import HEADER_BYTES
from learner.log.index import NAME, SegmentIndex
from learner.log.segments import list_segments, read_segment, segment_path
from log_helpers import SMALL, copy, cut, flip, numbers, recover, write
from understudy.v1.log_pb2 import LogEntry


def delete(folder: Path) -> None:
    (folder / NAME).unlink()


def overwrite(folder: Path) -> None:
    (folder / NAME).write_bytes(b"not a database" * 1000)


def damage_pages(folder: Path) -> None:
    for offset in range(100, (folder / NAME).stat().st_size, 97):
        flip(folder / NAME, offset)


def truncate(folder: Path) -> None:
    cut(folder / NAME, (folder / NAME).stat().st_size // 2)


def execute(statement: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        connection = sqlite3.connect(folder / NAME)
        connection.execute(statement)
        connection.commit()
        connection.close()

    return run


def change_meta(folder: Path) -> None:
    """One byte of an entry's time is another in every row."""
    connection = sqlite3.connect(folder / NAME)
    for segment, heads in connection.execute("SELECT segment, heads FROM segments").fetchall():
        head_bytes = HEADER_BYTES + int.from_bytes(heads[4:8], "little")
        first = LogEntry.FromString(heads[HEADER_BYTES:head_bytes])
        first.time_us ^= 1
        changed = heads[:HEADER_BYTES] + first.SerializeToString() + heads[head_bytes:]
        assert len(changed) == len(heads)
        connection.execute("UPDATE segments SET heads = ? WHERE segment = ?", (changed, segment))
    connection.commit()
    connection.close()


async def replace_log(folder: Path) -> None:
    """Another log, of the same sizes, takes the place of the one that the index is about."""
    index = (folder / NAME).read_bytes()
    for segment in list_segments(folder):
        segment_path(folder, segment).unlink()
    await write(folder, 40, SMALL)
    (folder / NAME).write_bytes(index)


DISTURBANCES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: None,
    "deleted": delete,
    "overwritten": overwrite,
    "damaged": damage_pages,
    "cut": truncate,
    "no table": execute("DROP TABLE segments"),
    "another table": execute("ALTER TABLE segments RENAME COLUMN heads TO tails"),
    "no rows": execute("DELETE FROM segments"),
    "wrong segments": execute("UPDATE segments SET segment = -segment"),
    "one row for all": execute(
        "UPDATE segments SET (num_bytes, heads, crc32c) ="
        " (SELECT num_bytes, heads, crc32c FROM segments WHERE segment = 3)"
    ),
    "wrong sizes": execute("UPDATE segments SET num_bytes = num_bytes + 1"),
    "wrong bytes": execute("UPDATE segments SET heads = zeroblob(length(heads))"),
    "wrong metas": change_meta,
    "null": execute("UPDATE segments SET heads = NULL"),
    "other log": replace_log,
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
async def test_a_start_finds_the_same_whatever_became_of_the_index(
    tmp_path: Path, disturbance: str
) -> None:
    folder = tmp_path / "log"
    await write(folder, 40, SMALL)
    done = DISTURBANCES[disturbance](folder)
    if done is not None:
        await done  # type: ignore[misc]
    without = copy(folder, tmp_path / "copy", index=False)
    expected = await recover(without)
    for _ in range(2):
        assert await recover(folder) == expected
    # Whatever was wrong, it is right now.
    sealed = list_segments(folder)[:-1]
    index = SegmentIndex(folder)
    assert [segment for segment in sealed if index.get(segment) is None] == []


@pytest.mark.parametrize("by", ["writer", "recovery"])
async def test_sealed_segments_are_read_from_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    await write(tmp_path, 40, SMALL)
    if by == "recovery":
        delete(tmp_path)
        await recover(tmp_path)
    scanned = []

    def note(folder: Path, segment: int) -> bytes:
        scanned.append(segment)
        return read_segment(folder, segment)

    monkeypatch.setattr(recovery, "read_segment", note)
    entries, _ = await recover(tmp_path)
    assert numbers(entries) == [*range(40)]
    assert scanned == list_segments(tmp_path)[-1:]


async def test_damage_stays_known_though_the_index_is_there(tmp_path: Path) -> None:
    locations = await write(tmp_path, 40, SMALL)
    delete(tmp_path)
    flip(segment_path(tmp_path, 2), locations[8].offset + 30)
    assert locations[8].segment == 2
    first = await recover(tmp_path)
    assert first[1].bad_ranges == [locations[8]]
    assert await recover(tmp_path) == first


async def test_a_folder_where_no_index_can_be_written_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    await write(tmp_path, 40, SMALL)
    entries, _ = await recover(tmp_path)
    assert numbers(entries) == [*range(40)]
