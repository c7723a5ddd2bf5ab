"""TrajectoryService: takes the trajectories of actors.

    requests -> [reader: check, decode, deliver] -> next_sequence -> [responses: Nack, Ack]

One stream is one reader task and one generator of responses. The reader never waits for acks to be
sent; an ack covers whatever was taken in the milliseconds since the first record that it acks, so
that a burst of records costs one.
"""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
from google.protobuf.message import DecodeError

from learner.intake.actors import Actors, Incarnation
from learner.intake.credits import MAX_PAYLOAD_BYTES, Grant, Window, grant
from learner.intake.intake import Intake
from learner.intake.ledger import IDS_PER_EPOCH
from learner.intake.records import Inspector, decode_key
from learner.intake.refusals import RefusedError, draining, mapped
from understudy import failpoints, metrics
from understudy.trajectory import MAX_DECODED_BYTES, TrajectoryError, decoded_size
from understudy.v1 import log_pb2, trajectory_pb2, trajectory_pb2_grpc
from understudy.wire import WireError, check_num_fields

_log = logging.getLogger(__name__)

Requests = AsyncIterator[trajectory_pb2.PushTrajectoriesRequest]
Response = trajectory_pb2.PushTrajectoriesResponse
_RECORDS = trajectory_pb2.PushTrajectoriesRequest.RECORDS_FIELD_NUMBER

ACK_DELAY_SECONDS = 0.005
"""Longest that an ack waits for more records to ack."""
BURST_RECORDS = 64
"""Records that are acked without further delay."""
MAX_MESSAGE_FIELDS = 2**12
"""Most fields of a message, of which each record is one; clients pack 64 records."""
MAX_ACTOR_ID_BYTES = 64
DIGEST_BYTES = 32
"""Of SHA-256; what is longer is wrong, and not kept."""


