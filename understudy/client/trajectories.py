"""Client of TrajectoryService: trajectories are kept until acked, and resent after a broken stream.

    put() -> [un-acked records, oldest first] -> stream -> acks drop them from the front

Records get their sequence number when they are sent, from what the learner's Welcome says it
expects next; so a learner that restarted and forgot the incarnation is served just as well.
"""

import asyncio
import hashlib
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc

from understudy import metrics
from understudy.client.base import Client
from understudy.client.tasks import Lease
from understudy.config import NetworkConfig
from understudy.errors import UnderstudyError
from understudy.rpc import error_reason
from understudy.trajectory import Trajectory, TrajectoryError, decoded_size, encode_trajectory
from understudy.v1 import common_pb2, trajectory_pb2, trajectory_pb2_grpc

_log = logging.getLogger(__name__)
_RECONNECT_SECONDS = 0.5
_SAY_SECONDS = 10.0
_MESSAGE_RECORDS, _MESSAGE_BYTES = 64, 2**20
"""Most that one message packs; a record above the bytes goes alone."""
_PERMANENT = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
"""Answers to a Hello that stay the same however often it is said."""


class PushRefusedError(UnderstudyError):
    """The learner will never take trajectories of this client: another run, a name in use."""


class TrajectoryClient(Client):
    """Sends the trajectories of leases: `push` and go on, `flush` to know that they are stored.

        async with TrajectoryClient("127.0.0.1:7000", NetworkConfig(), actor_id="me") as learner:
            await learner.push(lease, trajectory)
            await learner.flush()

    It connects again by itself, so that both calls may take as long as the learner is away; bound
    them with asyncio.timeout. What is not acked when the client is closed is lost.

    Args:
        actor_id: name of the caller, as in its leases; unique among living actors.
        run_id: run that was played for; empty accepts whichever run is served.
        max_unacked_bytes: payload bytes held until the learner acks them; `push` waits beyond.
    """

    peer = "learner"

    def __init__(
        self,
        address: str,
        network: NetworkConfig,
        *,
        actor_id: str = "",
        run_id: str = "",
        max_unacked_bytes: int = 256 * 2**20,
    ) -> None:
        super().__init__(address, network)
        self._nacks: list[trajectory_pb2.Nack] = []
        self._uplink = Uplink(
            self.channel,
            run_id,
            actor_id or f"client-{uuid.uuid4().hex}",
            max_unacked_bytes,
            self._nacks.append,
        )
        self._sender: asyncio.Task[None] | None = None

    @property
    def num_unacked(self) -> int:
        """Trajectories that the learner has not acked."""
        return self._uplink.num_unacked

    async def push(self, lease: Lease, trajectory: Trajectory) -> None:
        """Hand over what was played under a lease.

        Raises:
            PushRefusedError: the learner takes nothing from this client.
        """
        await self._while_sending(self._uplink.put(lease, trajectory))

    async def flush(self) -> None:
        """Wait until everything that was pushed is acked.

        Raises:
            TrajectoryError: the learner rejected a trajectory since the last flush; of several,
                the first.
            PushRefusedError: the learner takes nothing from this client.
        """
        await self._while_sending(self._uplink.flush())
        if self._nacks:
            first = self._nacks[0]
            self._nacks.clear()
            raise TrajectoryError(first.reason, f"record {first.sequence}: {first.detail}")

    async def close(self) -> None:
        """Stop sending and close the channel."""
        if self._sender:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)
        await super().close()

    async def _while_sending(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, unless the sender ends first, which it only does by an error."""
        if self._sender is None:
            self._sender = asyncio.create_task(self._uplink.run())
        task = asyncio.create_task(work)
        try:
            await asyncio.wait((task, self._sender), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._sender.result()
            task.result()
        finally:
            task.cancel()


def _log_nack(nack: trajectory_pb2.Nack) -> None:
    _log.error("record %d was refused: %s %s", nack.sequence, nack.reason, nack.detail)


class Uplink:
    """Owns the un-acked records of one process, and sends them over a channel of somebody else's.

    One condition guards all state; `run` is the only sender, and `put` waits while `max_bytes`
    are un-acked, which stops new episodes and thereby bounds the actor's memory.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        run_id: str,
        actor_id: str,
        max_bytes: int,
        on_nack: Callable[[trajectory_pb2.Nack], None] = _log_nack,
    ) -> None:
        self._stub = trajectory_pb2_grpc.TrajectoryServiceStub(channel)
        self._run_id = run_id
        self._actor_id = actor_id
        self._max_bytes = max_bytes
        self._on_nack = on_nack
        self._records: deque[trajectory_pb2.TrajectoryRecord] = deque()
        self._bytes = 0
        self._num_sent = 0
        self._bytes_sent = 0
        self._first_sequence = 0
        self._welcome = trajectory_pb2.Welcome()
        self._credits = trajectory_pb2.Credits()
        self._changed = asyncio.Condition()
        self._raw_bytes = metrics.WIRE_BYTES.labels("sent", "raw")
        self._compressed_bytes = metrics.WIRE_BYTES.labels("sent", "compressed")

    @property
    def num_unacked(self) -> int:
        """Records that the learner has not acked."""
        return len(self._records)

    async def put(self, lease: Lease, trajectory: Trajectory) -> None:
        """Hand over a finished episode; waits while too many bytes are un-acked."""
        payload = encode_trajectory(trajectory)
        record = trajectory_pb2.TrajectoryRecord(
            lease_id=lease.lease_id,
            task_key=common_pb2.TaskKey(ordinal=lease.ordinal, sample_index=lease.sample_index),
            outcome=trajectory.outcome,
            encoding=common_pb2.ENCODING_ZSTD,
            payload=payload,
            payload_digest=hashlib.sha256(payload).digest(),
        )
        self._raw_bytes.inc(decoded_size(payload, record.encoding))
        self._compressed_bytes.inc(len(payload))
        async with self._changed:
            await self._changed.wait_for(lambda: not self._records or self._fits(len(payload)))
            self._records.append(record)
            self._count(len(payload))
            self._changed.notify_all()

    async def flush(self) -> None:
        """Wait until everything is acked."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._records)

    async def run(self) -> None:
        """Keep a stream to the learner until cancelled.

        Raises:
            PushRefusedError: the learner answered Hello with an error that will not pass.
        """
        said = -math.inf
        while True:
            call = self._stub.PushTrajectories()
            try:
                await self._serve(call)
            except grpc.aio.AioRpcError as error:
                if time.monotonic() - said > _SAY_SECONDS:
                    said = time.monotonic()
                    _log.warning(
                        "trajectory stream ended (%s: %s); %d records wait; reconnecting",
                        error_reason(error),
                        error.details(),
                        len(self._records),
                    )
            finally:
                call.cancel()
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _serve(self, call: Any) -> None:
        await self._begin(await self._greet(call))
        sender = asyncio.create_task(self._send(call))
        try:
            async for response in _responses(call):
                await self._receive(response)
        finally:
            # A write that failed says no more than the read that ended: the call's status does.
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        await _raise_status(call)

    async def _greet(self, call: Any) -> trajectory_pb2.Welcome:
        hello = trajectory_pb2.Hello(
            run_id=self._run_id,
            actor_id=self._actor_id,
            incarnation=self._welcome.incarnation,
            first_unacked_sequence=self._first_sequence,
        )
        try:
            await call.write(trajectory_pb2.PushTrajectoriesRequest(hello=hello))
            response = await call.read()
            if response is grpc.aio.EOF:
                await _raise_status(call)
        except grpc.aio.AioRpcError as error:
            if error.code() not in _PERMANENT:
                raise
            raise PushRefusedError(
                f"the learner takes no trajectories of {self._actor_id!r}: "
                f"{error_reason(error)}: {error.details()}"
            ) from None
        welcome: trajectory_pb2.Welcome = response.welcome
        return welcome

    async def _begin(self, welcome: trajectory_pb2.Welcome) -> None:
        async with self._changed:
            if welcome.incarnation == self._welcome.incarnation:
                self._drop(welcome.next_sequence)
            self._welcome = welcome
            self._credits = welcome.credits
            self._first_sequence = welcome.next_sequence
            self._num_sent = self._bytes_sent = 0

    async def _send(self, call: Any) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(self._may_send)
                # One turn of a busy event loop sends all that is ready, not one record.
                records = [self._take_next()]
                size = len(records[0].payload)
                while len(records) < _MESSAGE_RECORDS and self._may_send():
                    size += len(self._records[self._num_sent].payload)
                    if size > _MESSAGE_BYTES:
                        break
                    records.append(self._take_next())
            request = trajectory_pb2.PushTrajectoriesRequest()
            request.records.records.extend(records)  # one copy; given to constructors, two
            await call.write(request)

    def _take_next(self) -> trajectory_pb2.TrajectoryRecord:
        record = self._records[self._num_sent]
        if len(record.payload) > self._welcome.max_payload_bytes:
            self._replace_payload(record)
        record.incarnation = self._welcome.incarnation
        record.epoch = self._welcome.epoch
        record.sequence = self._first_sequence + self._num_sent
        self._num_sent += 1
        self._bytes_sent += len(record.payload)
        return record

    def _replace_payload(self, record: trajectory_pb2.TrajectoryRecord) -> None:
        """A record that the learner would refuse for its size becomes a failed episode."""
        limit = self._welcome.max_payload_bytes
        _log.error("trajectory of %d bytes is above the limit of %d", len(record.payload), limit)
        self._count(-len(record.payload))
        record.outcome = trajectory_pb2.OUTCOME_ACTOR_FAILED
        record.encoding = common_pb2.ENCODING_RAW
        record.payload = trajectory_pb2.Trajectory(
            outcome=record.outcome, detail=f"TOO_LARGE: the trajectory is above {limit} bytes"
        ).SerializeToString()
        record.payload_digest = hashlib.sha256(record.payload).digest()
        self._count(len(record.payload))

    def _may_send(self) -> bool:
        if self._num_sent >= min(len(self._records), self._credits.records):
            return False
        size = len(self._records[self._num_sent].payload)
        return self._bytes_sent + size <= self._credits.payload_bytes

    async def _receive(self, response: trajectory_pb2.PushTrajectoriesResponse) -> None:
        if response.HasField("nack"):
            self._on_nack(response.nack)
            return
        async with self._changed:
            self._credits = response.ack.credits
            self._drop(response.ack.next_sequence)
            self._changed.notify_all()

    def _drop(self, next_sequence: int) -> None:
        while self._records and self._first_sequence < next_sequence:
            size = len(self._records.popleft().payload)
            self._count(-size)
            self._first_sequence += 1
            if self._num_sent:
                self._num_sent -= 1
                self._bytes_sent -= size

    def _fits(self, num_bytes: int) -> bool:
        return self._bytes + num_bytes <= self._max_bytes

    def _count(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        metrics.UNACKED_BYTES.set(self._bytes)


async def _responses(call: Any) -> AsyncIterator[trajectory_pb2.PushTrajectoriesResponse]:
    while (response := await call.read()) is not grpc.aio.EOF:
        yield response


async def _raise_status(call: Any) -> None:
    raise grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        await call.details(),
    )
