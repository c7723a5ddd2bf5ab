"""The way of trajectories to the learner: kept until acked, resent after a broken stream.

    put() -> [un-acked records, oldest first] -> stream -> acks drop them from the front

Records get their sequence number when they are sent, from what the learner's Welcome says it
expects next; so a learner that restarted and forgot the incarnation is served just as well.
"""

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import grpc

from understudy import metrics
from understudy.client import Lease
from understudy.rpc import error_reason
from understudy.trajectory import Trajectory, encode_trajectory
from understudy.v1 import common_pb2, trajectory_pb2, trajectory_pb2_grpc

_log = logging.getLogger(__name__)
_RECONNECT_SECONDS = 0.5


class Uplink:
    """Owns the un-acked records of one actor process.

    One condition guards all state; `run` is the only sender, and `put` waits while `max_bytes`
    are un-acked, which stops new episodes and thereby bounds the actor's memory.
    """

    def __init__(
        self, channel: grpc.aio.Channel, run_id: str, actor_id: str, max_bytes: int
    ) -> None:
        self._stub = trajectory_pb2_grpc.TrajectoryServiceStub(channel)
        self._run_id = run_id
        self._actor_id = actor_id
        self._max_bytes = max_bytes
        self._records: deque[trajectory_pb2.TrajectoryRecord] = deque()
        self._bytes = 0
        self._num_sent = 0
        self._bytes_sent = 0
        self._first_sequence = 0
        self._welcome = trajectory_pb2.Welcome()
        self._credits = trajectory_pb2.Credits()
        self._changed = asyncio.Condition()

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
        metrics.WIRE_BYTES.labels("sent", "compressed").inc(len(payload))
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
        """Keep a stream to the learner until cancelled."""
        while True:
            call = self._stub.PushTrajectories()
            try:
                await self._serve(call)
            except grpc.aio.AioRpcError as error:
                _log.warning(
                    "trajectory stream ended (%s: %s); %d records wait",
                    error_reason(error),
                    error.details(),
                    len(self._records),
                )
            finally:
                call.cancel()
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _serve(self, call: Any) -> None:
        hello = trajectory_pb2.Hello(
            run_id=self._run_id,
            actor_id=self._actor_id,
            incarnation=self._welcome.incarnation,
            first_unacked_sequence=self._first_sequence,
        )
        await call.write(trajectory_pb2.PushTrajectoriesRequest(hello=hello))
        response = await call.read()
        if response is grpc.aio.EOF:
            return await _raise_status(call)
        await self._begin(response.welcome)
        sender = asyncio.create_task(self._send(call))
        try:
            async for response in _responses(call):
                await self._receive(response)
        finally:
            # A write that failed says no more than the read that ended: the call's status does.
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        await _raise_status(call)

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
                record = self._records[self._num_sent]
                if len(record.payload) > self._welcome.max_payload_bytes:
                    self._replace_payload(record)
                record.incarnation = self._welcome.incarnation
                record.epoch = self._welcome.epoch
                record.sequence = self._first_sequence + self._num_sent
                self._num_sent += 1
                self._bytes_sent += len(record.payload)
            await call.write(trajectory_pb2.PushTrajectoriesRequest(record=record))

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
            nack = response.nack
            _log.error("record %d was refused: %s %s", nack.sequence, nack.reason, nack.detail)
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
