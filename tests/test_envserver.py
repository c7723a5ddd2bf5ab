"""Environment servers over real gRPC: order, limits, and faults that harm nobody else."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from conftest import serving
from envserver.registry import load_suites
from envserver.servicer import EnvironmentServicer
from suites import EchoSuite, FaultyEnvironment, FaultySuite, WaitingSuite
from understudy.client import EnvironmentClient
from understudy.config import EnvserverConfig, load_config, write_config
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


async def test_a_session_that_speaks_now_and_then_goes_on() -> None:
    async with environment_server(idle_timeout_seconds=2.0) as client:
        async with client.session() as session:
            await session.reset("echo", "train", 1)
            for _ in range(6):
                await asyncio.sleep(0.4)
                await session.step([("echo", {"text": "hi"})])


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


async def _exchange(
    call: Any, *requests: environment_pb2.SessionRequest
) -> environment_pb2.SessionResponse:
    """The next answer to what is asked in one message."""
    await call.write(environment_pb2.SessionsRequest(requests=requests))
    (response,) = (await call.read()).responses
    assert isinstance(response, environment_pb2.SessionResponse)
    return response


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
        call = environment_pb2_grpc.EnvironmentServiceStub(client.channel).Sessions()
        for request in requests[:-1]:
            assert not (await _exchange(call, request)).HasField("failure")
        failure = (await _exchange(call, requests[-1])).failure
        assert failure.reason == reason
        assert not failure.HasField("retry_after")
        assert (await _exchange(call, RESET)).HasField("reset")  # the number is free again
        call.cancel()


async def test_a_repeated_turn_is_answered_and_not_played_again() -> None:
    async with environment_server() as client:
        call = environment_pb2_grpc.EnvironmentServiceStub(client.channel).Sessions()
        requests = (RESET, _step(0, '{"text": "a"}'), _step(0, '{"text": "a"}'))
        answers = [await _exchange(call, request) for request in requests]
        call.cancel()
    assert answers[1] == answers[2]


def _reset(number: int, suite: str, ordinal: int = 1) -> environment_pb2.SessionRequest:
    task = common_pb2.TaskReference(suite=suite, split="train", task_ordinal=ordinal)
    reset = environment_pb2.ResetRequest(task=task)
    return environment_pb2.SessionRequest(session=number, reset=reset)


async def test_sessions_of_a_stream_do_not_wait_for_each_other() -> None:
    async with environment_server() as client:
        call = environment_pb2_grpc.EnvironmentServiceStub(client.channel).Sessions()
        resets = [_reset(number, "waiting", 500) for number in range(1, 4)]
        await call.write(environment_pb2.SessionsRequest(requests=[*resets, _reset(9, "echo")]))
        opened = 0
        while opened < 4:
            opened += len((await call.read()).responses)
        slow = [environment_pb2.SessionRequest(session=n) for n in (1, 2)]
        for request in slow:
            request.step.text = "x"  # takes five seconds
        quick = environment_pb2.SessionRequest(session=9)
        quick.step.text = "1"
        answer = await _exchange(call, *slow, quick)
        assert (answer.session, answer.step.reward) == (9, 1.0)
        # A second request while one is under way ends its session, and no other.
        answer = await _exchange(call, slow[0])
        assert (answer.session, answer.failure.reason) == (1, "OUT_OF_ORDER")
        call.cancel()


async def test_a_session_that_is_given_up_is_forgotten_and_its_number_free() -> None:
    async with environment_server(max_sessions=1) as client:
        call = environment_pb2_grpc.EnvironmentServiceStub(client.channel).Sessions()
        close = environment_pb2.SessionRequest(close=environment_pb2.CloseRequest())
        assert (await _exchange(call, RESET)).HasField("reset")
        step = environment_pb2.SessionRequest()
        step.step.text = "1"
        async with asyncio.timeout(20):
            while True:  # the room is free once the environment is closed
                answer = await _exchange(call, close, close, RESET)
                if answer.HasField("reset"):
                    break
                assert answer.failure.reason == "SESSIONS_FULL"
        assert (await _exchange(call, step)).step.reward == 1.0
        call.cancel()


async def test_answers_of_many_sessions_share_messages_of_bounded_size() -> None:
    text = "x" * 200_000
    async with environment_server() as client:
        call = environment_pb2_grpc.EnvironmentServiceStub(client.channel).Sessions()
        resets = [_reset(number, "echo") for number in range(12)]
        await call.write(environment_pb2.SessionsRequest(requests=resets))
        opened = 0
        while opened < 12:
            opened += len((await call.read()).responses)
        for number in range(12):
            step = _step(0, f'{{"text": "{text}"}}')
            step.session = number
            await call.write(environment_pb2.SessionsRequest(requests=[step]))
        answered: list[int] = []
        sizes = []
        while len(answered) < 12:
            message = await call.read()
            answered += [response.session for response in message.responses]
            sizes.append(message.ByteSize())
        assert sorted(answered) == list(range(12))
        assert max(sizes) <= 2**20 + 200
        call.cancel()


async def test_a_message_of_too_many_requests_ends_its_stream_only() -> None:
    async with environment_server() as client, client.session() as neighbour:
        await neighbour.reset("echo", "train", 1)
        call = environment_pb2_grpc.EnvironmentServiceStub(client.channel).Sessions()
        empty = [environment_pb2.SessionRequest()] * 5000
        await call.write(environment_pb2.SessionsRequest(requests=empty))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() == StatusCode.INVALID_ARGUMENT
        assert error_reason(caught.value) == "BAD_MESSAGE"
        assert (await neighbour.step(text="1")).reward == 1.0


async def test_what_many_sessions_ask_at_one_time_is_one_message() -> None:
    texts = [str(number) * 60_000 for number in range(1, 10)]
    async with environment_server() as client:

        async def play(text: str) -> str:
            async with client.session() as session:
                await session.reset("echo", "train", 1)
                observation = await session.step([("echo", {"text": text})])
                return str(observation.messages[0]["content"])

        assert await asyncio.gather(*(play(text) for text in texts * 4)) == texts * 4


async def test_a_stream_that_broke_fails_its_sessions_and_the_next_has_its_own() -> None:
    async with environment_server() as client:
        async with client.session() as first, client.session() as second:
            for session in (first, second):
                await session.reset("waiting", "train", 500)
            waiting = asyncio.create_task(first.step(text="x"))
            await asyncio.sleep(0.1)
            call = environment_pb2_grpc.EnvironmentServiceStub(client.channel).Sessions()
            await call.write(environment_pb2.SessionsRequest(requests=[_step(0, "x" * 2_000_000)]))
            with pytest.raises(grpc.aio.AioRpcError):
                await call.read()
            assert not waiting.done()  # the mistake of another stream
            assert client._stream
            client._stream._call.cancel()
            for step in (waiting, second.step(text="x")):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await step
                assert caught.value.code() == StatusCode.CANCELLED
        async with client.session() as third:
            await third.reset("echo", "train", 1)
            assert (await third.step(text="1")).reward == 1.0


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
            assert error_reason(caught.value) == "TOO_LARGE"
            assert (await session.step(text="1")).reward == 1.0  # it was never sent
        call = environment_pb2_grpc.EnvironmentServiceStub(client.channel).Sessions()
        await call.write(environment_pb2.SessionsRequest(requests=[_step(0, "x" * 2_000_000)]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
        assert (await client.describe("echo")).suite == "echo"


def test_suites_are_found_by_class_and_mistakes_are_named() -> None:
    assert set(load_suites(["suites:EchoSuite", "practice"])) == {"echo", "practice"}
    for name, said in (
        ("nope", "not registered; known: .*practice"),
        ("suites:Nope", "cannot load"),
        ("suites:TOOL", "not a subclass of Suite"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_suites([name])


def test_a_table_gives_a_suite_its_options() -> None:
    tables = {"short": {"adapter": "suites:SizedSuite", "num_tasks": 5}, "practice": {}}
    suites = load_suites(tables)
    assert set(suites) == {"short", "practice"}
    assert suites["short"].describe().splits == {"train": 5}


@pytest.mark.parametrize(
    ("name", "table", "said"),
    [
        ("a", {"adapter": "nope"}, "'nope' is not registered"),
        ("a", {"adapter": 3}, "envserver.suites.a.adapter = 3 is no string"),
        ("a", {"adapter": "suites:EchoSuite"}, "is called 'echo'; give the table that name"),
        ("practice", {"b": 1}, "'practice' takes no options; leave out ['b']"),
        ("a", {"adapter": "suites:SizedSuite"}, "envserver.suites.a: num_tasks: missing"),
        (
            "a",
            {"adapter": "suites:SizedSuite", "num_task": 1},
            "num_task: unknown key; did you mean 'num_tasks'?",
        ),
        (
            "a",
            {"adapter": "suites:SizedSuite", "num_tasks": 13},
            "envserver.suites.a: 13 tasks bring bad luck",
        ),
    ],
)
def test_a_mistake_in_a_table_is_named(name: str, table: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_suites({name: table})


def test_tables_of_suites_are_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        "[model]\npath = 'm'\n[envserver.suites.short]\nadapter = 'suites:SizedSuite'\n"
    )
    config = load_config(path, ["envserver.suites.short.num_tasks=5"])
    again = load_config(write_config(config, tmp_path))
    for read in (config, again):
        assert set(load_suites(read.envserver.suites)) == {"short"}
