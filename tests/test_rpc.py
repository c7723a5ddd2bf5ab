"""Servers and channels over real gRPC: their life, their errors, their metrics, their limits."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import REGISTRY

from conftest import serving
from envserver.servicer import EnvironmentServicer
from processes import ANY_PORT, finish, read_until, started, understudy
from suites import EchoSuite
from understudy.client import ControlClient, EnvironmentClient
from understudy.config import EnvserverConfig, NetworkConfig
from understudy.errors import ConfigError
from understudy.rpc import (
    RoleControl,
    RoleServer,
    Service,
    ServiceError,
    error_reason,
    open_channel,
    open_sync_channel,
    retry_after_seconds,
)
from understudy.v1 import (
    control_pb2,
    environment_pb2,
    environment_pb2_grpc,
)

StatusCode = grpc.StatusCode
NETWORK = NetworkConfig()
SERVICE = "understudy.v1.EnvironmentService"


class Faults(environment_pb2_grpc.EnvironmentServiceServicer):
    """Ends its calls as DescribeSuite's request says; counts sessions that were closed."""

    def __init__(self) -> None:
        self.closed = 0
        self.entered = asyncio.Event()

    async def DescribeSuite(self, request: Any, context: Any) -> Any:
        match request.suite:
            case "refuse":
                raise ServiceError(StatusCode.NOT_FOUND, "UNKNOWN_SUITE", "no such suite", 2.5)
            case "fail":
                raise RuntimeError("a secret of the server")
            case "abort":
                await context.abort(StatusCode.DATA_LOSS, "as the test asked")
            case "slow":
                self.entered.set()
                await asyncio.sleep(0.5)
            case "hang":
                self.entered.set()
                await asyncio.sleep(600)
        return environment_pb2.DescribeSuiteResponse(suite=request.suite)

    async def Session(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for request in requests:
                self.entered.set()
                if request.HasField("step"):
                    raise RuntimeError("a secret of the server")
                if request.reset.task.suite == "hang":
                    await asyncio.sleep(600)
                yield environment_pb2.SessionResponse()
        finally:
            self.closed += 1


def as_service(servicer: Any) -> Service:
    add = environment_pb2_grpc.add_EnvironmentServiceServicer_to_server
    return Service(name=SERVICE, add=add, servicer=servicer)


@asynccontextmanager
async def faults() -> AsyncIterator[tuple[Faults, environment_pb2_grpc.EnvironmentServiceStub]]:
    servicer = Faults()
    async with serving(as_service(servicer)) as address, open_channel(address, NETWORK) as channel:
        yield servicer, environment_pb2_grpc.EnvironmentServiceStub(channel)


def describe(suite: str) -> environment_pb2.DescribeSuiteRequest:
    return environment_pb2.DescribeSuiteRequest(suite=suite)


async def health_of(channel: grpc.aio.Channel, service: str = "") -> str:
    request = health_pb2.HealthCheckRequest(service=service)
    answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.02)


# --- The life of a server ---


async def test_health_follows_a_servers_life() -> None:
    servicer = Faults()
    server = RoleServer(
        "envserver", "127.0.0.1:0", NETWORK, [as_service(servicer)], RoleControl("envserver")
    )
    port = await server.bind()
    async with open_channel(f"127.0.0.1:{port}", NETWORK) as channel:
        assert await health_of(channel) == "NOT_SERVING"
        await server.set_serving()
        for service in ("", SERVICE, "understudy.v1.ControlService"):
            assert await health_of(channel, service) == "SERVING"
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        running = environment_pb2_grpc.EnvironmentServiceStub(channel).DescribeSuite(
            describe("slow")
        )
        await servicer.entered.wait()
        stopping = asyncio.create_task(server.stop(grace=10))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        assert (await running).suite == "slow"  # the grace of a running call
        await stopping


async def test_a_service_that_is_not_served_has_no_health() -> None:
    async with serving() as address, open_channel(address, NETWORK) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_of(channel, SERVICE)
        assert caught.value.code() == StatusCode.NOT_FOUND