class TrajectoryServicer(trajectory_pb2_grpc.TrajectoryServiceServicer):
    """Serves the streams of all actors."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self.epoch = epoch = intake.state.epoch
        self.run_id = intake.config.run.name
        self.max_payload_bytes = min(MAX_PAYLOAD_BYTES, intake.config.learner.log.buffer_bytes)
        self.actors = Actors(epoch * IDS_PER_EPOCH + 1)
        self.streams: set[Stream] = set()
        self.inspector = Inspector(intake, self.max_payload_bytes)
        self.closed = False

    def grant(self) -> Grant:
        """Credits of one stream, as things stand."""
        buffer_bytes = self.intake.config.learner.log.buffer_bytes
        free = 0 if self.intake.log.throttled else buffer_bytes
        return grant(free, len(self.streams), self.max_payload_bytes)

    def room_freed(self) -> None:
        """Streams that were left without credits, if there are any, get some."""
        for stream in self.streams:
            if not stream.window.current.records:
                stream.wake.set()

    def close(self) -> None:
        """End all streams once what they sent is acked; refuse new ones."""
        self.closed = True
        for stream in self.streams:
            stream.wake.set()

    async def PushTrajectories(
        self, requests: Requests, context: object
    ) -> AsyncIterator[Response]:
        with mapped():
            if self.closed:
                raise draining()
            stream = await self._open(await anext(requests, None))
            self.streams.add(stream)
            reader = asyncio.create_task(stream.read(requests))
            try:
                yield Response(welcome=stream.welcome())
                async for response in stream.responses(reader):
                    yield response
            finally:
                self.streams.discard(stream)
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def _open(self, first: trajectory_pb2.PushTrajectoriesRequest | None) -> "Stream":
        if first is None or not first.HasField("hello"):
            raise RefusedError("BAD_HELLO", "the first message is a hello")
        hello = first.hello
        if hello.run_id not in ("", self.run_id):
            raise RefusedError("RUN_MISMATCH", f"run {hello.run_id!r}; served is {self.run_id!r}")
        if not 0 < len(hello.actor_id.encode()) <= MAX_ACTOR_ID_BYTES:
            raise RefusedError(
                "BAD_HELLO", f"actor_id {hello.actor_id!r} is empty or above {MAX_ACTOR_ID_BYTES} B"
            )
        incarnation = await self.actors.welcome(
            hello.actor_id, hello.incarnation, hello.first_unacked_sequence
        )
        return Stream(self, hello.actor_id, incarnation)


def add_service(servicer: TrajectoryServicer, server: grpc.aio.Server) -> None:
    """Register the servicer as the generated function does, with a decoder of our own."""
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.PushTrajectories, _decode_request, Response.SerializeToString
    )
    name = trajectory_pb2.DESCRIPTOR.services_by_name["TrajectoryService"].full_name
    handlers = grpc.method_handlers_generic_handler(name, {"PushTrajectories": handler})
    server.add_generic_rpc_handlers((handlers,))


def _decode_request(data: bytes) -> trajectory_pb2.PushTrajectoriesRequest:
    try:
        check_num_fields(data, _RECORDS, MAX_MESSAGE_FIELDS)
    except WireError as error:
        raise DecodeError(f"the message {error}; send fewer records at one time") from None
    return trajectory_pb2.PushTrajectoriesRequest.FromString(data)


class Stream:
    """One actor's stream: how far its records were taken, and what is still to be answered."""

    def __init__(
        self, servicer: TrajectoryServicer, actor_id: str, incarnation: Incarnation
    ) -> None:
        self.servicer = servicer
        self.actor_id = actor_id
        self.incarnation = incarnation
        self.window = Window()
        self.wake = asyncio.Event()
        self._acked = incarnation.next_sequence
        self._num_answers = 0
        """Records taken or seen again since the last ack."""
        self._nacks: list[trajectory_pb2.Nack] = []
        self._raw_bytes = metrics.WIRE_BYTES.labels("received", "raw")
        self._compressed_bytes = metrics.WIRE_BYTES.labels("received", "compressed")

    def welcome(self) -> trajectory_pb2.Welcome:
        """The answer to Hello."""
        self.window.open(self.servicer.grant())
        return trajectory_pb2.Welcome(
            epoch=self.servicer.epoch,
            incarnation=self.incarnation.number,
            next_sequence=self._acked,
            credits=self._credits(),
            max_payload_bytes=self.servicer.max_payload_bytes,
            max_decoded_bytes=MAX_DECODED_BYTES,
        )

    async def read(self, requests: Requests) -> None:
        """Take records until the stream ends."""
        try:
            async for request in requests:
                if not request.HasField("records"):
                    raise RefusedError("OUT_OF_ORDER", "after the hello come records only")
                for record in request.records.records:
                    await self._take(record)
                    self._num_answers += 1
                self.wake.set()
        finally:
            self.wake.set()

    async def responses(self, reader: asyncio.Task[None]) -> AsyncIterator[Response]:
        """Nacks and acks until the reader has ended and all it took is answered."""
        while True:
            await self.wake.wait()
            if not reader.done() and self._num_answers < BURST_RECORDS:
                await asyncio.sleep(ACK_DELAY_SECONDS)
            ended = reader.done() or self.servicer.closed
            self.wake.clear()
            nacks, self._nacks = self._nacks, []
            # A nack counts as an ack: it waits for the disk as well.
            must_ack = self._num_answers or not self.window.current.records
            ack = await self._ack() if must_ack else None
            for nack in nacks:
                yield Response(nack=nack)
            if ack:
                yield Response(ack=ack)
            if ended:
                break
        if self.servicer.closed:
            raise draining()
        await reader  # raises what ended it

    async def _ack(self) -> trajectory_pb2.Ack:
        self._num_answers = 0
        self._acked = self.incarnation.next_sequence
        acked = self._acked
        self.window.open(self.servicer.grant())
        await self.servicer.intake.log.flush()
        failpoints.hit("intake.before_ack")
        return trajectory_pb2.Ack(next_sequence=acked, credits=self._credits())

    def _credits(self) -> trajectory_pb2.Credits:
        current = self.window.current
        return trajectory_pb2.Credits(records=current.records, payload_bytes=current.payload_bytes)

    async def _take(self, record: trajectory_pb2.TrajectoryRecord) -> None:
        payload = record.payload
        self._check_envelope(record, len(payload))
        self._compressed_bytes.inc(len(payload))
        origin = log_pb2.RecordOrigin(
            actor_id=self.actor_id,
            incarnation=self.incarnation.number,
            sequence=record.sequence,
        )
        await self.servicer.intake.log.room()
        async with self.incarnation.lock:
            # A stream that took over while this one waited answers the record in its stead.
            self.servicer.actors.require_newest(self.actor_id, self.incarnation)
            if record.sequence < self.incarnation.next_sequence:
                self._take_again(record, payload, origin)
            else:
                await self._take_new(record, payload, origin)

    async def _take_new(
        self,
        record: trajectory_pb2.TrajectoryRecord,
        payload: bytes,
        origin: log_pb2.RecordOrigin,
    ) -> None:
        try:
            taken = await self.servicer.inspector.take(record, payload, origin)
        except TrajectoryError as error:
            self._reject(record.sequence, error.reason, error.detail)
        else:
            if taken:
                self._raw_bytes.inc(decoded_size(payload, record.encoding))
            else:
                metrics.TRAJECTORIES_DUPLICATE.inc()
        self.incarnation.answered(record.payload_digest[:DIGEST_BYTES])

    def _take_again(
        self,
        record: trajectory_pb2.TrajectoryRecord,
        payload: bytes,
        origin: log_pb2.RecordOrigin,
    ) -> None:
        """A sequence number that was answered before: a resend, or another record."""
        metrics.TRAJECTORIES_DUPLICATE.inc()
        if not self.incarnation.conflicts(record.sequence, record.payload_digest[:DIGEST_BYTES]):
            return
        _log.error(
            "actor %r sent two records as %d of incarnation %d; the second is in quarantine",
            self.actor_id,
            record.sequence,
            origin.incarnation,
        )
        self.servicer.intake.ledger.answer(
            origin,
            decode_key(record),
            log_pb2.ANSWER_CONFLICT,
            "CONFLICT",
            payload if len(payload) <= self.servicer.max_payload_bytes else b"",
        )
        self._reject(
            record.sequence, "CONFLICT", "another record had this sequence number; renumber it"
        )

    def _reject(self, sequence: int, reason: str, detail: str) -> None:
        self._nacks.append(trajectory_pb2.Nack(sequence=sequence, reason=reason, detail=detail))

    def _check_envelope(self, record: trajectory_pb2.TrajectoryRecord, size: int) -> None:
        if record.epoch != self.servicer.epoch:
            raise RefusedError(
                "OLD_EPOCH", f"record.epoch {record.epoch}; this intake's is {self.servicer.epoch}"
            )
        if record.incarnation != self.incarnation.number:
            raise RefusedError(
                "OLD_INCARNATION",
                f"record.incarnation {record.incarnation}; welcomed was {self.incarnation.number}",
            )
        self.servicer.actors.require_newest(self.actor_id, self.incarnation)
        if record.sequence > self.incarnation.next_sequence:
            raise RefusedError(
                "OUT_OF_ORDER",
                f"record.sequence {record.sequence}; expected is {self.incarnation.next_sequence}",
            )
        # One that is too large is rejected by its own name, not for the credits that it takes.
        self.window.take(size if size <= self.servicer.max_payload_bytes else 0)
