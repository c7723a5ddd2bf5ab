"""Whatever an actor pushes is answered by name, harms nobody else, and costs no memory.

One intake serves the whole table. After each row it is alive, stores the next sound record, and the
balance over task keys holds. Rows that test_intake_tasks has are not here.

Memory is the resident size of this process, so server, client and tests together, without what is
freed but kept by malloc; it is taken after the first row, and again after the last.
"""

import asyncio
import contextlib
import ctypes
import gc
import hashlib
import json
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import pytest_asyncio
import zstandard

from intake_rig import Pusher, Rig, make_config, make_record, running, trajectory
from learner.log.reader import LogReader
from understudy.config import Config, NetworkConfig
from understudy.rpc import error_reason, open_channel
from understudy.trajectory import encode_trajectory
from understudy.v1 import common_pb2, log_pb2, task_pb2, trajectory_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/understudy.v1.TrajectoryService/PushTrajectories"
VOCAB_SIZE = 5000
MAX_PAYLOAD_BYTES = 2**20
MAX_MESSAGE_BYTES = 32 * 2**20
MAX_GROWTH_BYTES = 64e6
ZSTD, RAW = common_pb2.ENCODING_ZSTD, common_pb2.ENCODING_RAW
Record = trajectory_pb2.TrajectoryRecord
Lease = task_pb2.Lease


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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def table(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Table]:
    folder = tmp_path_factory.mktemp("push")
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


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_is_harmed(table: Table) -> AsyncIterator[None]:
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


# --- Payloads ---


def sound(lease: Lease, **fields: Any) -> trajectory_pb2.Trajectory:
    payload = zstandard.decompress(encode_trajectory(trajectory(lease, **fields)))
    return trajectory_pb2.Trajectory.FromString(payload)


def frame(lease: Lease) -> bytes:
    return encode_trajectory(trajectory(lease))


def header(descriptor: int, *parts: bytes) -> bytes:
    """A zstd frame's header, then one empty last block."""
    return b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + b"".join(parts) + b"\x01\x00\x00"