async def test_a_call_that_outlasts_the_grace_is_cancelled() -> None:
    servicer = Faults()
    server = RoleServer(
        "envserver", "127.0.0.1:0", NETWORK, [as_service(servicer)], RoleControl("envserver")
    )
    port = await server.bind()
    await server.set_serving()
    async with open_channel(f"127.0.0.1:{port}", NETWORK) as channel:
        call = environment_pb2_grpc.EnvironmentServiceStub(channel).DescribeSuite(describe("hang"))
        await servicer.entered.wait()
        await server.stop(grace=0.1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)


async def test_a_port_is_taken_once() -> None:
    async with serving() as address:
        second = RoleServer("actor", address, NETWORK, [], RoleControl("actor"))
        with pytest.raises(ConfigError, match=f"actor.listen = '{address}': cannot bind") as caught:
            await second.bind()
        assert "choose another" in str(caught.value)
        await second.stop()


async def test_a_unix_socket_serves_too(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    server = RoleServer("envserver", address, NETWORK, [], RoleControl("envserver"))
    await server.bind()
    await server.set_serving()
    async with open_channel(address, NETWORK) as channel:
        assert await health_of(channel) == "SERVING"
    await server.stop(grace=0.1)


def test_sigterm_drains_a_process_and_its_running_episode_gets_its_grace(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("[model]\npath = 'model'\n[envserver]\nsuites = ['suites:WaitingSuite']")
    words = ("envserver", "--config", str(config), *ANY_PORT)
    with started(*understudy(*words), cwd=Path(__file__).parent) as process:
        port = read_until(process, "envserver listens").rpartition("(port ")[2].split(")")[0]
        read_until(process, "is serving")
        with open_sync_channel(f"127.0.0.1:{port}", NETWORK) as channel:
            stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
            reset = environment_pb2.SessionRequest()
            reset.reset.task.suite, reset.reset.task.split = "waiting", "train"
            reset.reset.task.task_ordinal = 50  # half a second a step
            step = environment_pb2.SessionRequest(step=environment_pb2.StepRequest(text="x"))
            answers = stub.Session(iter([reset, step]), timeout=60)
            assert next(answers).HasField("reset")
            process.send_signal(signal.SIGTERM)
            assert next(answers).step.terminated
        assert "envserver stopped" in finish(process)
        assert process.returncode == 0


# --- ControlService and reflection ---


async def test_control_pauses_resumes_and_drains() -> None:
    control = RoleControl("envserver")
    control.figures = lambda: {"sessions": 3.0}
    servicer = EnvironmentServicer({"echo": EchoSuite()}, EnvserverConfig(), control)
    server = RoleServer("envserver", "127.0.0.1:0", NETWORK, [as_service(servicer)], control)
    address = f"127.0.0.1:{await server.bind()}"
    operator, client = ControlClient(address, NETWORK), EnvironmentClient(address, NETWORK)

    async def open_session() -> str:
        async with client.session() as session:
            return (await session.reset("echo", "train", 1)).task_id

    async def assert_refused(reason: str) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await open_session()
        assert caught.value.code() == StatusCode.UNAVAILABLE
        assert (error_reason(caught.value), retry_after_seconds(caught.value)) == (reason, 1.0)

    async with operator, client:
        await assert_refused("STARTING")
        await server.set_serving()
        status = await operator.status()
        assert (status.role, status.state) == ("envserver", control_pb2.ROLE_STATE_SERVING)
        assert dict(status.figures) == {"sessions": 3.0}
        async with client.session() as running:
            await running.reset("echo", "train", 1)
            await operator.pause()
            await operator.pause()  # idempotent
            assert (await operator.status()).state == control_pb2.ROLE_STATE_PAUSED
            await assert_refused("PAUSED")
            assert (await running.step(text="1")).terminated  # running work goes on
        await operator.resume()
        assert await open_session() == "echo-1"
        await operator.drain()
        assert control.draining.is_set()
        await assert_refused("DRAINING")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await operator.resume()
        assert caught.value.code() == StatusCode.FAILED_PRECONDITION
        assert error_reason(caught.value) == "DRAINING"
        await operator.pause()
        assert (await operator.status()).state == control_pb2.ROLE_STATE_DRAINING
        await server.stop(grace=0.2)


async def test_loops_wait_while_paused_and_end_when_draining() -> None:
    control = RoleControl("actor")
    waiting = asyncio.create_task(control.admitted())
    await asyncio.sleep(0)
    assert not waiting.done()
    control.serving()
    assert await waiting
    control.pause()
    waiting = asyncio.create_task(control.admitted())
    await asyncio.sleep(0)
    assert not waiting.done()
    control.drain()
    assert not await waiting


async def reflect(channel: grpc.aio.Channel, **request: str) -> Any:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(timeout=10)
    await call.write(reflection_pb2.ServerReflectionRequest(**request))
    answer = await call.read()
    await call.done_writing()
    return answer


async def test_a_client_without_generated_code_can_ask_for_the_status() -> None:
    async with serving(as_service(Faults())) as address:
        async with open_channel(address, NETWORK) as channel:
            listed = (await reflect(channel, list_services="")).list_services_response.service
            assert {service.name for service in listed} == {
                SERVICE,
                "understudy.v1.ControlService",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }
            symbol = "understudy.v1.ControlService"
            answer = await reflect(channel, file_containing_symbol=symbol)
            pool = descriptor_pool.DescriptorPool()
            for data in answer.file_descriptor_response.file_descriptor_proto:
                pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data))
            method = pool.FindServiceByName(symbol).methods_by_name["GetStatus"]
            request = message_factory.GetMessageClass(method.input_type)()
            response = message_factory.GetMessageClass(method.output_type)
            ask = channel.unary_unary(
                f"/{symbol}/GetStatus",
                request_serializer=type(request).SerializeToString,
                response_deserializer=response.FromString,
            )
            assert (await ask(request, timeout=10)).role == "envserver"


