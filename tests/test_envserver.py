"""Environment servers over real gRPC: order, limits, and faults that harm nobody else."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from conftest import serving
from envserver.registry import load_suites
from envserver.servicer import EnvironmentServicer
from suites import EchoSuite, FaultyEnvironment, FaultySuite, WaitingSuite
from understudy.client import EnvironmentClient
from understudy.config import EnvserverConfig
from understudy.errors import ConfigError
from understudy.rpc import RoleControl, Service, error_reason, retry_after_seconds
from understudy.v1 import common_pb2, environment_pb2, environment_pb2_grpc

StatusCode = grpc.StatusCode


@asynccontextmanager
async def environment_server(**settings: object) -> AsyncIterator[EnvironmentClient]:
    """A server of the test suites with small limits, and a client of it."""
    config = EnvserverConfig(**{"worker_threads": 2, **settings})  # type: ignore[arg-type]
    control = RoleControl("envserver")
    control.serving()
    suites = {suite.name: suite for suite in (EchoSuite(), FaultySuite(), WaitingSuite())}
    service = Service(
        name="understudy.v1.EnvironmentService",
        add=environment_pb2_grpc.add_EnvironmentServiceServicer_to_server,
        servicer=EnvironmentServicer(suites, config, control),
    )
    async with serving(service) as address, EnvironmentClient.connect(address) as client:
        yield client


async def test_an_episode_from_reset_to_reward() -> None:
    async with environment_server() as client, client.session() as session:
        opening = await session.reset("echo", "train", 7)
        assert opening.task_id == "echo-7"
        assert opening.tools[0]["name"] == "echo"
        observation = await session.step([("echo", {"text": "hi"}), ("echo", {"text": "ho"})])
        assert [message["content"] for message in observation.messages] == ["hi", "ho"]
        last = await session.step(text="7")
        assert (last.reward, last.terminated, last.truncated) == (1.0, True, False)


async def test_a_suite_describes_itself() -> None:
    async with environment_server() as client:
        description = await client.describe("echo")
        assert description.splits[0].num_tasks == 100
        assert (description.min_reward, description.max_reward) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("task", "code", "reason", "said"),
    [
        (("nope", "train", 0), StatusCode.NOT_FOUND, "UNKNOWN_SUITE", "'nope' is not served"),
        (("", "train", 0), StatusCode.NOT_FOUND, "UNKNOWN_SUITE", "served: echo, faulty"),
        (("echo", "nope", 0), StatusCode.NOT_FOUND, "UNKNOWN_TASK", "split 'nope'"),
        (("echo", "train", 100), StatusCode.NOT_FOUND, "UNKNOWN_TASK", "no task 100"),
    ],
)
async def test_unknown_tasks_are_named(
    task: tuple[str, str, int], code: StatusCode, reason: str, said: str
) -> None:
    async with environment_server() as client, client.session() as session:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await session.reset(*task)
        assert (caught.value.code(), error_reason(caught.value)) == (code, reason)
        assert said in (caught.value.details() or "")


@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [
        ("raise", StatusCode.INTERNAL, "ENVIRONMENT_FAILED"),
        ("infinite", StatusCode.INTERNAL, "ENVIRONMENT_FAILED"),
        ("hang", StatusCode.DEADLINE_EXCEEDED, "STEP_TIMEOUT"),
    ],
)
async def test_a_faulty_environment_ends_its_own_episode_only(
    text: str, code: StatusCode, reason: str
) -> None:
    async with environment_server(step_timeout_seconds=0.2) as client:
        async with client.session() as neighbour:
            await neighbour.reset("echo", "train", 1)
            # More hung calls than there are threads: the next episode must still be served.
            for _ in range(3):
                async with client.session() as session:
                    await session.reset("faulty", "train", 1)
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await session.step(text=text)
                assert (caught.value.code(), error_reason(caught.value)) == (code, reason)
                assert "secret" not in (caught.value.details() or "")
            assert (await neighbour.step(text="1")).reward == 1.0


async def test_environments_are_closed_however_an_episode_ends() -> None:
    FaultyEnvironment.closed = 0
    async with environment_server() as client:
        async with client.session() as session:  # left in the middle
            await session.reset("faulty", "train", 1)
        async with client.session() as session:
            await session.reset("faulty", "train", 1)
            assert (await session.step(text="truncate")).truncated
        for _ in range(100):
            if FaultyEnvironment.closed == 2:
                break
            await asyncio.sleep(0.02)
    assert FaultyEnvironment.closed == 2


async def test_a_silent_session_ends() -> None:
    async with environment_server(idle_timeout_seconds=0.2) as client:
        async with client.session() as session:
            await session.reset("echo", "train", 1)
            await asyncio.sleep(0.5)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await session.step(text="1")
            assert error_reason(caught.value) == "SESSION_IDLE"


async def test_admission_is_bounded_with_a_retry_hint() -> None:
    async with environment_server(max_sessions=1) as client, client.session() as first:
        await first.reset("echo", "train", 1)
        async with client.session() as second:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await second.reset("echo", "train", 1)
            assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
            assert retry_after_seconds(caught.value)


def _step(turn: int, text: str = "") -> environment_pb2.SessionRequest:
    call = environment_pb2.ToolCall(name="echo", arguments_json=text)
    return environment_pb2.SessionRequest(
        step=environment_pb2.StepRequest(turn=turn, tool_calls=[call])
    )


RESET = environment_pb2.SessionRequest(
    reset=environment_pb2.ResetRequest(
        task=common_pb2.TaskReference(suite="echo", split="train", task_ordinal=1)
    )
)


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([_step(0)], "OUT_OF_ORDER"),
        ([RESET, RESET], "OUT_OF_ORDER"),
        ([RESET, _step(1, "{}")], "OUT_OF_ORDER"),
        ([RESET, _step(0, "{}"), _step(0, '{"text": "other"}')], "OUT_OF_ORDER"),
        ([RESET, _step(0, "{")], "BAD_ACTION"),
        ([RESET, _step(0, "[1]")], "BAD_ACTION"),
        ([RESET, _step(0, "[" * 100_000)], "BAD_ACTION"),
        ([environment_pb2.SessionRequest()], "OUT_OF_ORDER"),
    ],
)
async def test_messages_out_of_order_or_shape_are_refused(
    requests: list[environment_pb2.SessionRequest], reason: str
) -> None:
    async with environment_server() as client:
        call = environment_pb2_grpc.EnvironmentServiceStub(client.channel).Session()
        for request in requests[:-1]:
            await call.write(request)
            await call.read()
        await call.write(requests[-1])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert error_reason(caught.value) == reason


async def test_a_repeated_turn_is_answered_and_not_played_again() -> None:
    async with environment_server() as client:
        call = environment_pb2_grpc.EnvironmentServiceStub(client.channel).Session()
        answers = []
        for request in (RESET, _step(0, '{"text": "a"}'), _step(0, '{"text": "a"}')):
            await call.write(request)
            answers.append(await call.read())
        call.cancel()
    assert answers[1] == answers[2]


async def test_coroutine_environments_wait_side_by_side() -> None:
    async with environment_server() as client:

        async def play() -> None:
            async with client.session() as session:
                await session.reset("waiting", "train", 20)
                assert (await session.step(text="x")).terminated

        start = time.monotonic()
        await asyncio.gather(*(play() for _ in range(20)))
        assert time.monotonic() - start < 2.0  # one after another would be 4 s


async def test_a_message_over_the_limit_is_refused_and_the_server_lives() -> None:
    async with environment_server() as client:
        async with client.session() as session:
            await session.reset("echo", "train", 1)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await session.step([("echo", {"text": "x" * 2_000_000})])
            assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
        assert (await client.describe("echo")).suite == "echo"


def test_suites_are_found_by_class_and_mistakes_are_named() -> None:
    assert set(load_suites(["suites:EchoSuite", "practice"])) == {"echo", "practice"}
    for name, said in (
        ("nope", "not registered; known: practice"),
        ("suites:Nope", "cannot load"),
        ("suites:TOOL", "not a subclass of Suite"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_suites([name])
