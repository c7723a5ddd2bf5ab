"""Calls over real gRPC: their errors, their limits, their metrics, their endings."""

import asyncio
import contextlib
from collections.abc import Callable

import grpc
import pytest
from grpc import StatusCode
from prometheus_client import REGISTRY

from conftest import serving
from rpc_faults import NETWORK, SERVICE, Faults, as_service, describe, faults
from understudy.rpc import error_reason, open_channel, retry_after_seconds
from understudy.v1 import environment_pb2, environment_pb2_grpc


async def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.02)


# --- Errors ---


async def test_a_service_error_arrives_with_reason_and_retry_hint() -> None:
    async with faults() as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DescribeSuite(describe("refuse"))
    error = caught.value
    assert (error.code(), error.details()) == (StatusCode.NOT_FOUND, "no such suite")
    assert (error_reason(error), retry_after_seconds(error)) == ("UNKNOWN_SUITE", 2.5)


def a_reset(suite: str) -> environment_pb2.SessionsRequest:
    request = environment_pb2.SessionsRequest()
    request.requests.add().reset.task.suite = suite
    return request


def a_step() -> environment_pb2.SessionsRequest:
    request = environment_pb2.SessionsRequest()
    request.requests.add().step.turn = 0
    return request


async def test_an_unknown_exception_keeps_its_text_on_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with faults() as (_, stub):
        call = stub.Sessions()
        await call.write(a_step())
        for wait in (stub.DescribeSuite(describe("fail")), call.read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await wait
            assert caught.value.code() == StatusCode.INTERNAL
            assert caught.value.details() == "see the server's log"
            assert error_reason(caught.value) == "INTERNAL"
            assert retry_after_seconds(caught.value) is None
    assert caplog.text.count("RuntimeError: a secret of the server") == 2


async def test_an_error_that_is_not_ours_is_named_by_its_code() -> None:
    async with faults() as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DescribeSuite(describe("abort"))
    assert error_reason(caught.value) == "DATA_LOSS"
    assert retry_after_seconds(caught.value) is None


async def test_garbage_is_refused_and_the_server_lives(caplog: pytest.LogCaptureFixture) -> None:
    garbage = b"\xff" * 64
    async with serving(as_service(Faults())) as address:
        async with open_channel(address, NETWORK) as channel:
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(f"/{SERVICE}/DescribeSuite")(garbage, timeout=10)
                assert caught.value.code() == StatusCode.INVALID_ARGUMENT
                assert error_reason(caught.value) == "BAD_MESSAGE"
                stream = channel.stream_stream(f"/{SERVICE}/Sessions")(timeout=10)
                await stream.write(garbage)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stream.read()
                assert caught.value.code() == StatusCode.INVALID_ARGUMENT
                assert error_reason(caught.value) == "BAD_MESSAGE"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/describesuite")(b"", timeout=10)
            assert caught.value.code() == StatusCode.UNIMPLEMENTED
            stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
            assert (await stub.DescribeSuite(describe("ok"), timeout=10)).suite == "ok"
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("num_bytes", [2**20, 2**20 + 1])
async def test_the_limit_of_a_message_is_exact(num_bytes: int) -> None:
    request = describe("")
    request.suite = "x" * (num_bytes - 4)  # a tag and a length of three bytes
    assert request.ByteSize() == num_bytes
    async with faults() as (_, stub):
        if num_bytes <= 2**20:
            assert len((await stub.DescribeSuite(request)).suite) == num_bytes - 4
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.DescribeSuite(request)
            assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.DescribeSuite(describe("ok"))).suite == "ok"


@pytest.mark.parametrize("seconds", [0, 0.001, 0.2])
async def test_a_deadline_that_passed_ends_the_call_and_nothing_else(seconds: float) -> None:
    async with faults() as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DescribeSuite(describe("hang"), timeout=seconds)
        assert caught.value.code() == StatusCode.DEADLINE_EXCEEDED
        assert error_reason(caught.value) == "DEADLINE_EXCEEDED"
        assert (await stub.DescribeSuite(describe("ok"))).suite == "ok"


