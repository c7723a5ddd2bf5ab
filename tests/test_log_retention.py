"""Retention: payloads go, entries stay, and every state on the way is a log."""

import asyncio
import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from learner.log import segments
from learner.log.errors import BadEntryError, LogFailedError
from learner.log.index import SegmentIndex
from learner.log.retention import trim_segment
from learner.log.segments import Location, segment_path
from learner.log.writer import DurableLog
from log_helpers import (
    SMALL,
    copy,
    flip,
    numbers,
    open_log,
    payload,
    read,
    recover,
    step,
    stored,
)
from understudy.v1.log_pb2 import LogEntry

LARGE = replace(SMALL, segment_bytes=4000)


def even(entry: LogEntry) -> bool:
    return entry.trajectory_stored.origin.sequence % 2 == 0


async def written(folder: Path) -> tuple[DurableLog, list[Location]]:
    """A log of three segments."""
    log = await open_log(folder, LARGE)
    locations: list[Location] = []
    while log.num_segments < 3:
        locations.append(log.append(stored(len(locations)), payload(len(locations))))
        log.append(step(0))
    await log.flush()
    return log, locations


async def test_trimmed_payloads_go_and_all_else_stays(tmp_path: Path) -> None:
    log, locations = await written(tmp_path)
    num_bytes = log.num_bytes
    before = read(tmp_path)[0]
    moved = await trim_segment(log, 1, even)
    after, findings = read(tmp_path)
    assert numbers(after) == numbers(before)
    assert (findings.bad_ranges, findings.num_missing) == ([], 0)
    assert log.num_bytes == findings.num_bytes < num_bytes
    new = {entry.index: (entry, location) for entry, location in after}
    for entry, location in before:
        now, at = new[entry.index]
        assert at == (moved[location.offset] if location.segment == 1 else location)
        assert (now.time_us, now.WhichOneof("event")) == (entry.time_us, entry.WhichOneof("event"))
    for number, location in enumerate(locations):
        location = moved[location.offset] if location.segment == 1 else location
        entry, data = log.read(location)
        gone = number % 2 == 0 and location.segment == 1
        assert entry.trajectory_stored.origin.sequence == number
        assert entry.trimmed_bytes == (len(payload(number)) if gone else 0)
        assert data == (b"" if gone else payload(number))
    await log.close()
    assert await recover(copy(tmp_path, tmp_path / "copy", index=False)) == (after, findings)
    assert await recover(tmp_path) == (after, findings)
    assert SegmentIndex(tmp_path).get(1) is not None


async def test_trimming_again_changes_nothing(tmp_path: Path) -> None:
    log, _ = await written(tmp_path)
    assert await trim_segment(log, 1, even)
    before = segment_path(tmp_path, 1).read_bytes()
    assert await trim_segment(log, 1, even) == {}
    assert segment_path(tmp_path, 1).read_bytes() == before
    assert await trim_segment(log, 1, lambda entry: True)
    assert len(segment_path(tmp_path, 1).read_bytes()) < len(before)
    await log.close()


async def test_only_a_segment_that_is_sealed_for_good_may_be_trimmed(tmp_path: Path) -> None:
    log = await open_log(tmp_path, LARGE)
    while log.num_segments < 2:
        log.append(stored(0), payload(0))
    assert [log.is_sealed(segment) for segment in (0, 1, 2)] == [False] * 3
    await log.flush()
    assert [log.is_sealed(segment) for segment in (0, 1, 2)] == [False, True, False]
    await log.close()
    log = await open_log(tmp_path, LARGE)
    assert [log.is_sealed(segment) for segment in (0, 1, 2)] == [False, True, False]
    await log.close()


async def test_old_places_are_read_until_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_MAX_OPEN_FILES", 1)
    log, locations = await written(tmp_path)
    trimming = asyncio.create_task(trim_segment(log, 1, even))
    num_reads = 0
    while not trimming.done():
        for number, location in enumerate(locations):  # of both segments: files come and go
            assert log.read(location)[1] == payload(number)
            num_reads += 1
        await asyncio.sleep(0)
    assert num_reads > len(locations)
    with pytest.raises(BadEntryError):
        log.read(locations[5])
    assert log.read(trimming.result()[locations[5].offset])[1] == payload(5)
    await log.close()


@pytest.mark.parametrize("call", ["fsync", "replace"])
async def test_a_crash_leaves_the_old_segment_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    folder = tmp_path / "log"
    log, _ = await written(folder)
    states: list[Path] = []
    original = getattr({"fsync": os, "replace": Path}[call], call)

    def snapshot(*arguments: object) -> object:
        states.append(copy(folder, tmp_path / f"before-{len(states)}"))
        done = original(*arguments)
        states.append(copy(folder, tmp_path / f"after-{len(states)}"))
        return done

    monkeypatch.setattr({"fsync": os, "replace": Path}[call], call, snapshot)
    before = numbers(read(folder)[0])
    await trim_segment(log, 1, even)
    monkeypatch.undo()
    assert len(states) == {"fsync": 4, "replace": 2}[call]
    for state in states:
        entries, findings = await recover(state)
        assert numbers(entries) == before
        assert (findings.bad_ranges, findings.num_missing, findings.torn_bytes) == ([], 0, 0)
    await log.close()


async def test_the_new_segment_is_durable_before_it_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = await written(tmp_path)
    calls = []
    fsync, rename = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(path: Path, to: Path) -> Path:
        calls.append("rename")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_rename)
    await trim_segment(log, 1, even)
    assert calls == ["000000000001.seg.new", "rename", tmp_path.name]
    await log.close()


async def test_a_damaged_segment_is_left_as_it_is(tmp_path: Path) -> None:
    log, locations = await written(tmp_path)
    flip(segment_path(tmp_path, 1), locations[3].offset + 50)
    before = segment_path(tmp_path, 1).read_bytes()
    assert await trim_segment(log, 1, even) == {}
    assert segment_path(tmp_path, 1).read_bytes() == before
    await log.close()


@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
async def test_what_cannot_be_rewritten_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    log, locations = await written(tmp_path)
    before = segment_path(tmp_path, 1).read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(getattr(errno, code), code)

    monkeypatch.setattr(os, "fsync", fail)
    if code == "ENOSPC":
        assert await trim_segment(log, 1, even) is None
        assert log.failed == ""
    else:
        with pytest.raises(LogFailedError, match="seg.new: EIO"):
            await trim_segment(log, 1, even)
    monkeypatch.undo()
    assert segment_path(tmp_path, 1).read_bytes() == before
    assert log.read(locations[3])[1] == payload(3)
    assert not segment_path(tmp_path, 1).with_suffix(".seg.new").exists()
    await log.close()


async def test_retention_makes_room(tmp_path: Path) -> None:
    log, _ = await written(tmp_path)
    await log.close()
    log = await open_log(tmp_path, replace(LARGE, quota_bytes=log.num_bytes))
    assert log.throttled == "quota"
    waiting = asyncio.create_task(log.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    await trim_segment(log, 1, even)
    await asyncio.wait_for(waiting, 5)
    assert log.throttled == ""
    await log.close()