# --- Errors ---


async def test_a_service_error_arrives_with_reason_and_retry_hint() -> None:
    async with faults() as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DescribeSuite(describe("refuse"))
    error = caught.value
    assert (error.code(), error.details()) == (StatusCode.NOT_FOUND, "no such suite")
    assert (error_reason(error), retry_after_seconds(error)) == ("UNKNOWN_SUITE", 2.5)


def a_reset(suite: str) -> environment_pb2.SessionRequest:
    request = environment_pb2.SessionRequest()
    request.reset.task.suite = suite
    return request


def a_step() -> environment_pb2.SessionRequest:
    return environment_pb2.SessionRequest(step=environment_pb2.StepRequest())


async def test_an_unknown_exception_keeps_its_text_on_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with faults() as (_, stub):
        call = stub.Session()
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
                stream = channel.stream_stream(f"/{SERVICE}/Session")(timeout=10)
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
            counted("grpc_server_handled_total", "bidi_stream", "Session", code) for code in codes
        ]
        return [*handled, counted("grpc_server_started_total", "bidi_stream", "Session")]

    before = figures()
    async with faults() as (servicer, stub):
        good, bad, left = stub.Session(), stub.Session(), stub.Session()
        await good.write(environment_pb2.SessionRequest())
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
        call = environment_pb2_grpc.EnvironmentServiceStub(channel).Session()
        await call.write(environment_pb2.SessionRequest())
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
        call = stub.Session()
        await call.write(environment_pb2.SessionRequest())
        await call.read()
        assert num_handlers() == 1
        call.cancel()
        for _ in range(20):
            calls = [stub.Session() for _ in range(50)]
            for call in calls:
                await call.write(environment_pb2.SessionRequest())
            for call in calls:
                call.cancel()
        assert (await stub.DescribeSuite(describe("ok"), timeout=60)).suite == "ok"
        await wait_for(lambda: not num_handlers())


# --- Liveness ---


@pytest.mark.timeout(120)
async def test_a_peer_that_hangs_is_noticed_by_an_open_stream(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("[model]\npath = 'model'")
    words = ("envserver", "--config", str(config), *ANY_PORT)
    with started(*understudy(*words)) as process:
        line = await asyncio.to_thread(read_until, process, "envserver listens")
        address = f"127.0.0.1:{line.rpartition('(port ')[2].split(')')[0]}"
        async with open_channel(address, NETWORK) as channel:
            await asyncio.wait_for(channel.channel_ready(), 30)
            stream = environment_pb2_grpc.EnvironmentServiceStub(channel).Session()
            await stream.write(environment_pb2.SessionRequest())
            process.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(stream.read(), 60)
            assert caught.value.code() == StatusCode.UNAVAILABLE
            assert time.monotonic() - stopped < 40  # 10 s by the options, 61 s without the last
            process.send_signal(signal.SIGCONT)