# --- Metrics and endings ---


def counted(name: str, kind: str, method: str, code: str = "") -> float:
    labels = {"grpc_type": kind, "grpc_service": SERVICE, "grpc_method": method}
    if code:
        labels["grpc_code"] = code
    return REGISTRY.get_sample_value(name, labels) or 0.0


def grown(after: list[float], before: list[float]) -> list[float]:
    return [new - old for new, old in zip(after, before, strict=True)]


async def test_unary_calls_are_counted_by_their_code() -> None:
    codes = {"ok": "OK", "refuse": "NOT_FOUND", "fail": "INTERNAL"}

    def figures() -> list[float]:
        handled = [
            counted("grpc_server_handled_total", "unary", "DescribeSuite", code)
            for code in codes.values()
        ]
        return [
            *handled,
            counted("grpc_server_started_total", "unary", "DescribeSuite"),
            counted("grpc_server_handling_seconds_count", "unary", "DescribeSuite"),
        ]

    before = figures()
    async with faults() as (_, stub):
        for suite in codes:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stub.DescribeSuite(describe(suite))
    assert grown(figures(), before) == [1, 1, 1, 3, 3]


async def test_streams_are_counted_by_their_code() -> None:
    codes = ("OK", "INTERNAL", "CANCELLED")

    def figures() -> list[float]:
        handled = [
            counted("grpc_server_handled_total", "bidi_stream", "Sessions", code) for code in codes
        ]
        return [*handled, counted("grpc_server_started_total", "bidi_stream", "Sessions")]

    before = figures()
    async with faults() as (servicer, stub):
        good, bad, left = stub.Sessions(), stub.Sessions(), stub.Sessions()
        await good.write(environment_pb2.SessionsRequest())
        await good.done_writing()
        assert [response async for response in good]
        await bad.write(a_step())
        with pytest.raises(grpc.aio.AioRpcError):
            await bad.read()
        servicer.entered.clear()
        await left.write(a_reset("hang"))
        await servicer.entered.wait()
        left.cancel()
        await wait_for(lambda: figures()[2] > before[2])
        assert servicer.closed == 3
    assert grown(figures(), before) == [1, 1, 1, 3]


@pytest.mark.parametrize("ending", ["cancel", "half close", "channel closed"])
async def test_a_stream_that_ends_runs_the_handlers_finally(ending: str) -> None:
    servicer = Faults()
    async with serving(as_service(servicer)) as address:
        channel = open_channel(address, NETWORK)
        call = environment_pb2_grpc.EnvironmentServiceStub(channel).Sessions()
        await call.write(environment_pb2.SessionsRequest())
        await call.read()
        match ending:
            case "cancel":
                call.cancel()
            case "half close":
                await call.done_writing()
            case "channel closed":
                await channel.close()
        await wait_for(lambda: servicer.closed)
        await channel.close()
    assert servicer.closed == 1


def num_handlers() -> int:
    """Calls that the server of this event loop handles now."""
    coroutines = [task.get_coro() for task in asyncio.all_tasks()]
    return sum("_schedule_rpc_coro" in getattr(each, "__qualname__", "") for each in coroutines)


async def test_a_thousand_calls_opened_and_cancelled_leave_nothing() -> None:
    async with faults() as (_, stub):
        call = stub.Sessions()
        await call.write(environment_pb2.SessionsRequest())
        await call.read()
        assert num_handlers() == 1
        call.cancel()
        for _ in range(20):
            calls = [stub.Sessions() for _ in range(50)]
            for call in calls:
                await call.write(environment_pb2.SessionsRequest())
            for call in calls:
                call.cancel()
        assert (await stub.DescribeSuite(describe("ok"), timeout=60)).suite == "ok"
        await wait_for(lambda: not num_handlers())
