"""Recovery: what a start makes of every state that a crash or a bad disk can leave."""

import logging
import os
import shutil
from pathlib import Path

import pytest

from learner.log.frames import encode_head
from learner.log.reader import LogReader
from learner.log.segments import Location, list_segments, segment_path
from log_helpers import (
    SMALL,
    Entries,
    copy,
    cut,
    flip,
    numbers,
    open_log,
    payload,
    read,
    recover,
    stored,
    write,
)


async def test_a_torn_tail_is_cut_off_wherever_the_last_frame_was_torn(tmp_path: Path) -> None:
    locations = await write(tmp_path / "log", 4)
    last = locations[-1]
    whole = segment_path(tmp_path / "log", 1).read_bytes()
    folder = tmp_path / "torn"
    folder.mkdir()
    path = segment_path(folder, 1)
    for end in range(last.offset, last.offset + last.num_bytes):
        path.write_bytes(whole[:end])
        assert numbers(read(folder)[0]) == [0, 1, 2]
        entries, findings = await recover(folder)
        assert numbers(entries) == [0, 1, 2]
        assert findings.torn_bytes == end - last.offset
        assert (findings.bad_ranges, findings.num_missing) == ([], 0)
        assert path.read_bytes() == whole[: last.offset]


async def test_a_torn_tail_of_zeros_or_of_anything_is_cut_off(tmp_path: Path) -> None:
    for number, junk in enumerate((bytes(5000), b"USL1", b"USL1" * 1000, b"\xff" * 100)):
        folder = tmp_path / str(number)
        await write(folder, 4)
        with segment_path(folder, 1).open("ab") as file:
            file.write(junk)
        _, findings = await recover(folder)
        assert findings.torn_bytes == len(junk)
        assert (await recover(folder))[1].torn_bytes == 0


async def test_what_is_appended_after_a_torn_tail_follows_without_a_gap(tmp_path: Path) -> None:
    *_, last = await write(tmp_path, 4)
    cut(segment_path(tmp_path, 1), last.offset + 5)
    await write(tmp_path, 2)
    entries, findings = read(tmp_path)
    assert numbers(entries) == [0, 1, 2, 0, 1]
    assert [entry.index for entry, _ in entries] == list(range(6))
    assert (findings.torn_bytes, findings.num_missing) == (0, 0)


