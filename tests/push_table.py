"""The intake that all rows of bad input share, and what has to hold after each of them."""

import asyncio
import contextlib
import ctypes
import gc
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from intake_rig import Pusher, Rig, make_config, make_record, running, trajectory
from learner.log.reader import LogReader
from push_cases import MAX_PAYLOAD_BYTES, VOCAB_SIZE, Lease, Record
from understudy.config import Config, NetworkConfig
from understudy.rpc import error_reason, open_channel
from understudy.v1 import log_pb2

PATH = "/understudy.v1.TrajectoryService/PushTrajectories"
MAX_GROWTH_BYTES = 64e6


class Table:
    """The intake that all rows share."""

    def __init__(self, rig: Rig, config: Config, channel: grpc.aio.Channel) -> None:
        self.rig = rig
        self.config = config
        self.channel = channel
        """Sends and receives plain bytes."""
        self.resident_bytes = 0

    async def lease(self) -> Lease:
        (lease,) = await self.rig.lease(1)
        return lease

    async def raw_stream(self, *messages: bytes, path: str = PATH, **options: Any) -> Any:
        """Open a stream, send bytes on it, and return the call."""
        call = self.channel.stream_stream(path)(**options)
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            for message in messages:
                await call.write(message)
        return call

    @property
    def streams(self) -> int:
        return len(self.rig.server.trajectories.streams)


@contextlib.asynccontextmanager
async def shared_intake(folder: Path) -> AsyncIterator[Table]:
    """Serve the intake of one table, with groups enough for all rows."""
    config = make_config(
        folder,
        groups_per_batch=500,
        max_attempts=1000,
        log={"buffer_bytes": MAX_PAYLOAD_BYTES},
    )
    (config.model.path / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    async with running(config) as rig:
        port = rig.server._server.port
        async with open_channel(f"127.0.0.1:{port}", NetworkConfig()) as channel:
            yield Table(rig, config, channel)


@contextlib.asynccontextmanager
async def unharmed(table: Table) -> AsyncIterator[None]:
    """After each row the next sound record is stored, and every task key is accounted for."""
    before = table.rig.intake.balance()
    yield
    lease = await table.lease()
    stored = table.rig.intake.balance().figures()["stored"]
    assert await table.rig.push(make_record(lease, trajectory(lease))) == []
    after = table.rig.intake.balance()
    assert after.holds
    assert after.figures()["stored"] == stored + 1
    assert after.figures()["issued"] >= before.figures()["issued"]
    assert not after.dropped
    for _ in range(200):
        if not table.streams:
            break
        await asyncio.sleep(0.01)
    assert not table.streams
    if not table.resident_bytes:
        table.resident_bytes = resident_bytes()


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


async def refusal(call: Any) -> tuple[str, str]:
    """Status and reason that a stream ends with, past whatever it answers before."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(read_to_the_end(call), 10)
    return caught.value.code().name, error_reason(caught.value)


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
    raise grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        await call.details(),
    )


async def only_nack(table: Table, record: Record) -> str:
    nacks = await table.rig.push(record)
    assert [nack.sequence for nack in nacks] == [0]
    assert 0 < len(nacks[0].detail) < 1000
    return nacks[0].reason


async def nack_reasons(pusher: Pusher, records: list[Record]) -> list[str]:
    """Send records of which each is rejected, and read until all are."""
    first, nacks = pusher.sequence, []
    for record in records:
        await pusher.send(record)
    acked = 0
    while len(nacks) < len(records) or acked < pusher.sequence:
        response = await pusher.read()
        acked = max(acked, response.ack.next_sequence)
        if response.HasField("nack"):
            nacks.append(response.nack)
    assert [nack.sequence for nack in nacks] == list(range(first, pusher.sequence))
    return [nack.reason for nack in nacks]


def conflicts_in(config: Config) -> dict[int, bytes]:
    """Payload of each record in quarantine, by sequence number."""
    reader = LogReader(config.run.path / "log")
    found = {}
    for entry, location in reader:
        answered = entry.record_answered
        if answered.answer == log_pb2.ANSWER_CONFLICT:
            found[answered.origin.sequence] = reader.read(location)[1]
    assert not reader.findings.bad_ranges
    reader.close()
    return found
