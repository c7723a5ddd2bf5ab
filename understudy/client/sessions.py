"""The client's end of a stream of sessions: what is asked at one time travels together."""

import asyncio
import contextlib
from typing import Any

import grpc

from understudy.rpc import ServiceError
from understudy.rpc.channels import MEBIBYTE
from understudy.v1 import environment_pb2

_MESSAGE_BYTES = MEBIBYTE - 2**10
"""Requests that one message packs, and the largest that a server takes; the rest is for framing."""
_MESSAGE_REQUESTS = 2**10
_OVERWRITTEN = (grpc.StatusCode.INTERNAL, "Internal error from Core")
"""What grpcio puts in the place of a call's status if the call ends while a request is written:
github.com/grpc/grpc/issues/36066. What the server said is lost."""
_CODES = {code.value[0]: code for code in grpc.StatusCode}

Request = environment_pb2.SessionRequest
Response = environment_pb2.SessionResponse


class SessionStream:
    """Sends requests of sessions over one call, and gives each session its own answers.

    When the call ends, all that wait for an answer get its status, and `ended` is set.
    """

    def __init__(self, call: "grpc.aio.StreamStreamCall[Any, Any]") -> None:
        self._call = call
        self._open: set[int] = set()
        self._failed: dict[int, environment_pb2.SessionFailure] = {}
        """Why sessions are over that were not asking anything then."""
        self._waiting: dict[int, asyncio.Future[Response]] = {}
        self._outbox: list[Request] = []
        self._filled = asyncio.Event()
        self.ended = False
        self._writer = asyncio.create_task(self._write())
        self._reader = asyncio.create_task(self._read())

    async def ask(self, request: Request) -> Response:
        """Send a session's next request and wait for its answer.

        Raises:
            grpc.aio.AioRpcError: the session failed, or the call ended.
        """
        if request.ByteSize() > _MESSAGE_BYTES:
            raise _too_large(request.ByteSize()).to_rpc_error()
        if failure := self._failed.get(request.session):
            raise _error(failure)
        if self.ended:
            raise await self._status()
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiting[request.session] = answer
        self._open.add(request.session)
        self._send(request)
        try:
            response = await answer
        finally:
            self._waiting.pop(request.session, None)
        if response.HasField("failure"):
            self._open.discard(request.session)
            raise _error(response.failure)
        if response.step.terminated or response.step.truncated:
            self._open.discard(request.session)
        return response

    def give_up(self, session: int) -> None:
        """The caller is done with a session, whether it is over or not."""
        self._failed.pop(session, None)
        if session in self._open:
            self._open.discard(session)
            self._send(Request(session=session, close=environment_pb2.CloseRequest()))

    async def close(self) -> None:
        """End the call."""
        self._call.cancel()
        await asyncio.wait([self._reader])

    def _send(self, request: Request) -> None:
        self._outbox.append(request)
        self._filled.set()

    async def _write(self) -> None:
        # Whether the call has ended, and how, is for the reader to find.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._filled.wait()
                while self._outbox:
                    await self._call.write(environment_pb2.SessionsRequest(requests=self._pack()))
                self._filled.clear()

    def _pack(self) -> list[Request]:
        """Take as many requests as one message has room for."""
        count = size = 0
        for request in self._outbox[:_MESSAGE_REQUESTS]:
            size += request.ByteSize() + 8  # what frames it in the message
            if count and size > _MESSAGE_BYTES:
                break
            count += 1
        packed, self._outbox = self._outbox[:count], self._outbox[count:]
        return packed

    async def _read(self) -> None:
        try:
            while isinstance(message := await self._call.read(), environment_pb2.SessionsResponse):
                for response in message.responses:
                    self._receive(response)
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass  # the call's status says it
        finally:
            self.ended = True
            self._writer.cancel()
            # An abandoned call is never collected: cancel ends it whatever its state.
            self._call.cancel()
            error = await self._status()
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(error)

    def _receive(self, response: Response) -> None:
        answer = self._waiting.get(response.session)
        if answer and not answer.done():
            answer.set_result(response)
        elif response.session in self._open and response.HasField("failure"):
            self._failed[response.session] = response.failure

    async def _status(self) -> grpc.aio.AioRpcError:
        code, details = await self._call.code(), await self._call.details()
        if code is grpc.StatusCode.OK:  # it drained, and this session came too late
            return _unavailable("DRAINING", "the environment server drains")
        if (code, details) == _OVERWRITTEN:
            return _unavailable("STREAM_ENDED", "the environment server ended the stream")
        return grpc.aio.AioRpcError(
            code,
            await self._call.initial_metadata(),
            await self._call.trailing_metadata(),
            details,
        )


def _error(failure: environment_pb2.SessionFailure) -> grpc.aio.AioRpcError:
    hint = failure.retry_after.ToNanoseconds() / 1e9 if failure.HasField("retry_after") else None
    code = _CODES.get(failure.code, grpc.StatusCode.UNKNOWN)
    return ServiceError(code, failure.reason, failure.message, hint).to_rpc_error()


def _unavailable(reason: str, message: str) -> grpc.aio.AioRpcError:
    """The stream is over; another one, or another server, may do."""
    return ServiceError(grpc.StatusCode.UNAVAILABLE, reason, message, 1.0).to_rpc_error()


def _too_large(size: int) -> ServiceError:
    return ServiceError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "TOO_LARGE",
        f"a request of {size} bytes is above {_MESSAGE_BYTES}",
    )
