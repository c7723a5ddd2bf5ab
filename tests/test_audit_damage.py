"""The audit of damaged files: what a crash leaves passes, all else is found and placed."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from audit_rules import BROKEN, found
from audit_story import healthy, write
from learner.audit import Rule, audit_run
from learner.log.frames import Frame, encode_head, scan
from learner.log.segments import segment_path
from log_helpers import cut, flip
from understudy.v1.log_pb2 import LogEntry


def zero(path: Path) -> None:
    """A sector that reads as zeros."""
    data = bytearray(path.read_bytes())
    data[600:1112] = bytes(512)
    path.write_bytes(data)


def unseal(path: Path) -> None:
    """The last entry of a sealed segment is gone."""
    data = path.read_bytes()
    cut(path, data.rfind(b"USL1"))


def relabel(path: Path) -> None:
    """A segment under a later number than its own."""
    path.rename(path.with_name(f"{int(path.stem) + 7:012d}.seg"))


DAMAGE: dict[str, tuple[int, Rule, Callable[[Path], None]]] = {
    "flipped byte of a payload": (2, Rule.DAMAGE, lambda path: flip(path, 700)),
    "flipped byte of a first entry": (2, Rule.DAMAGE, lambda path: flip(path, 20)),
    "flipped byte of a seal": (2, Rule.DAMAGE, lambda path: flip(path, -3)),
    "zeros": (2, Rule.DAMAGE, zero),
    "shortened segment": (2, Rule.DAMAGE, lambda path: cut(path, 300)),
    "missing segment": (2, Rule.DAMAGE, Path.unlink),
    "missing first segment": (1, Rule.DAMAGE, Path.unlink),
    "no seal": (2, Rule.SEGMENT, unseal),
    "renumbered segment": (3, Rule.SEGMENT, relabel),
    "empty segment": (2, Rule.DAMAGE, lambda path: cut(path, 0)),
}


@pytest.mark.parametrize("name", DAMAGE)
async def test_damage_is_found(name: str, tmp_path: Path) -> None:
    segment, rule, spoil = DAMAGE[name]
    run = await write(tmp_path, list(healthy().values()), segment_bytes=2500)
    assert len(list((run / "log").glob("*.seg"))) > 3
    assert audit_run(run).passed
    path = segment_path(run / "log", segment)
    if name == "flipped byte of a seal":
        flip(path, path.stat().st_size - 3)
    else:
        spoil(path)
    report = audit_run(run)
    assert not report.passed
    assert rule in found(report)


async def test_any_flipped_byte_of_a_sealed_segment_is_found(tmp_path: Path) -> None:
    run = await write(tmp_path, list(healthy().values()), segment_bytes=2500)
    path = segment_path(run / "log", 2)
    for offset in random.Random(0).sample(range(path.stat().st_size), 60):
        flip(path, offset)
        report = audit_run(run)
        assert not report.passed, offset
        assert report.quarantined_bytes, offset
        flip(path, offset)
    assert audit_run(run).passed


@pytest.mark.parametrize("tail", [b"USL1", b"\0" * 512, b"USL1" + bytes([200, 0, 0, 0] * 30)])
async def test_a_torn_tail_is_no_fault(tail: bytes, tmp_path: Path) -> None:
    run = await write(tmp_path, list(healthy().values()))
    path = segment_path(run / "log", 1)
    with path.open("ab") as file:
        file.write(tail)
    report = audit_run(run)
    assert report.passed
    assert report.torn_bytes == len(tail)


async def test_any_beginning_of_a_log_passes(tmp_path: Path) -> None:
    run = await write(tmp_path, list(healthy().values()))
    path = segment_path(run / "log", 1)
    for size in random.Random(1).sample(range(1, path.stat().st_size), 60)[::-1]:
        whole = path.read_bytes()
        cut(path, size)
        assert audit_run(run).passed, size
        path.write_bytes(whole)


async def test_a_segment_of_another_run_is_found(tmp_path: Path) -> None:
    run = await write(tmp_path / "a", list(healthy().values()), segment_bytes=2500)
    path = segment_path(run / "log", 2)
    data = path.read_bytes()
    opened = next(iter_entries(data))
    opened.segment_opened.run_id = "evil"
    path.write_bytes(encode_head(opened, b"") + data[data.index(b"USL1", 1) :])
    assert Rule.SEGMENT in found(audit_run(run))


def iter_entries(data: bytes) -> Iterator[LogEntry]:
    for frame in scan(data, lambda entry, num_bad_bytes: True):
        if isinstance(frame, Frame):
            yield frame.entry


async def test_an_event_that_is_not_known_is_found(tmp_path: Path) -> None:
    report = audit_run(await write(tmp_path, [*healthy().values(), LogEntry()]))
    assert found(report) == {Rule.DAMAGE}


async def test_a_violation_names_its_place(tmp_path: Path) -> None:
    run = await write(tmp_path, list(BROKEN["doubled step"].apply()))
    (violation,) = audit_run(run).violations
    assert violation.place
    with segment_path(run / "log", 1).open("rb") as file:
        file.seek(violation.place.offset)
        assert file.read(4) == b"USL1"
    assert str(violation) == (
        f"entry 17, segment 1, offset {violation.place.offset}: [batch] step 0, where 1 was next"
    )
