"""Whatever an actor pushes is answered by name, harms nobody else, and costs no memory.

One intake serves the whole table; its longer parts are in push_cases. After each row it is alive,
stores the next sound record, and the balance over task keys holds. Rows that test_intake_tasks has
are not here.

Memory is the resident size of this process, so server, client and tests together, without what is
freed but kept by malloc; it is taken after the first row, and again after the last.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from intake_rig import Pusher, make_record, trajectory
from push_cases import (
    ENVELOPES,
    FIELDS,
    FRAMES,
    MESSAGES,
    VALUES,
    Record,
    compress,
    hello,
    reworked,
    sound,
)
from push_table import (
    MAX_GROWTH_BYTES,
    PATH,
    Table,
    conflicts_in,
    nack_reasons,
    only_nack,
    refusal,
    resident_bytes,
    shared_intake,
    unharmed,
)
from understudy.rpc import error_reason
from understudy.trajectory import encode_trajectory
from understudy.v1 import trajectory_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def table(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Table]:
    async with shared_intake(tmp_path_factory.mktemp("push")) as table:
        yield table


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_is_harmed(table: Table) -> AsyncIterator[None]:
    async with unharmed(table):
        yield


# --- Payloads ---


@pytest.mark.parametrize("name", FRAMES)
async def test_a_frame_that_is_none_or_lies_is_rejected(table: Table, name: str) -> None:
    make, reason = FRAMES[name]
    lease = await table.lease()
    assert await only_nack(table, reworked(lease, make(lease))) == reason


@pytest.mark.parametrize("name", FIELDS)
async def test_columns_that_break_a_rule_are_rejected(table: Table, name: str) -> None:
    field, value, reason = FIELDS[name]
    lease = await table.lease()
    message = sound(lease)
    segment = message.segments[0]
    segment.ClearField(field)
    if isinstance(value, list):
        getattr(segment, field).extend(value)
    else:
        setattr(segment, field, value)
    encoded = message.SerializeToString()
    assert await only_nack(table, reworked(lease, compress(encoded))) == reason


@pytest.mark.parametrize("name", VALUES)
async def test_values_that_break_a_rule_are_rejected(table: Table, name: str) -> None:
    lease = await table.lease()
    message = sound(lease)
    VALUES[name](message)
    payload = compress(message.SerializeToString())
    assert await only_nack(table, reworked(lease, payload)) == "BAD_PAYLOAD"


async def test_a_flipped_byte_is_seen(table: Table) -> None:
    lease = await table.lease()
    payload = encode_trajectory(trajectory(lease, num_tokens=4000))
    lease.lease_id = 0  # a rejection then leaves the sample to its real lease
    damaged, unsigned = [], []
    for index in range(0, len(payload), 50):
        flipped = bytearray(payload)
        flipped[index] ^= 0x10
        damaged.append(reworked(lease, bytes(flipped)))
        unsigned.append(reworked(lease, payload))
        unsigned[-1].payload = bytes(flipped)
    assert len(damaged) > 50
    async with table.rig.pusher(actor_id="flips") as pusher:
        reasons = await nack_reasons(pusher, damaged)
        assert set(reasons) <= {"BAD_PAYLOAD", "TOO_LARGE"}
        assert await nack_reasons(pusher, unsigned) == ["BAD_DIGEST"] * len(unsigned)


# --- Envelopes ---


@pytest.mark.parametrize("name", ENVELOPES)
@pytest.mark.parametrize("lease_id", ["leased", "forged"])
async def test_envelopes_that_lie_are_rejected(table: Table, name: str, lease_id: str) -> None:
    fields, reason = ENVELOPES[name]
    lease = await table.lease()
    record = make_record(lease, trajectory(lease))
    for field, value in fields.items():
        setattr(record, field, value)
    if "payload" in fields:
        record.payload_digest = hashlib.sha256(record.payload).digest()
    leased = table.rig.intake.balance().figures()["leased"]
    if lease_id == "forged":
        record.lease_id = 2**63
    assert await only_nack(table, record) == reason
    # A forged lease takes nothing from who plays the sample.
    changed = table.rig.intake.balance().figures()["leased"] - leased
    assert changed == (0 if lease_id == "forged" else -1)


@pytest.mark.parametrize("lease_id", [0, 1, 2**64 - 1])
async def test_a_sound_trajectory_counts_under_whichever_lease(table: Table, lease_id: int) -> None:
    lease = await table.lease()
    lease.lease_id = lease_id
    for _ in range(2):
        assert await table.rig.push(make_record(lease, trajectory(lease))) == []


@pytest.mark.parametrize(("ordinal", "index"), [(2**64 - 1, 0), (0, 2**32 - 1), (10**6, 1)])
async def test_a_task_key_that_was_never_issued_is_rejected(
    table: Table, ordinal: int, index: int
) -> None:
    lease = await table.lease()
    record = make_record(lease, trajectory(lease))
    record.task_key.ordinal, record.task_key.sample_index = ordinal, index
    assert await only_nack(table, record) == "UNKNOWN_TASK_KEY"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"sequence": 2}, "OUT_OF_ORDER"),
        ({"sequence": 2**64 - 1}, "OUT_OF_ORDER"),
        ({"epoch": 0}, "OLD_EPOCH"),
        ({"epoch": 2**64 - 1}, "OLD_EPOCH"),
        ({"incarnation": 0}, "OLD_INCARNATION"),
        ({"incarnation": 2**64 - 1}, "OLD_INCARNATION"),
    ],
)
async def test_numbers_that_do_not_follow_end_the_stream(
    table: Table, fields: dict[str, int], status: str
) -> None:
    first, second = await table.lease(), await table.lease()
    async with table.rig.pusher(actor_id="numbers") as pusher:
        await pusher.send(make_record(first, trajectory(first)))
        await pusher.send(make_record(second, trajectory(second)), **fields)
        assert await refusal(pusher.call) == ("FAILED_PRECONDITION", status)


async def test_another_actors_incarnation_is_refused(table: Table) -> None:
    lease = await table.lease()
    async with table.rig.pusher(actor_id="one") as one, table.rig.pusher(actor_id="two") as two:
        assert one.welcome.incarnation != two.welcome.incarnation
        record = make_record(lease, trajectory(lease))
        await one.send(record, incarnation=two.welcome.incarnation)
        assert await refusal(one.call) == ("FAILED_PRECONDITION", "OLD_INCARNATION")
        stolen = two.welcome.incarnation
        call = table.rig.trajectories.PushTrajectories()
        hello = trajectory_pb2.Hello(actor_id="three", incarnation=stolen)
        await call.write(trajectory_pb2.PushTrajectoriesRequest(hello=hello))
        assert await refusal(call) == ("INVALID_ARGUMENT", "BAD_HELLO")
        await two.send(record)
        assert await two.acked() == []


async def test_a_sequence_number_sent_again_is_a_duplicate_or_a_conflict(table: Table) -> None:
    leases = [await table.lease() for _ in range(3)]
    records = [make_record(lease, trajectory(lease)) for lease in leases]
    other = make_record(leases[1], trajectory(leases[1], reward=7.0))
    async with table.rig.pusher(actor_id="again") as pusher:
        for record in records:
            await pusher.send(record)
        assert await pusher.acked() == []
        await pusher.send(records[0], sequence=0)  # a back step: known, and acked again
        await pusher.send(other, sequence=1)
        pusher.sequence = 3
        response = await pusher.read()
        while not response.HasField("nack"):
            response = await pusher.read()
        assert (response.nack.sequence, response.nack.reason) == (1, "CONFLICT")
        await pusher.acked()
    assert conflicts_in(table.config) == {1: other.payload}


# --- Messages ---


@pytest.mark.parametrize("name", MESSAGES)
async def test_messages_that_are_none_end_the_stream(table: Table, name: str) -> None:
    messages, status, reason = MESSAGES[name]
    call = await table.raw_stream(*messages)
    assert await refusal(call) == (status, reason)


async def test_a_stream_that_ends_at_once_is_refused(table: Table) -> None:
    call = table.channel.stream_stream(PATH)()
    await call.done_writing()
    assert await refusal(call) == ("INVALID_ARGUMENT", "BAD_HELLO")


async def test_fields_that_nobody_knows_are_ignored(table: Table) -> None:
    lease = await table.lease()
    unknown = b"\x7a\x05extra"
    call = await table.raw_stream(hello(actor_id="newer") + unknown)
    answer = trajectory_pb2.PushTrajectoriesResponse.FromString(await call.read())
    record = make_record(lease, trajectory(lease))
    record.epoch, record.incarnation = answer.welcome.epoch, answer.welcome.incarnation
    inner = record.SerializeToString() + unknown
    records = trajectory_pb2.TrajectoryRecords.FromString(b"")
    records.records.append(Record.FromString(inner))
    request = trajectory_pb2.PushTrajectoriesRequest(records=records)
    await call.write(request.SerializeToString() + unknown)
    answer = trajectory_pb2.PushTrajectoriesResponse.FromString(await call.read())
    assert answer.ack.next_sequence == 1
    call.cancel()


@pytest.mark.parametrize(
    "path", [PATH.lower(), PATH.replace("v1", "V1"), PATH + "/", PATH[1:], "/", "//", PATH[:-1]]
)
async def test_a_wrong_path_is_unimplemented(table: Table, path: str) -> None:
    call = await table.raw_stream(hello(), path=path)
    assert await refusal(call) == ("UNIMPLEMENTED", "UNIMPLEMENTED")


async def test_a_unary_call_of_the_stream_is_refused(table: Table) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await table.channel.unary_unary(PATH)(b"\xff" * 9, timeout=5)
    assert error_reason(caught.value) == "BAD_MESSAGE"


# --- Times ---


@pytest.mark.parametrize("seconds", [0, 0.001, 0.05])
async def test_a_deadline_ends_the_stream_and_nothing_else(table: Table, seconds: float) -> None:
    # Writing on a call that has ended makes the client itself say INTERNAL.
    messages = [hello(actor_id="late")] if seconds > 0.01 else []
    call = await table.raw_stream(*messages, timeout=seconds)
    assert (await refusal(call))[0] == "DEADLINE_EXCEEDED"


async def cancel_after(table: Table, num_steps: int, seconds: float) -> None:
    """Cancel a stream after so many steps of a usual one, and a while."""
    lease = await table.lease()
    call = table.rig.trajectories.PushTrajectories()
    pusher = Pusher(call)
    record = make_record(lease, trajectory(lease))
    steps = (
        lambda: call.write(trajectory_pb2.PushTrajectoriesRequest.FromString(hello())),
        pusher.read,
        lambda: pusher.send(record, epoch=table.rig.server.trajectories.epoch),
        pusher.acked,
        call.done_writing,
    )
    for step in steps[:num_steps]:
        response = await step()
        if step == pusher.read:
            pusher.welcome = response.welcome
            pusher.sequence = response.welcome.next_sequence
    await asyncio.sleep(seconds)
    call.cancel()
    # The actor still holds the record, and sends it again: it is stored once.
    assert await table.rig.push(record) == []


@pytest.mark.parametrize("num_steps", range(6))
async def test_a_stream_may_be_cancelled_at_any_time(table: Table, num_steps: int) -> None:
    for milliseconds in (0, 0, 1, 2, 4, 6, 8):
        stored = table.rig.intake.balance().figures()["stored"]
        await cancel_after(table, num_steps, milliseconds / 1000)
        assert table.rig.intake.balance().figures()["stored"] == stored + 1


async def test_streams_that_never_send_or_never_end_are_borne(table: Table) -> None:
    silent = [await table.raw_stream() for _ in range(50)]
    open_ended = [await table.raw_stream(hello(actor_id=f"mute-{i}")) for i in range(50)]
    for call in open_ended:
        assert await call.read()
    lease = await table.lease()
    assert await table.rig.push(make_record(lease, trajectory(lease))) == []
    for call in (*silent, *open_ended):
        assert not call.done()
        call.cancel()


async def test_2000_streams_opened_and_cancelled_leave_nothing(table: Table) -> None:
    for index in range(2000):
        call = table.channel.stream_stream(PATH)()
        if index % 2:
            await call.write(hello(actor_id=f"gone-{index % 7}"))
        if index % 100 == 1:
            await call.read()
        call.cancel()
    assert table.rig.intake.balance().holds


# --- Answers ---


async def test_no_record_is_acked_before_its_nack(table: Table) -> None:
    servicer = table.rig.server.trajectories
    lease = await table.lease()
    record = make_record(lease, trajectory(lease))
    record.payload_digest, record.lease_id = bytes(32), 0
    record.epoch = servicer.epoch
    first_answered = asyncio.Event()

    async def requests() -> AsyncIterator[trajectory_pb2.PushTrajectoriesRequest]:
        for record.sequence in range(2):
            packed = trajectory_pb2.TrajectoryRecords(records=[record])
            yield trajectory_pb2.PushTrajectoriesRequest(records=packed)
            await first_answered.wait()

    opening = trajectory_pb2.PushTrajectoriesRequest.FromString(hello(actor_id="order"))
    stream = await servicer._open(opening)
    record.incarnation = stream.welcome().incarnation
    reader = asyncio.create_task(stream.read(requests()))
    async with contextlib.aclosing(stream.responses(reader)) as responses:
        assert (await anext(responses)).nack.sequence == 0
        first_answered.set()  # the second record comes while the first one's nack is being sent
        await reader
        response = await anext(responses)
        assert response.HasField("nack") or response.ack.next_sequence == 1


# --- Memory: behind all of the table, since it looks back on it ---


async def test_the_whole_table_cost_little_memory(table: Table) -> None:
    growth = resident_bytes() - table.resident_bytes
    for _ in range(20):  # gRPC gives large messages back a little later, when others come
        if growth < MAX_GROWTH_BYTES / 2:
            break
        lease = await table.lease()
        await table.rig.push(make_record(lease, trajectory(lease)))
        await asyncio.sleep(0.1)
        growth = resident_bytes() - table.resident_bytes
    print(f"resident size grew by {growth / 1e6:.1f} MB")
    assert growth < MAX_GROWTH_BYTES