async def test_what_a_killed_process_wrote_is_on_disk_before_it_is_acted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locations = await write(tmp_path, 10, SMALL)
    calls = []
    fsync, fadvise = os.fsync, os.posix_fadvise

    def note_fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def note_fadvise(descriptor: int, offset: int, num_bytes: int, advice: int) -> None:
        calls.append(("forget", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fadvise(descriptor, offset, num_bytes, advice)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "posix_fadvise", note_fadvise)
    await recover(tmp_path)
    newest = segment_path(tmp_path, locations[-1].segment).name
    assert calls == [("fsync", newest), ("forget", newest), ("fsync", tmp_path.name)]


@pytest.mark.parametrize("segment", ["sealed", "newest"])
async def test_damage_in_the_middle_costs_one_entry_and_an_alarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, segment: str
) -> None:
    limits = {"sealed": SMALL, "newest": None}[segment]
    locations = await (write(tmp_path, 20, limits) if limits else write(tmp_path, 20))
    for part in (0, 5, 9, 13, 20, 60):  # magic, both lengths, checksum, meta, payload
        bad = locations[2]
        folder = copy(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{part}"), index=False)
        flip(segment_path(folder, bad.segment), bad.offset + part)
        damaged = segment_path(folder, bad.segment).read_bytes()
        for _ in range(2):  # the alarm is raised at every start
            caplog.clear()
            entries, findings = await recover(folder)
            assert numbers(entries) == [0, 1, *range(3, 20)]
            assert findings.bad_ranges == [bad]
            assert (findings.num_missing, findings.torn_bytes) == (1, 0)
            assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
        assert read(folder)[1] == findings
        assert segment_path(folder, bad.segment).read_bytes() == damaged
        (copied,) = (folder / "quarantine").iterdir()
        assert copied.name == f"{bad.segment:012d}-{bad.offset}.bin"
        assert copied.read_bytes() == damaged[bad.offset : bad.offset + bad.num_bytes]


async def test_a_damaged_log_goes_on(tmp_path: Path) -> None:
    locations = await write(tmp_path, 5)
    flip(segment_path(tmp_path, 1), locations[1].offset + 30)
    await write(tmp_path, 20, SMALL)  # ends the damaged segment with a seal
    entries, findings = await recover(tmp_path)
    assert numbers(entries) == [0, 2, 3, 4, *range(20)]
    assert (findings.bad_ranges, findings.num_missing) == ([locations[1]], 1)


async def test_a_bad_end_of_a_sealed_segment_is_damage(tmp_path: Path) -> None:
    locations = await write(tmp_path, 10, SMALL)
    last = [location for location in locations if location.segment == 1][-1]
    (tmp_path / "index.sqlite").unlink()
    cut(segment_path(tmp_path, 1), last.offset + 9)
    entries, findings = await recover(tmp_path)
    assert numbers(entries) == [n for n in range(10) if locations[n] != last]
    assert findings.bad_ranges == [Location(1, last.offset, 9)]
    assert (findings.num_missing, findings.torn_bytes) == (2, 0)  # with the seal


async def test_a_missing_seal_or_segment_costs_only_what_was_there(tmp_path: Path) -> None:
    locations = await write(tmp_path, 30, SMALL)
    index = {location: entry.index for entry, location in read(tmp_path)[0]}
    in_first = [location for location in locations if location.segment == 1]
    end = in_first[-1].offset + in_first[-1].num_bytes
    unsealed = copy(tmp_path, tmp_path.with_name(f"{tmp_path.name}-unsealed"))
    cut(segment_path(unsealed, 1), end)
    entries, findings = await recover(unsealed)
    assert numbers(entries) == [*range(30)]
    assert (findings.bad_ranges, findings.num_missing) == ([], 1)
    segment_path(tmp_path, 2).unlink()
    entries, findings = await recover(tmp_path)
    assert numbers(entries) == [n for n in range(30) if locations[n].segment != 2]
    in_second = [index[location] for location in locations if location.segment == 2]
    assert findings.num_missing == len(in_second) + 2  # opened, sealed
    await write(tmp_path, 1, SMALL)
    assert read(tmp_path)[1].num_missing == findings.num_missing


async def test_frames_that_a_payload_pretends_to_hold_shut_nothing_out(tmp_path: Path) -> None:
    log = await open_log(tmp_path)
    fakes = []
    for index in (0, 1, 2**40, 2**64 - 1):
        fake = stored(666)
        fake.index = index
        fakes.append(encode_head(fake, b""))
    location = log.append(stored(0), b"".join(fakes))
    for number in range(1, 4):
        log.append(stored(number), payload(number))
    await log.close()
    assert numbers((await recover(tmp_path))[0]) == [0, 1, 2, 3]
    flip(segment_path(tmp_path, 1), location.offset + 5)
    entries, findings = await recover(tmp_path)
    # One made-up entry, with the lost one's number, cannot be told from a true one.
    assert numbers(entries) == [666, 1, 2, 3]
    assert findings.bad_ranges != []


# A crash while one segment ends and the next begins.


async def crash_at_roll(folder: Path, keep: int) -> tuple[Entries, list[int]]:
    """What is recovered if only `keep` bytes of the second segment came to be; -1: not its name."""
    locations = await write(folder, 8, SMALL)
    assert locations[-1].segment == 2
    for segment in list_segments(folder)[2:]:
        segment_path(folder, segment).unlink()
    if keep < 0:
        segment_path(folder, 2).unlink()
    else:
        cut(segment_path(folder, 2), keep)
    first = [n for n in range(8) if locations[n].segment == 1]
    entries, findings = await recover(folder)
    assert (findings.bad_ranges, findings.num_missing) == ([], 0)
    assert findings.torn_bytes == max(keep, 0)
    return entries, first


@pytest.mark.parametrize("keep", [-1, 0, 1, 16, 20])
async def test_a_segment_that_was_not_begun_is_begun_again(tmp_path: Path, keep: int) -> None:
    entries, first = await crash_at_roll(tmp_path, keep)
    assert numbers(entries) == first
    assert list_segments(tmp_path) == [1]
    await write(tmp_path, 3, SMALL)
    entries, findings = read(tmp_path)
    assert numbers(entries) == [*first, 0, 1, 2]
    assert [entry.index for entry, _ in entries] == list(range(len(entries)))
    assert (findings.bad_ranges, findings.num_missing, findings.torn_bytes) == ([], 0, 0)
    assert list_segments(tmp_path) == [1, 2]


async def test_a_first_segment_that_was_not_begun_is_begun_again(tmp_path: Path) -> None:
    for keep in (0, 10):
        await write(tmp_path, 0)
        cut(segment_path(tmp_path, 1), keep)
        entries, _ = await recover(tmp_path)
        assert entries == []
        assert list_segments(tmp_path) == []


async def test_what_a_rewrite_left_is_removed(tmp_path: Path) -> None:
    await write(tmp_path, 10, SMALL)
    new = segment_path(tmp_path, 1).with_suffix(".seg.new")
    new.write_bytes(b"half")
    assert numbers((await recover(tmp_path))[0]) == [*range(10)]
    assert not new.exists()


# The reader.


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir()}


async def test_the_reader_writes_nothing_and_tolerates_a_torn_tail(tmp_path: Path) -> None:
    locations = await write(tmp_path, 10, SMALL)
    flip(segment_path(tmp_path, 1), locations[1].offset + 30)
    cut(segment_path(tmp_path, locations[-1].segment), locations[-1].offset + 3)
    before = contents(tmp_path)
    reader = LogReader(tmp_path)
    for _ in range(2):
        assert numbers(reader) == [0, *range(2, 9)]
        assert reader.findings.bad_ranges == [locations[1]]
        assert reader.findings.torn_bytes == 3
    assert reader.read(locations[2])[1] == payload(2)
    reader.close()
    assert contents(tmp_path) == before


async def test_the_reader_reads_while_the_log_is_written(tmp_path: Path) -> None:
    log = await open_log(tmp_path, SMALL)
    for number in range(50):
        log.append(stored(number), payload(number))
        await log.flush()
        entries, findings = read(tmp_path)
        assert numbers(entries) == [*range(number + 1)]
        assert (findings.bad_ranges, findings.num_missing, findings.torn_bytes) == ([], 0, 0)
    await log.close()


def test_the_reader_of_nothing_reads_nothing(tmp_path: Path) -> None:
    entries, findings = read(tmp_path / "none")
    assert (entries, findings.num_entries) == ([], 0)


async def test_a_copy_is_as_good_as_the_log(tmp_path: Path) -> None:
    await write(tmp_path / "log", 20, SMALL)
    shutil.copytree(tmp_path / "log", tmp_path / "copy")
    assert await recover(tmp_path / "copy") == await recover(tmp_path / "log")
