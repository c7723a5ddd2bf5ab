"""Real processes: the store in the intake or in one of its own, killed at any moment."""

import asyncio
import signal
import socket
import sys
from pathlib import Path

import grpc
import pytest

from conftest import ROOT
from intake_rig import make_part
from understudy.rpc import error_reason
from understudy.v1 import (
    control_pb2,
    weight_pb2_grpc,
)
from weight_processes import Processes, processes
from weight_store_helpers import LOWER, UPPER, WEIGHTS, fetch, moved, reason_of, tensors_of

NEW = moved(WEIGHTS)


async def publish_again(running: Processes, base: int, epoch: int) -> int:
    """The second version, until it is there, as a trainer would."""
    part = make_part(NEW, 1, epoch=epoch, base=WEIGHTS, base_version=base)
    async with asyncio.timeout(30):
        while True:
            try:
                return await running.publish(*part)
            except grpc.aio.AioRpcError as error:
                if error_reason(error) == "WRONG_BASE":
                    part = make_part(NEW, 1, epoch=epoch)
                elif error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("failpoint", "newest", "again"),
    [
        ("weights.after_issue:2", WEIGHTS, 3),
        ("weights.after_write:2", NEW, 2),
    ],
)
async def test_a_kill_in_a_commit_leaves_the_old_version_or_the_new_one(
    tmp_path: Path, failpoint: str, newest: dict[str, object], again: int
) -> None:
    async with processes(tmp_path, own=False) as running:
        await running.start("learner.intake", failpoint)
        epoch = await running.train()
        assert await running.publish(*make_part(WEIGHTS, epoch=epoch)) == 1
        part = make_part(NEW, 1, epoch=epoch, base=WEIGHTS, base_version=1)
        with pytest.raises(grpc.aio.AioRpcError):
            await running.publish(*part)
        assert await running.running["learner.intake"].wait() == -signal.SIGKILL
        await running.start("learner.intake")
        assert await fetch(running.weights) == tensors_of(newest)
        assert await running.ask_batch(epoch) == "DEADLINE_EXCEEDED"  # not WEIGHTS_LOST
        assert await publish_again(running, 1, epoch) == again
        assert await fetch(running.weights) == tensors_of(NEW)


@pytest.mark.parametrize("own", [False, True], ids=["in the intake", "own process"])
async def test_a_kill_between_two_parts_leaves_the_version_before(
    tmp_path: Path, own: bool
) -> None:
    store = "learner.weights" if own else "learner.intake"
    async with processes(tmp_path, own=own) as running:
        await running.start("learner.intake")
        if own:
            await running.start(store)
        epoch = await running.train()
        assert await running.publish(*make_part(WEIGHTS, epoch=epoch)) == 1
        halves = [
            make_part(
                NEW, 1, part=i, num_parts=2, epoch=epoch, rows=rows, base=WEIGHTS, base_version=1
            )
            for i, rows in enumerate((UPPER, LOWER))
        ]
        waiting = asyncio.create_task(running.publish(*halves[0]))
        await asyncio.sleep(0.2)
        await running.kill(store)
        assert await reason_of(waiting) in ("UNAVAILABLE", "CANCELLED")
        await running.start(store)
        assert await fetch(running.weights) == tensors_of(WEIGHTS)
        assert await asyncio.gather(*(running.publish(*half) for half in halves)) == [2, 2]
        assert await fetch(running.weights) == tensors_of(NEW)


async def test_a_store_of_its_own_outlives_the_intake(tmp_path: Path) -> None:
    async with processes(tmp_path, own=True) as running:
        await running.start("learner.intake")
        await running.start("learner.weights")
        epoch = await running.train()
        async with asyncio.timeout(10):  # the empty store has attached
            while await running.ask_batch(epoch) != "WEIGHTS_LOST":
                pass
        assert await running.publish(*make_part(WEIGHTS, epoch=epoch)) == 1
        assert await running.ask_batch(epoch) == "DEADLINE_EXCEEDED"
        await running.kill("learner.intake")
        assert await fetch(running.weights) == tensors_of(WEIGHTS)
        # A publication waits for the intake's number.
        part = make_part(NEW, 1, epoch=epoch, base=WEIGHTS, base_version=1)
        publishing = asyncio.create_task(running.publish(*part, timeout=30))
        await asyncio.sleep(1.0)
        assert not publishing.done()
        await running.start("learner.intake")
        assert await publishing == 2
        assert await running.ask_batch(epoch) == "DEADLINE_EXCEEDED"
        status = await running.control.GetStatus(control_pb2.GetStatusRequest(), timeout=5)
        assert status.figures["version"] == 2
        # The intake does not serve what another process has.
        intake = weight_pb2_grpc.WeightServiceStub(running.intake_channel)
        assert await reason_of(fetch(intake)) == "UNIMPLEMENTED"
        assert await reason_of(running.publish(*make_part(WEIGHTS, 2, epoch=epoch - 1))) == (
            "OLD_EPOCH"
        )


async def test_a_store_without_an_address_and_a_taken_one_are_named(tmp_path: Path) -> None:
    for own, expected in [(False, "network.weights is not set"), (True, "network.weights = ")]:
        folder = tmp_path / str(own)
        folder.mkdir()
        running = Processes(folder, own)
        with socket.socket() as taken:
            if own:
                host, _, port = str(running.config.network.weights).rpartition(":")
                taken.bind((host, int(port)))
                taken.listen()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "learner.weights", "--config", str(running.file)),
                stderr=asyncio.subprocess.PIPE,
                cwd=ROOT,
            )
            _, output = await process.communicate()
        assert process.returncode == 1
        assert expected in output.decode()
        await running.intake_channel.close()
        await running.weight_channel.close()
