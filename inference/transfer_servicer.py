"""TransferService: keeps the order of a transfer's steps and their deadlines; decodes and encodes.

    STARTING -> IDLE -> JOINED -> PAUSED -> RECEIVED -> JOINED ...      any of them -> FAILED

A step that is late or fails cannot be called off: a worker may stand in a collective for ever. So
the engine fails as a whole, which ends the process.
"""

import asyncio
import enum
import json
import logging
from collections.abc import Awaitable
from typing import TypeVar

import grpc

from inference.probe import decode_probe
from inference.receiver import Info, ReceivingEngine
from inference.reporter import Reporter
from understudy.rpc import Service, ServiceError
from understudy.trajectory import FloatArray, IntArray
from understudy.v1 import transfer_pb2, transfer_pb2_grpc, weight_pb2
from understudy.weights.errors import WeightsRefusedError

MAX_MESSAGE_BYTES = 32 * 2**20
"""Largest message to an inference server: an update names every tensor."""
_RETRY_SECONDS = 1.0
_log = logging.getLogger(__name__)
T = TypeVar("T")


class _State(enum.Enum):
    STARTING = "still starting"
    IDLE = "in no group"
    JOINED = "between updates"
    PAUSED = "waiting for UpdateWeights"
    RECEIVED = "waiting for FinishUpdate"
    BUSY = "in a step"
    FAILED = "ending"


