"""What happens round every handler: counting, timing, and mapping of errors to statuses."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from understudy import metrics
from understudy.rpc.errors import ServiceError

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_log = logging.getLogger(__name__)
_KINDS = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}


class HandlerInterceptor(grpc.aio.ServerInterceptor):
    """Wraps each method's handler once and hands the wrapped one out from then on."""

    def __init__(self) -> None:
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        name = handler_call_details.method
        if name not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None or not name.startswith("/understudy."):
                return handler
            self._wrapped[name] = _wrap(name, handler)
        return self._wrapped[name]


class _Call:
    """Metrics of one method."""

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        _, service, method = name.split("/")
        self.labels = (kind, service, method)
        self.started = metrics.GRPC_SERVER_STARTED.labels(*self.labels)
        self.handled: dict[str, Any] = {}
        self.seconds = metrics.GRPC_SERVER_SECONDS.labels(*self.labels)

    def done(self, code: grpc.StatusCode) -> None:
        child = self.handled.get(code.name)
        if child is None:
            child = metrics.GRPC_SERVER_HANDLED.labels(*self.labels, code.name)
            self.handled[code.name] = child
        child.inc()

    async def fail(self, error: BaseException, context: Any) -> None:
        """End the call with the error's status; never returns normally."""
        if isinstance(error, DecodeError):
            error = ServiceError(
                grpc.StatusCode.INVALID_ARGUMENT, "BAD_MESSAGE", f"{self.name}: {error}"
            )
        if isinstance(error, ServiceError):
            self.done(error.code)
            await context.abort_with_status(error.to_status())
        if isinstance(error, asyncio.CancelledError):
            self.done(grpc.StatusCode.CANCELLED)
            raise error
        if isinstance(error, grpc.aio.AbortError):
            self.done(grpc.StatusCode.UNKNOWN)
            raise error
        self.done(grpc.StatusCode.INTERNAL)
        _log.error("%s failed", self.name, exc_info=error)
        hidden = ServiceError(grpc.StatusCode.INTERNAL, "INTERNAL", "see the server's log")
        await context.abort_with_status(hidden.to_status())


def _wrap(name: str, handler: Any) -> Handler:
    call = _Call(name, _KINDS[(handler.request_streaming, handler.response_streaming)])
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[(handler.request_streaming, handler.response_streaming)]
    inner = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    wrap = _stream if handler.response_streaming else _unary
    if handler.request_streaming:
        return make(wrap(call, inner), handler.request_deserializer, handler.response_serializer)
    # A single request is decoded inside, so that bytes that are no message are an error like others
    # and not an exception whose text grpc sends to the peer.
    decode = handler.request_deserializer
    decoded = wrap(call, lambda request, context: inner(decode(request), context))
    return make(decoded, None, handler.response_serializer)


def _unary(
    call: _Call, inner: Callable[[Any, Any], Awaitable[Any]]
) -> Callable[[Any, Any], Awaitable[Any]]:
    async def handle(request: Any, context: Any) -> Any:
        call.started.inc()
        start = time.perf_counter()
        try:
            response = await inner(request, context)
        except BaseException as error:  # every ending is counted and mapped in one place
            await call.fail(error, context)
            raise
        finally:
            call.seconds.observe(time.perf_counter() - start)
        call.done(grpc.StatusCode.OK)
        return response

    return handle


def _stream(
    call: _Call, inner: Callable[[Any, Any], AsyncGenerator[Any, None]]
) -> Callable[[Any, Any], Awaitable[None]]:
    async def handle(request: Any, context: Any) -> None:
        # A coroutine that drives the generator: grpc would abandon a generator whose peer went away
        # between two messages, and what it holds would stay behind.
        call.started.inc()
        try:
            async with contextlib.aclosing(inner(request, context)) as responses:
                async for response in responses:
                    await context.write(response)
        except BaseException as error:  # every ending is counted and mapped in one place
            await call.fail(error, context)
            raise
        # Also for a stream that was cancelled while it waited for a request: its requests just end.
        call.done(grpc.StatusCode.OK)

    return handle
