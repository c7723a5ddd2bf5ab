"""The writer: order, durability, limits, and what it does when the disk does not do its part."""

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import ROOT
from learner.log import committer
from learner.log.errors import BadEntryError, LogFailedError
from learner.log.segments import Location, list_segments, segment_path
from learner.log.writer import DurableLog
from log_helpers import (
    LIMITS,
    RUN,
    SMALL,
    Entries,
    numbers,
    open_log,
    payload,
    read,
    recover,
    step,
    stored,
    turns,
    write,
)
from understudy.errors import ConfigError


async def test_what_was_appended_is_read_before_and_after_it_is_durable(tmp_path: Path) -> None:
    log = await open_log(tmp_path, SMALL)
    locations = [log.append(stored(number), payload(number)) for number in range(9)]
    for _ in range(2):
        for number, location in enumerate(locations):
            entry, data = log.read(location)
            assert entry.trajectory_stored.origin.sequence == number
            assert data == payload(number)
        await log.flush()
        assert log.unsynced_bytes == 0
    await log.close()


async def test_indices_are_contiguous_over_segments_and_starts(tmp_path: Path) -> None:
    for _ in range(3):
        await write(tmp_path, 10, SMALL)
    entries, findings = read(tmp_path)
    assert [entry.index for entry, _ in entries] == list(range(len(entries)))
    assert findings.num_entries == len(entries)
    assert numbers(entries) == [*range(10)] * 3
    times = [entry.time_us for entry, _ in entries]
    assert times == sorted(times)


async def test_segments_begin_opened_end_sealed_and_keep_their_size(tmp_path: Path) -> None:
    await write(tmp_path, 40, SMALL)
    segments: dict[int, list[str | None]] = {}
    for entry, location in read(tmp_path)[0]:
        segments.setdefault(location.segment, []).append(entry.WhichOneof("event"))
        if entry.HasField("segment_opened"):
            assert entry.segment_opened.run_id == RUN
            assert entry.segment_opened.segment == location.segment
        if entry.HasField("segment_sealed"):
            assert entry.segment_sealed.num_entries == len(segments[location.segment]) - 1
    assert list(segments) == list(range(1, len(segments) + 1))
    assert len(segments) > 5
    assert {events[0] for events in segments.values()} == {"segment_opened"}
    assert {events[-1] for events in list(segments.values())[:-1]} == {"segment_sealed"}
    sizes = [segment_path(tmp_path, segment).stat().st_size for segment in segments]
    assert max(sizes) < SMALL.segment_bytes + 200  # an entry's meta, and the seal


async def test_a_payload_larger_than_a_segment_has_one_to_itself(tmp_path: Path) -> None:
    log = await open_log(tmp_path, SMALL)
    locations = [log.append(stored(number), bytes(5000)) for number in range(3)]
    await log.close()
    assert [location.segment for location in locations] == [1, 2, 3]
    assert numbers(read(tmp_path)[0]) == [0, 1, 2]


async def test_many_callers_share_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = await open_log(tmp_path)
    await log.flush()
    num_syncs = 0
    fdatasync = os.fdatasync

    def count(descriptor: int) -> None:
        nonlocal num_syncs
        num_syncs += 1
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", count)

    async def caller(number: int) -> None:
        log.append(stored(number), payload(number))
        await log.flush()

    await asyncio.gather(*(caller(number) for number in range(2000)))
    assert num_syncs <= 3
    await log.close()
    assert numbers(read(tmp_path)[0]) == [*range(2000)]


