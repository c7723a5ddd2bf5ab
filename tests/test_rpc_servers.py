"""Servers over real gRPC: their life, their control, what a peer that hangs does to them."""

import asyncio
import signal
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from conftest import serving
from envserver.servicer import EnvironmentServicer
from processes import ANY_PORT, finish, read_until, started, understudy
from rpc_faults import NETWORK, SERVICE, Faults, as_service, describe
from suites import EchoSuite
from understudy.client import ControlClient, EnvironmentClient
from understudy.client.sessions import SessionStream
from understudy.config import EnvserverConfig
from understudy.errors import ConfigError
from understudy.rpc import (
    RoleControl,
    RoleServer,
    error_reason,
    open_channel,
    open_sync_channel,
    retry_after_seconds,
)
from understudy.v1 import common_pb2, control_pb2, environment_pb2, environment_pb2_grpc


async def health_of(channel: grpc.aio.Channel, service: str = "") -> str:
    request = health_pb2.HealthCheckRequest(service=service)
    answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


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
            task = common_pb2.TaskReference(suite="waiting", split="train", task_ordinal=50)
            asked: SimpleQueue[environment_pb2.SessionsRequest | None] = SimpleQueue()
            answers = stub.Sessions(iter(asked.get, None), timeout=60)
            reset, step = (environment_pb2.SessionsRequest() for _ in range(2))
            reset.requests.add().reset.task.CopyFrom(task)  # half a second a step
            step.requests.add().step.text = "x"
            asked.put(reset)
            assert next(answers).responses[0].HasField("reset")
            asked.put(step)
            process.send_signal(signal.SIGTERM)
            assert next(answers).responses[0].step.terminated
            assert not list(answers)  # the server ends what has no session left
            asked.put(None)
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
        # grpcio loses what the server said if it says so while the client writes.
        assert error_reason(caught.value) in (reason, "STREAM_ENDED")
        assert retry_after_seconds(caught.value) == 1.0

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


async def test_a_status_that_grpcio_overwrote_is_one_to_try_again_after() -> None:
    class Ended:
        """A call whose server ended it while a request was written."""

        async def write(self, message: object) -> None:
            raise await self.error()

        async def read(self) -> object:
            raise await self.error()

        async def error(self) -> grpc.aio.AioRpcError:
            none = grpc.aio.Metadata()
            return grpc.aio.AioRpcError(await self.code(), none, none, await self.details())

        async def code(self) -> StatusCode:
            return StatusCode.INTERNAL

        async def details(self) -> str:
            return "Internal error from Core"

        def cancel(self) -> None:
            pass

    stream = SessionStream(Ended())  # type: ignore[arg-type]
    with pytest.raises(grpc.aio.AioRpcError, match="ended the stream") as caught:
        await stream.ask(environment_pb2.SessionRequest(session=1))
    assert caught.value.code() == StatusCode.UNAVAILABLE
    assert (error_reason(caught.value), retry_after_seconds(caught.value)) == ("STREAM_ENDED", 1.0)


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
            stream = environment_pb2_grpc.EnvironmentServiceStub(channel).Sessions()
            await stream.write(environment_pb2.SessionsRequest())
            process.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(stream.read(), 60)
            assert caught.value.code() == StatusCode.UNAVAILABLE
            assert time.monotonic() - stopped < 40  # 10 s by the options, 61 s without the last
            process.send_signal(signal.SIGCONT)
