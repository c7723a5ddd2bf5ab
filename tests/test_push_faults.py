"""What bad input once cost the intake."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from intake_rig import make_record, trajectory
from push_cases import MAX_PAYLOAD_BYTES, hello, reworked
from push_table import (
    MAX_GROWTH_BYTES,
    Table,
    refusal,
    resident_bytes,
    shared_intake,
    unharmed,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def table(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Table]:
    async with shared_intake(tmp_path_factory.mktemp("push")) as table:
        yield table


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_is_harmed(table: Table) -> AsyncIterator[None]:
    async with unharmed(table):
        yield


def answers(table: Table, actor_id: str) -> Iterator[bytes]:
    yield from table.rig.server.trajectories.actors._newest[actor_id].digests


async def test_a_digest_of_megabytes_is_not_kept(table: Table) -> None:
    lease = await table.lease()
    record = make_record(lease, trajectory(lease))
    record.payload_digest = b"x" * 2**20
    async with table.rig.pusher(actor_id="digests") as pusher:
        for _ in range(3):
            await pusher.send(record)
            assert [nack.reason for nack in await pusher.acked()] == ["BAD_DIGEST"]
    kept = sum(map(len, answers(table, "digests")))
    table.rig.server.trajectories.actors._newest["digests"].digests.clear()
    assert kept <= 3 * 32


async def test_a_conflict_above_the_payload_limit_is_not_written(table: Table) -> None:
    lease = await table.lease()
    async with table.rig.pusher(actor_id="large") as pusher:
        await pusher.send(make_record(lease, trajectory(lease)))
        assert await pusher.acked() == []
        written = table.rig.intake.log.num_bytes
        large = reworked(lease, b"x" * (2 * MAX_PAYLOAD_BYTES))
        await pusher.send(large, sequence=0)
        assert (await pusher.read()).nack.sequence == 0
    assert table.rig.intake.log.num_bytes - written < MAX_PAYLOAD_BYTES


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


async def test_a_message_of_millions_of_records_costs_no_memory(table: Table) -> None:
    count = 2**22
    records = b"\x0a\x00" * count
    length = len(records)
    varint = bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14 & 127 | 128])
    message = b"\x12" + varint + bytes([length >> 21]) + records
    before = resident_bytes()
    forget_peak()
    call = await table.raw_stream(hello(), message)
    assert await refusal(call) == ("INVALID_ARGUMENT", "BAD_MESSAGE")
    assert peak_bytes() - before < MAX_GROWTH_BYTES + 4 * len(message)