async def test_flush_returns_after_fdatasync_of_all_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await open_log(tmp_path, SMALL)
    synced: dict[str, int] = {}
    fdatasync = os.fdatasync

    def note(descriptor: int) -> None:
        fdatasync(descriptor)
        synced[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fdatasync", note)

    async def caller(first: int) -> None:
        for number in range(first, first + 20):
            location = log.append(stored(number), payload(number))
            await log.flush()
            path = segment_path(tmp_path, location.segment)
            assert synced[str(path)] >= location.offset + location.num_bytes

    await asyncio.gather(*(caller(first) for first in range(0, 100, 20)))
    await log.close()


async def test_a_segment_is_durable_before_the_next_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    kinds = {"fdatasync": os.fdatasync, "fsync": os.fsync, "pwritev": os.pwritev}
    for kind, call in kinds.items():

        def note(descriptor: int, *rest: object, kind: str = kind, call: object = call) -> object:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            calls.append((kind, Path(path).name))
            return call(descriptor, *rest)  # type: ignore[operator]

        monkeypatch.setattr(os, kind, note)
    log = await open_log(tmp_path / "log", SMALL)
    await log.flush()
    calls.clear()
    while log.num_segments < 2:
        log.append(stored(0), payload(0))
    await log.close()
    first, second = (segment_path(tmp_path, segment).name for segment in (1, 2))
    assert calls == [
        ("pwritev", first),
        ("fdatasync", first),
        ("fsync", "log"),
        ("pwritev", second),
        ("fdatasync", second),
    ]


async def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = os.pwritev

    def short(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        data = b"".join(views)
        return pwritev(descriptor, [data[: max(len(data) * 2 // 3, 1)]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    await write(tmp_path, 2000)
    assert numbers(read(tmp_path)[0]) == [*range(2000)]


async def test_room_waits_for_a_full_buffer(tmp_path: Path) -> None:
    log = await open_log(tmp_path, replace(LIMITS, buffer_bytes=1000))
    await asyncio.wait_for(log.room(), 5)
    for number in range(10):
        log.append(stored(number), payload(number))
    waiting = asyncio.create_task(log.room())
    await turns(1)
    assert not waiting.done()
    await log.flush()
    await asyncio.wait_for(waiting, 5)
    await log.close()


async def test_room_waits_for_the_quota_and_entries_without_payload_do_not(tmp_path: Path) -> None:
    log = await open_log(tmp_path, replace(SMALL, quota_bytes=3000))
    while not log.throttled:
        log.append(stored(0), payload(0))
    assert log.throttled == "quota"
    assert 3000 <= log.num_bytes < 3500
    waiting = asyncio.create_task(log.room())
    log.append(step(1))
    await log.flush()
    assert not waiting.done()
    log.resized(-1000)  # as retention does
    await asyncio.wait_for(waiting, 5)
    assert log.throttled == ""
    await log.close()


# When the disk is full.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("NOT TESTED: a full disk; only root may mount a small one")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "_RETRY_SECONDS", 0.02)


@pytest.mark.usefixtures("_impatient")
async def test_all_that_found_no_space_is_there_once_there_is(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3 * 2**19))
    log = await open_log(small_disk / "log", replace(LIMITS, segment_bytes=2**18))
    locations = [log.append(stored(number), bytes(2**15)) for number in range(30)]
    flush = asyncio.create_task(log.flush())
    await asyncio.sleep(0.2)
    assert log.throttled == "no space"
    room = asyncio.create_task(log.room())
    locations.append(log.append(stored(30), bytes(2**15)))
    await asyncio.sleep(0.1)
    assert not flush.done()
    assert not room.done()
    assert log.read(locations[29])[1] == bytes(2**15)
    ballast.unlink()
    await asyncio.wait_for(asyncio.gather(flush, room), 10)
    assert log.throttled == ""
    assert [len(log.read(location)[1]) for location in locations] == [2**15] * 31
    await log.close()
    entries, findings = read(small_disk / "log")
    assert numbers(entries) == [*range(31)]
    assert (findings.torn_bytes, findings.bad_ranges) == (0, [])


@pytest.mark.usefixtures("_impatient")
async def test_a_full_disk_keeps_nobody_from_ending(small_disk: Path) -> None:
    log = await open_log(small_disk)
    log.append(stored(0), bytes(2**19))
    await log.flush()
    for number in range(1, 6):
        log.append(stored(number), bytes(2**19))
    await asyncio.sleep(0.1)
    assert log.throttled == "no space"
    await asyncio.wait_for(log.close(), 10)
    assert "ENOSPC" in log.failed
    entries, findings = read(small_disk)
    assert numbers(entries) == [0]
    assert findings.torn_bytes == 0


# When the disk fails.


@pytest.mark.parametrize("call", ["fdatasync", "pwritev"])
async def test_a_disk_error_ends_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    log = await open_log(tmp_path)
    await log.flush()
    failing = asyncio.create_task(log.wait_failed())
    num_calls = 0

    def fail(*arguments: object) -> None:
        nonlocal num_calls
        num_calls += 1
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    log.append(stored(0), payload(0))
    room = asyncio.create_task(log.room())
    line = (
        f"{segment_path(tmp_path, 1)}: EIO (Input/output error); nothing more is stored; check "
        "the disk, or move the run to another, then start the intake again"
    )
    with pytest.raises(LogFailedError) as raised:
        await asyncio.wait_for(log.flush(), 5)
    assert str(raised.value) == log.failed == line
    monkeypatch.undo()  # the disk is well again, as after an error that is reported only once
    with pytest.raises(LogFailedError):
        log.append(stored(1))
    with pytest.raises(LogFailedError):
        await log.flush()
    with pytest.raises(LogFailedError):
        await log.room()
    with pytest.raises(LogFailedError):
        await asyncio.wait_for(failing, 5)
    await room
    assert num_calls == 1
    await log.close()


async def test_a_mistake_of_ours_leaves_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await open_log(tmp_path)
    await log.flush()
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: 1 / 0)
    log.append(stored(0))
    with pytest.raises(LogFailedError, match="ZeroDivisionError"):
        await asyncio.wait_for(log.flush(), 5)
    await log.close()


async def test_a_damaged_or_wrong_place_is_no_entry(tmp_path: Path) -> None:
    log = await open_log(tmp_path)
    location = log.append(stored(0), payload(0))
    await log.flush()
    for wrong in (
        location._replace(offset=location.offset + 1),
        location._replace(num_bytes=location.num_bytes - 1),
        location._replace(num_bytes=location.num_bytes + 1),
        Location(1, 2**40, 100),
    ):
        with pytest.raises(BadEntryError, match="audit"):
            log.read(wrong)
    await log.close()


async def test_few_files_stay_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    log = await open_log(tmp_path, replace(SMALL, segment_bytes=100))
    locations = [log.append(stored(number), payload(number)) for number in range(100)]
    await log.flush()
    assert log.num_segments == 100
    for _ in range(2):
        for number, location in enumerate(locations):
            assert log.read(location)[1] == payload(number)
    assert len(os.listdir("/proc/self/fd")) < before + 25
    await log.close()
    assert len(os.listdir("/proc/self/fd")) == before


# Who may write.


async def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=60
    )


async def test_a_second_process_is_refused_by_name(tmp_path: Path) -> None:
    log = await open_log(tmp_path)
    code = (
        "import asyncio, sys; sys.path += ['tests', '.']; from pathlib import Path\n"
        "from log_helpers import open_log\n"
        "try: asyncio.run(open_log(Path(sys.argv[1])))\n"
        "except Exception as error: sys.exit(f'{type(error).__name__}: {error}')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = await run(command)
    assert done.stderr.strip() == (
        f"ConfigError: run.name = 'test': another intake (pid {os.getpid()}) serves this run from "
        f"{tmp_path}; stop it, or choose another name"
    )
    await log.close()
    done = await run(command)
    assert done.returncode == 0, done.stderr


async def test_the_log_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    await write(tmp_path, 3)
    before = segment_path(tmp_path, 1).read_bytes()
    with pytest.raises(ConfigError, match="run 'test'"):
        await DurableLog.open(tmp_path, "other", LIMITS, lambda entry, location: None)
    assert segment_path(tmp_path, 1).read_bytes() == before
    entries: Entries = []
    log = await open_log(tmp_path, entries=entries)  # the refusal let go of the lock
    assert numbers(entries) == [0, 1, 2]
    await log.close()


async def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogFailedError, match="ENOTDIR"):
        await open_log(tmp_path / "file" / "log")


async def test_an_empty_log_is_one_opened_segment(tmp_path: Path) -> None:
    await write(tmp_path / "run" / "log", 0)
    await write(tmp_path / "run" / "log", 0)
    entries, _ = await recover(tmp_path / "run" / "log")
    assert [entry.WhichOneof("event") for entry, _ in entries] == ["segment_opened"]
    assert list_segments(tmp_path / "run" / "log") == [1]