class TransferServicer(transfer_pb2_grpc.TransferServiceServicer):
    """Leads one engine through transfers.

    Args:
        engine: that receives.
        seconds: deadline of each step, and from one step of an update to the next.
    """

    def __init__(self, engine: ReceivingEngine, seconds: float) -> None:
        self.ready = asyncio.Event()
        """Set once the first version is served."""
        self._engine = engine
        self._seconds = seconds
        self._state = _State.STARTING
        self._epoch = 0
        self._reporter: Reporter | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._next_step: asyncio.TimerHandle | None = None
        """Ends the engine if the next step of an update does not come."""

    @property
    def service(self) -> Service:
        """What a server registers."""
        return Service(
            name="understudy.v1.TransferService",
            add=transfer_pb2_grpc.add_TransferServiceServicer_to_server,
            servicer=self,
        )

    def started(self, reporter: Reporter) -> None:
        """The engine is ready for a trainer."""
        self._reporter = reporter
        self._state = _State.IDLE

    async def DescribeReceiver(
        self, request: transfer_pb2.DescribeReceiverRequest, context: object
    ) -> transfer_pb2.DescribeReceiverResponse:
        if self._state not in (_State.IDLE, _State.JOINED):
            raise self._unavailable()
        return transfer_pb2.DescribeReceiverResponse(
            num_workers=self._engine.num_workers, epoch=self._epoch
        )

    async def InitTransfer(
        self, request: transfer_pb2.InitTransferRequest, context: object
    ) -> transfer_pb2.InitTransferResponse:
        self._require("InitTransfer", _State.IDLE, _State.JOINED)
        if request.epoch < self._epoch:
            raise self._old_epoch(request.epoch)
        info = _decode(request.info)
        await self._step("InitTransfer", self._engine.init_transfer(info), _State.JOINED)
        self._epoch = request.epoch
        return transfer_pb2.InitTransferResponse()

    async def StartUpdate(
        self, request: transfer_pb2.StartUpdateRequest, context: object
    ) -> transfer_pb2.StartUpdateResponse:
        self._require("StartUpdate", _State.JOINED)
        self._require_epoch(request.epoch)
        if self._reporting:
            self._reporting.cancel()  # it would compare two versions
        await self._step("StartUpdate", self._engine.start_update(), _State.PAUSED)
        return transfer_pb2.StartUpdateResponse()

    async def UpdateWeights(
        self, request: transfer_pb2.UpdateWeightsRequest, context: object
    ) -> transfer_pb2.UpdateWeightsResponse:
        self._require("UpdateWeights", _State.PAUSED)
        self._require_epoch(request.epoch)
        info = _decode(request.info)
        await self._step("UpdateWeights", self._engine.receive_weights(info), _State.RECEIVED)
        return transfer_pb2.UpdateWeightsResponse()

    async def FinishUpdate(
        self, request: transfer_pb2.FinishUpdateRequest, context: object
    ) -> transfer_pb2.FinishUpdateResponse:
        self._require("FinishUpdate", _State.RECEIVED)
        self._require_epoch(request.epoch)
        if request.version <= self._engine.version:
            raise _bad("OLD_VERSION", f"{request.version}; served was {self._engine.version}")
        probe = self._decode_probe(request.probe)
        work = self._engine.finish_update(request.version)
        pause_seconds = await self._step("FinishUpdate", work, _State.JOINED)
        self.ready.set()
        assert self._reporter
        report = self._reporter.report(
            version=request.version,
            step=request.step,
            probe=probe,
            pause_seconds=pause_seconds,
            apply_seconds=pause_seconds,
        )
        self._reporting = asyncio.create_task(report)
        return transfer_pb2.FinishUpdateResponse()

    async def _step(self, name: str, work: Awaitable[T], following: _State) -> T:
        """Do a step within its deadline, whatever comes of its caller.

        Raises:
            ServiceError: TRANSFER_LATE, TRANSFER_FAILED; the engine has failed then.
        """
        if self._next_step:
            self._next_step.cancel()
        self._state = _State.BUSY
        try:
            async with asyncio.timeout(self._seconds):
                done = await work
        except asyncio.CancelledError:
            self._fail(f"the trainer went away during {name}")
            raise
        except TimeoutError:
            cause = self._fail(f"{name} took more than {self._seconds:g} s")
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise ServiceError(code, "TRANSFER_LATE", cause) from None
        except Exception as error:  # whatever the worker raised, in vLLM's or torch's words
            cause = self._fail(f"{name} failed: {error}")
            raise ServiceError(grpc.StatusCode.INTERNAL, "TRANSFER_FAILED", cause) from error
        self._state = following
        if following is not _State.JOINED:
            self._next_step = asyncio.get_running_loop().call_later(
                self._seconds, self._fail, f"nothing followed {name} in {self._seconds:g} s"
            )
        return done

    def _fail(self, cause: str) -> str:
        text = f"a transfer of weights broke: {cause}; weights are undefined, start this replica "
        text += "again (the trainer starts again by itself)"
        _log.error("%s", text)
        self._state = _State.FAILED
        self._engine.fail(text)
        return text

    def _require(self, name: str, *states: _State) -> None:
        if self._state in (_State.STARTING, _State.FAILED):
            raise self._unavailable()
        if self._state not in states:
            raise _precondition(
                "OUT_OF_ORDER", f"{name} is not next: this replica is {self._state.value}"
            )

    def _require_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise self._old_epoch(epoch)

    def _old_epoch(self, epoch: int) -> ServiceError:
        return _precondition("OLD_EPOCH", f"epoch {epoch}; the newest is {self._epoch}")

    def _unavailable(self) -> ServiceError:
        reason = "DRAINING" if self._state is _State.FAILED else "STARTING"
        return ServiceError(
            grpc.StatusCode.UNAVAILABLE,
            reason,
            f"this replica is {self._state.value}",
            retry_after_seconds=_RETRY_SECONDS,
        )

    def _decode_probe(self, probe: weight_pb2.LogprobProbe) -> tuple[IntArray, FloatArray] | None:
        try:
            return decode_probe(probe, self._engine.vocab_size, self._engine.max_model_len)
        except WeightsRefusedError as error:
            raise _bad("BAD_INFO", f"probe: {error.detail}") from None


def _decode(info: bytes) -> Info:
    try:
        decoded = json.loads(info)
    except ValueError:
        decoded = None
    if not isinstance(decoded, dict):
        raise _bad("BAD_INFO", f"info has {len(info)} bytes that are no JSON object")
    return decoded


def _bad(reason: str, message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.INVALID_ARGUMENT, reason, message)


def _precondition(reason: str, message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.FAILED_PRECONDITION, reason, message)