def compress(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def with_forged_size(data: bytes) -> bytes:
    """The same blocks behind a header that says 2^40 bytes."""
    parameters = zstandard.get_frame_parameters(data)
    assert parameters.content_size < 2**16
    assert data[4] & 0x20  # a single segment: no window descriptor
    return data[:4] + b"\xe4" + (2**40).to_bytes(8, "little") + data[7:]


FRAMES: dict[str, tuple[Callable[[Lease], bytes], str]] = {
    "empty": (lambda lease: b"", "BAD_PAYLOAD"),
    "no frame": (lambda lease: b"\xff" * 300, "BAD_PAYLOAD"),
    "another compression": (lambda lease: zlib.compress(b"x" * 100), "BAD_PAYLOAD"),
    "forged content size": (lambda lease: with_forged_size(frame(lease)), "TOO_LARGE"),
    "forged size, no blocks": (lambda _: header(0xE0, (2**40).to_bytes(8, "little")), "TOO_LARGE"),
    "content size absent": (
        lambda lease: compress(sound(lease).SerializeToString(), write_content_size=False),
        "TOO_LARGE",
    ),
    "window of 2 GiB": (
        lambda lease: header(0xC0, b"\xa8", (100).to_bytes(8, "little")),
        "BAD_PAYLOAD",
    ),
    "window of 2 GiB, no size": (lambda lease: header(0x00, b"\xa8"), "TOO_LARGE"),
    "bomb beyond the limit": (lambda lease: compress(bytes(2**26 + 1)), "TOO_LARGE"),
    "bomb within the limit": (lambda lease: compress(bytes(2**24)), "TOO_LARGE"),
    "two frames": (lambda lease: frame(lease) * 2, "BAD_PAYLOAD"),
    "trailing byte": (lambda lease: frame(lease) + b"x", "BAD_PAYLOAD"),
    "skippable frame before": (
        lambda lease: b"\x50\x2a\x4d\x18\x00\x00\x00\x00" + frame(lease),
        "BAD_PAYLOAD",
    ),
    "truncated": (lambda lease: frame(lease)[:-1], "BAD_PAYLOAD"),
    "header only": (lambda lease: frame(lease)[:6], "BAD_PAYLOAD"),
    "dictionary": (lambda lease: header(0x21, b"\x07", b"\x05"), "BAD_PAYLOAD"),
    "message cut": (lambda lease: compress(sound(lease).SerializeToString()[:-5]), "BAD_PAYLOAD"),
    "no message": (lambda lease: compress(b"\xff" * 1000), "BAD_PAYLOAD"),
    "message of nothing": (lambda lease: compress(b"\x08"), "BAD_PAYLOAD"),
    "groups 101 deep": (lambda lease: compress(b"\x7b" * 101 + b"\x7c" * 101), "BAD_PAYLOAD"),
    "million empty segments": (lambda lease: compress(b"\x32\x00" * 10**6), "TOO_LARGE"),
    "million empty spans": (
        lambda lease: compress(b"\x32\x80\x89\x7a" + b"\x22\x00" * 10**6),
        "TOO_LARGE",
    ),
    "million empty turns": (lambda lease: compress(b"\x3a\x00" * 10**6), "TOO_LARGE"),
    "text that is no UTF-8": (lambda lease: compress(b"\x12\x02\xff\xfe"), "BAD_PAYLOAD"),
}


def reworked(lease: Lease, payload: bytes) -> Record:
    """A record with another payload under its right digest."""
    record = make_record(lease, trajectory(lease))
    record.payload = payload
    record.payload_digest = hashlib.sha256(payload).digest()
    return record


async def only_nack(table: Table, record: Record) -> str:
    nacks = await table.rig.push(record)
    assert [nack.sequence for nack in nacks] == [0]
    assert 0 < len(nacks[0].detail) < 1000
    return nacks[0].reason


@pytest.mark.parametrize("name", FRAMES)
async def test_a_frame_that_is_none_or_lies_is_rejected(table: Table, name: str) -> None:
    make, reason = FRAMES[name]
    lease = await table.lease()
    assert await only_nack(table, reworked(lease, make(lease))) == reason


def spans(*values: tuple[int, int, int]) -> list[common_pb2.VersionSpan]:
    return [common_pb2.VersionSpan(version=v, start=start, end=end) for v, start, end in values]


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


NAN, INF = float("nan"), float("inf")
FIELDS: dict[str, tuple[str, Any, str]] = {
    "ids not whole": ("token_ids", b"\0" * 47, "BAD_PAYLOAD"),
    "ids fewer than the mask": ("token_ids", b"\0" * 44, "BAD_PAYLOAD"),
    "ids more than the mask": ("token_ids", b"\0" * 52, "BAD_PAYLOAD"),
    "id negative": ("token_ids", np.full(12, -1, "<i4").tobytes(), "BAD_PAYLOAD"),
    "id of the vocabulary's size": (
        "token_ids",
        np.array([*range(11), VOCAB_SIZE], "<i4").tobytes(),
        "BAD_PAYLOAD",
    ),
    "id 2^31-1": ("token_ids", np.full(12, 2**31 - 1, "<i4").tobytes(), "BAD_PAYLOAD"),
    "mask empty": ("loss_mask", b"", "BAD_PAYLOAD"),
    "mask of twos": ("loss_mask", b"\0" * 6 + b"\x02" * 6, "BAD_PAYLOAD"),
    "mask without a prompt": ("loss_mask", b"\x01" * 12, "BAD_PAYLOAD"),
    "mask of nothing": ("loss_mask", b"\0" * 12, "BAD_PAYLOAD"),
    "logprobs fewer": ("logprobs", floats(*[-1] * 5), "BAD_PAYLOAD"),
    "logprobs more": ("logprobs", floats(*[-1] * 7), "BAD_PAYLOAD"),
    "logprobs not whole": ("logprobs", floats(*[-1] * 6)[:-1], "BAD_PAYLOAD"),
    "logprob NaN": ("logprobs", floats(*[-1] * 5, NAN), "BAD_PAYLOAD"),
    "logprob -inf": ("logprobs", floats(*[-1] * 5, -INF), "BAD_PAYLOAD"),
    "logprob +inf": ("logprobs", floats(*[-1] * 5, INF), "BAD_PAYLOAD"),
    "logprob above 0": ("logprobs", floats(*[-1] * 5, 1e-45), "BAD_PAYLOAD"),
    "spans none": ("version_spans", [], "BAD_PAYLOAD"),
    "spans overlap": ("version_spans", spans((1, 0, 4), (1, 3, 6)), "BAD_PAYLOAD"),
    "spans with a gap": ("version_spans", spans((1, 0, 2), (1, 3, 6)), "BAD_PAYLOAD"),
    "spans with a late start": ("version_spans", spans((1, 1, 6)), "BAD_PAYLOAD"),
    "spans short": ("version_spans", spans((1, 0, 5)), "BAD_PAYLOAD"),
    "spans long": ("version_spans", spans((1, 0, 7)), "BAD_PAYLOAD"),
    "span empty": ("version_spans", spans((1, 0, 0), (1, 0, 6)), "BAD_PAYLOAD"),
    "span backwards": ("version_spans", spans((1, 0, 6), (1, 6, 0)), "BAD_PAYLOAD"),
    "span ends at 2^32-1": ("version_spans", spans((1, 0, 2**32 - 1)), "BAD_PAYLOAD"),
    "versions descend": ("version_spans", spans((2, 0, 3), (1, 3, 6)), "BAD_PAYLOAD"),
    "version 0": ("version_spans", spans((0, 0, 6)), "UNKNOWN_VERSION"),
    "version 2^64-1": ("version_spans", spans((2**64 - 1, 0, 6)), "UNKNOWN_VERSION"),
}


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


VALUES: dict[str, Callable[[trajectory_pb2.Trajectory], object]] = {
    "outcome unset": lambda message: message.ClearField("outcome"),
    "outcome unknown": lambda message: setattr(message, "outcome", 99),
    "outcome negative": lambda message: setattr(message, "outcome", -1),
    "reward NaN": lambda message: setattr(message, "reward", NAN),
    "reward infinite": lambda message: setattr(message, "reward", -INF),
    "temperature NaN": lambda message: setattr(message.sampling, "temperature", NAN),
    "temperature -1": lambda message: setattr(message.sampling, "temperature", -1),
    "temperature 11": lambda message: setattr(message.sampling, "temperature", 11),
    "turn of no segment": lambda message: setattr(message.turns[0], "segment", 1),
    "turn backwards": lambda message: setattr(message.turns[0], "start", 7),
    "turn beyond the end": lambda message: setattr(message.turns[0], "end", 7),
    "turn's reward NaN": lambda message: setattr(message.turns[0], "reward", NAN),
    "another suite": lambda message: setattr(message.task, "suite", "other"),
    "another split": lambda message: setattr(message.task, "split", "test"),
    "another task": lambda message: setattr(message.task, "task_ordinal", 2**64 - 1),
    "too many tokens": lambda message: message.segments.add(
        token_ids=bytes(4 * 4097), loss_mask=bytes(4097)
    ),
}


@pytest.mark.parametrize("name", VALUES)
async def test_values_that_break_a_rule_are_rejected(table: Table, name: str) -> None:
    lease = await table.lease()
    message = sound(lease)
    VALUES[name](message)
    payload = compress(message.SerializeToString())
    assert await only_nack(table, reworked(lease, payload)) == "BAD_PAYLOAD"


async def test_each_hundredth_byte_flipped_is_seen(table: Table) -> None:
    lease = await table.lease()
    payload = encode_trajectory(trajectory(lease, num_tokens=4000))
    lease.lease_id = 0  # a rejection then leaves the sample to its real lease
    damaged, unsigned = [], []
    for index in range(0, len(payload), 100):
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


# --- Envelopes ---

ENVELOPES: dict[str, tuple[dict[str, Any], str]] = {
    "encoding unknown": ({"encoding": 99}, "BAD_PAYLOAD"),
    "encoding of another payload": ({"encoding": RAW}, "BAD_PAYLOAD"),
    "outcome unset": ({"outcome": 0}, "BAD_PAYLOAD"),
    "outcome unknown": ({"outcome": 99}, "BAD_PAYLOAD"),
    "no digest": ({"payload_digest": b""}, "BAD_DIGEST"),
    "half a digest": ({"payload_digest": b"\0" * 16}, "BAD_DIGEST"),
    "payload above the limit": ({"payload": b"x" * (MAX_PAYLOAD_BYTES + 1)}, "TOO_LARGE"),
    "payload of the limit": ({"payload": b"x" * MAX_PAYLOAD_BYTES}, "BAD_PAYLOAD"),
}


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


def hello(**fields: Any) -> bytes:
    message = trajectory_pb2.Hello(**{"actor_id": "raw", **fields})
    return trajectory_pb2.PushTrajectoriesRequest(hello=message).SerializeToString()


DEEP = b"\x7b" * 101 + b"\x7c" * 101
"""Groups of an unknown field, nested; no message of ours nests so deep."""
MESSAGES: dict[str, tuple[list[bytes], str, str]] = {
    "garbage first": ([b"\xff" * 64], "INVALID_ARGUMENT", "BAD_MESSAGE"),
    "garbage later": ([hello(), b"\xff" * 64], "INVALID_ARGUMENT", "BAD_MESSAGE"),
    "hello cut": ([hello()[:-1]], "INVALID_ARGUMENT", "BAD_MESSAGE"),
    "hello with bad UTF-8": ([b"\x0a\x03\x12\x01\xff"], "INVALID_ARGUMENT", "BAD_MESSAGE"),
    "101 groups first": ([hello() + DEEP], "INVALID_ARGUMENT", "BAD_MESSAGE"),
    "101 groups later": ([hello(), DEEP], "INVALID_ARGUMENT", "BAD_MESSAGE"),
    "empty first": ([b""], "INVALID_ARGUMENT", "BAD_HELLO"),
    "unknown field first": ([b"\x7a\x01x"], "INVALID_ARGUMENT", "BAD_HELLO"),
    "empty later": ([hello(), b""], "FAILED_PRECONDITION", "OUT_OF_ORDER"),
    "hello twice": ([hello(), hello()], "FAILED_PRECONDITION", "OUT_OF_ORDER"),
    "other run": ([hello(run_id="other")], "FAILED_PRECONDITION", "RUN_MISMATCH"),
    "name of NULs is a name": (
        [hello(actor_id="\0" * 64), b""],
        "FAILED_PRECONDITION",
        "OUT_OF_ORDER",
    ),
    "name too long in bytes": ([hello(actor_id="\u00e9" * 33)], "INVALID_ARGUMENT", "BAD_HELLO"),
    "empty record": ([hello(), b"\x12\x02\x0a\x00"], "FAILED_PRECONDITION", "OLD_EPOCH"),
    "message above the limit": (
        [hello(), b"\x7a\xfc\xff\xff\x0f" + bytes(MAX_MESSAGE_BYTES - 4)],
        "RESOURCE_EXHAUSTED",
        "RESOURCE_EXHAUSTED",
    ),
    "message of the limit": (
        [hello(), b"\x7a\xfb\xff\xff\x0f" + bytes(MAX_MESSAGE_BYTES - 5)],
        "FAILED_PRECONDITION",
        "OUT_OF_ORDER",
    ),
}


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


# --- Faults that are known and not mended ---


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


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="a message may hold any number of records"
)
async def test_a_message_of_millions_of_records_costs_no_memory(table: Table) -> None:
    count = 2**22
    records = b"\x0a\x00" * count
    length = len(records)
    varint = bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14 & 127 | 128])
    message = b"\x12" + varint + bytes([length >> 21]) + records
    before = resident_bytes()
    forget_peak()
    call = await table.raw_stream(hello(), message)
    assert (await refusal(call))[0] == "FAILED_PRECONDITION"
    assert peak_bytes() - before < MAX_GROWTH_BYTES + 4 * len(message)
