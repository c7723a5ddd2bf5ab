"""The intake on a disk that is full, or that fails."""

import asyncio
import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from intake_rig import make_config, make_record, running, trajectory
from learner.audit import audit_run
from learner.intake.journal import Journal
from learner.intake.server import IntakeServer
from learner.log.errors import LogFailedError
from learner.log.reader import LogReader
from learner.replay.recorded import RecordedBatches
from understudy.errors import ConfigError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk: the intake on a full disk was NOT tested")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_full_disk_stops_acks_and_credits_until_there_is_room(small_disk: Path) -> None:
    config = make_config(small_disk)
    async with running(config) as rig:
        leases = await rig.lease(4)
        ballast = small_disk / "ballast"
        fill(ballast)
        async with rig.pusher() as pusher:
            for lease in leases:
                await pusher.send(make_record(lease, trajectory(lease, num_tokens=4000)))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pusher.acked(), 1.0)
            assert rig.intake.log.throttled == "no space"
            async with rig.pusher(actor_id="late") as late:
                assert late.welcome.credits.records == 0
                ballast.unlink()
                assert (await asyncio.wait_for(late.read(), 5)).ack.credits.records > 0
        async with rig.pusher() as pusher:  # whether or not the first acks came, a resend is none
            for lease in leases:
                await pusher.send(make_record(lease, trajectory(lease, num_tokens=4000)))
            assert await asyncio.wait_for(pusher.acked(), 5.0) == []
        header, items = await rig.batch(0)
        assert header.num_trajectories == len(items) == 4
    report = audit_run(config.run.path)
    assert report.passed, report


async def test_a_disk_that_fails_ends_the_intake_without_an_ack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path)
    async with running(config) as rig:
        leases = await rig.lease(4)
        watching = asyncio.create_task(rig.server.drained())
        monkeypatch.setattr(os, "fdatasync", _fail)
        async with rig.pusher() as pusher:
            await pusher.send(make_record(leases[0], trajectory(leases[0])))
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await pusher.acked()
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(LogFailedError, match="EIO .*nothing more is stored; check the disk"):
            await asyncio.wait_for(watching, 5)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await rig.lease(1)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        monkeypatch.undo()
    async with running(config) as rig:  # started again, as people do once the disk is well
        assert rig.intake.balance().holds
    assert audit_run(config.run.path).passed


def fill(path: Path) -> None:
    """Take all room that is left."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(descriptor, bytes(4096))
    os.close(descriptor)


def _fail(descriptor: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


async def test_a_log_that_lost_an_entry_is_refused_by_name(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config) as rig:
        await rig.play(await rig.lease())
        await rig.batch(0)
        place = rig.intake.state.batches[0].episodes[0].location
    segment = config.run.path / "log" / "000000000001.seg"
    data = bytearray(segment.read_bytes())
    data[place.offset + place.num_bytes // 2] ^= 1
    segment.write_bytes(data)
    with pytest.raises(ConfigError, match="the log is damaged: entry .* does not follow.*audit"):
        await IntakeServer.open(config)
    with pytest.raises(ConfigError, match="the log is damaged: entry .* does not follow.*audit"):
        RecordedBatches(config, LogReader(config.run.path / "log"), Journal(tmp_path / "replay"))
    assert not audit_run(config.run.path).passed


async def test_a_record_that_is_damaged_on_disk_is_data_loss(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config) as rig:
        await rig.play(await rig.lease())
        await rig.batch(0)
        place = rig.intake.state.batches[0].episodes[0].location
        descriptor = os.open(config.run.path / "log" / "000000000001.seg", os.O_RDWR)
        os.pwrite(descriptor, b"\xff\xff", place.offset + place.num_bytes - 9)
        os.close(descriptor)
        with pytest.raises(grpc.aio.AioRpcError, match="audit the run") as error:
            await rig.batch(0)
        assert error.value.code() is grpc.StatusCode.DATA_LOSS
