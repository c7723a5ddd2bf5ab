"""Ranks of a trainer that are there, leave, are followed by others, or stand still."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import grpc
import pytest

from intake_rig import Rig, make_config, running
from learner.trainer.attendance import Attendance
from learner.trainer.ranks import Ranks
from understudy import metrics
from understudy.rpc import error_reason
from understudy.v1 import batch_pb2

RANK = """
import sys, time
from types import SimpleNamespace
from learner.trainer.attendance import Attendance
from understudy.config import NetworkConfig
from understudy.rpc import open_sync_channel

address, epoch, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
channel = open_sync_channel(address, NetworkConfig())
Attendance(channel, epoch, SimpleNamespace(rank=rank, world_size=2))
time.sleep(300)
"""
LOST = "trainer rank {} of 2 (epoch 1) does not answer"


def num_present() -> int:
    return int(metrics.TRAINER_RANKS._value.get())


async def seen(condition: Callable[[], bool], seconds: float = 60.0) -> float:
    """Seconds until it held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds
        await asyncio.sleep(0.05)
    return time.monotonic() - start


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """An intake with a trainer of epoch 1."""
    async with running(make_config(tmp_path)) as rig:
        assert rig.epoch == 1
        yield rig


@contextlib.contextmanager
def a_rank(address: str, rank: int, epoch: int = 1):  # type: ignore[no-untyped-def]
    """A process that attends, and does nothing else."""
    words = [sys.executable, "-c", RANK, address, str(epoch), str(rank)]
    process = subprocess.Popen(words)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_a_rank_that_stands_still_is_noticed_and_comes_back(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    with a_rank(rig.address, 0), a_rank(rig.address, 1) as process:
        await seen(lambda: num_present() == 2)
        process.send_signal(signal.SIGSTOP)
        await seen(lambda: num_present() == 1)
        assert LOST.format(1) in caplog.text
        process.send_signal(signal.SIGCONT)
        await seen(lambda: num_present() == 2)
        assert process.poll() is None
        process.kill()
        await seen(lambda: num_present() == 1)
    assert caplog.text.count(LOST.format(1)) == 2


async def test_a_rank_that_leaves_is_not_missed(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with grpc.insecure_channel(rig.address) as channel:
        ranks = cast("Ranks", type("Two", (), {"rank": 1, "world_size": 2}))
        attendance = Attendance(channel, rig.epoch, ranks)
        await seen(lambda: num_present() == 1)
        await asyncio.to_thread(attendance.close)
        await seen(lambda: num_present() == 0)
    assert "does not answer" not in caplog.text


async def test_a_rank_of_an_earlier_trainer_is_not_missed(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    with a_rank(rig.address, 0):
        await seen(lambda: num_present() == 1)
        await rig.train()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await attend(rig, epoch=1, rank=0, world_size=2)
    assert error_reason(refused.value) == "OLD_EPOCH"
    assert "does not answer" not in caplog.text


async def test_a_rank_that_cannot_be_is_refused(rig: Rig) -> None:
    for fields in ({"rank": 2, "world_size": 2}, {}):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await attend(rig, epoch=1, **fields)
        assert error_reason(refused.value) == "BAD_RANK"


async def test_an_intake_that_ends_waits_for_no_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(make_config(tmp_path)) as rig:
        attending = asyncio.create_task(attend(rig, epoch=1, rank=0, world_size=1))
        await seen(lambda: num_present() == 1)
        await asyncio.wait_for(rig.server.stop(grace=60), 30)
        await asyncio.gather(attending, return_exceptions=True)
    assert "does not answer" not in caplog.text


async def attend(rig: Rig, **fields: int) -> None:
    """Attend and never leave."""

    async def messages() -> AsyncIterator[batch_pb2.AttendRequest]:
        yield batch_pb2.AttendRequest(**fields)  # type: ignore[arg-type]
        await asyncio.Event().wait()

    await rig.batches.Attend(messages())
