"""OpenEnv servers as suites: OpenEnv's own, from its own package, and peers that misbehave."""

import asyncio
import contextlib
import json
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from adapter_helpers import failing, http_server, served
from benchmarks.openenv_venv import OpenEnvMissingError, openenv_python
from understudy.client import EnvironmentClient, Session
from understudy.rpc import error_reason

SCRIPT = Path(__file__).with_name("openenv_server.py")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """Options for a server of OpenEnv's package."""
    try:
        python = openenv_python()
    except OpenEnvMissingError as error:
        warnings.warn(f"OpenEnv's own server was not tested: {error}", stacklevel=1)
        pytest.skip(f"OpenEnv's own server was not tested: {error}")
    with http_server([python, SCRIPT], "/health", tmp_path_factory.mktemp("openenv")) as (url, _):
        yield {"adapter": "openenv", "url": url, "train_tasks": 100, "prompt": "Guess."}


async def say(session: Session, text: str) -> str:
    step = await session.step([("act", {"text": text})])
    return str(step.messages[0]["content"])


@pytest.mark.timeout(1200)
async def test_an_episode(real: dict[str, object]) -> None:
    async with served({"guess": real}) as client:
        async with client.session() as session:
            opening = await session.reset("guess", "test", 3)
            assert opening.messages[0]["content"] == "Guess.\n\nSay 103."
            parameters = opening.tools[0]["parameters"]
            assert list(parameters["properties"]) == ["text"]
            assert parameters["required"] == ["text"]
            assert await say(session, "103?") == "try 1"
            last = await session.step([("act", {"text": "103"})])
            assert (last.reward, last.terminated, last.truncated) == (1.0, True, False)


async def test_an_action_that_is_none_is_told(real: dict[str, object]) -> None:
    async with served({"guess": real}) as client, client.session() as session:
        await session.reset("guess", "train", 0)
        assert await say(session, "x" * 21) == "This is no action; see the tool's schema."
        none = await session.step([("act", {"word": "0"}), ("go", {})])
        assert [message["content"] for message in none.messages] == [
            "This is no action; see the tool's schema.",
            "Unknown tool; use act.",
        ]
        assert (await session.step(text="0")).messages[0]["content"] == "Call the tool act."
        assert await say(session, "1") == "try 1"


async def test_faults_end_their_own_episode(real: dict[str, object]) -> None:
    async with served({"guess": real}) as client, client.session() as neighbour:
        await neighbour.reset("guess", "train", 1)
        for text, reason in (("boom", "PEER_FAILED"), ("long", "PEER_INVALID")):
            async with client.session() as session:
                await session.reset("guess", "train", 0)
                async with failing(reason):
                    await say(session, text)
        assert (await neighbour.step([("act", {"text": "1"})])).reward == 1.0


async def test_sessions_side_by_side_up_to_the_servers_limit(real: dict[str, object]) -> None:
    async with served({"guess": real}) as client:
        async with contextlib.AsyncExitStack() as stack:
            sessions = [await _opened(client, stack, number) for number in range(4)]
            async with client.session() as fifth, failing("SESSIONS_FULL"):
                await fifth.reset("guess", "train", 4)
            said = await asyncio.gather(*(say(session, "x") for session in sessions))
            assert said == ["try 1"] * 4


async def _opened(
    client: EnvironmentClient, stack: contextlib.AsyncExitStack, ordinal: int
) -> Session:
    """A session, as soon as the server has let go of those of other tests."""
    for _ in range(600):
        session = await stack.enter_async_context(client.session())
        try:
            opening = await session.reset("guess", "train", ordinal)
        except grpc.aio.AioRpcError as error:
            if error_reason(error) != "SESSIONS_FULL":
                raise
            await asyncio.sleep(0.05)
        else:
            assert opening.messages[0]["content"] == f"Guess.\n\nSay {ordinal}."
            return session
    raise AssertionError("the server lets go of no session")


# --- Peers that misbehave: a socket that says what it is told to ---

Play = Callable[[ServerConnection], Awaitable[None]]
SCHEMA = {"action": {"type": "object", "properties": {"text": {"type": "string"}}}}
OBSERVED = {"type": "observation", "data": {"observation": {"a": 1, "b": [2]}, "done": False}}


@asynccontextmanager
async def peer(play: Play, schema: str = json.dumps(SCHEMA)) -> AsyncIterator[dict[str, object]]:
    def answer_http(_: ServerConnection, request: Request) -> Response | None:
        if request.path != "/schema":
            return None
        headers = Headers({"Content-Length": str(len(schema)), "Connection": "close"})
        return Response(200, "OK", headers, schema.encode())

    async with serve(play, "127.0.0.1", 0, process_request=answer_http) as server:
        port = server.sockets[0].getsockname()[1]
        yield {"adapter": "openenv", "url": f"http://127.0.0.1:{port}"}


def saying(*answers: object) -> Play:
    """Answer each message with the next of these, then go."""

    async def play(socket: ServerConnection) -> None:
        for answer in answers:
            await socket.recv()
            await socket.send(answer if isinstance(answer, str) else json.dumps(answer))
        await socket.recv()

    return play


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ((), "PEER_LOST"),
        (("no JSON",), "PEER_INVALID"),
        (('{"type": "observation", "data": 3}',), "PEER_INVALID"),
        (('{"type": "observation", "data": {"observation": {}, "done": [1]}}',), "PEER_INVALID"),
        (("[" * 100_000,), "PEER_INVALID"),
        (("x" * 5_000_000,), "PEER_INVALID"),
        (
            ({"type": "error", "data": {"code": "FACTORY_ERROR", "message": "secret"}},),
            "PEER_FAILED",
        ),
        (({"type": "error", "data": {"code": "VALIDATION_ERROR"}},), "PEER_FAILED"),
        (({"type": "error", "data": {"code": "CAPACITY_REACHED"}},), "SESSIONS_FULL"),
    ],
)
async def test_a_peer_that_misbehaves_in_a_reset(answers: tuple[object, ...], reason: str) -> None:
    async with peer(saying(*answers)) as table, served({"bad": table}) as client:
        async with client.session() as session, failing(reason):
            await session.reset("bad", "train", 0)
        assert (await client.describe("bad")).suite == "bad"


async def test_a_peer_that_goes_away_or_lies_in_a_step() -> None:
    infinite = '{"type": "observation", "data": {"observation": {}, "reward": Infinity}}'
    for answers, reason in (
        ((OBSERVED,), "PEER_LOST"),
        ((OBSERVED, "nonsense"), "PEER_INVALID"),
        ((OBSERVED, infinite), "ENVIRONMENT_FAILED"),
    ):
        async with peer(saying(*answers)) as table, served({"bad": table}) as client:
            async with client.session() as session:
                opening = await session.reset("bad", "train", 0)
                assert opening.messages[0]["content"] == '{"a": 1, "b": [2]}'
                async with failing(reason):
                    await say(session, "x")


async def test_a_server_that_is_full_before_it_is_asked() -> None:
    async def refuse(socket: ServerConnection) -> None:
        await socket.send('{"type": "error", "data": {"code": "CAPACITY_REACHED"}}')

    async with peer(refuse) as table, served({"full": table}) as client:
        for _ in range(20):
            async with client.session() as session, failing("SESSIONS_FULL"):
                await session.reset("full", "train", 0)


async def test_a_slow_peer_meets_the_limit_of_a_step() -> None:
    async def sleep(socket: ServerConnection) -> None:
        await socket.wait_closed()

    async with peer(sleep) as table, served({"slow": table}, step_timeout_seconds=1) as client:
        async with client.session() as session, failing("STEP_TIMEOUT"):
            await session.reset("slow", "train", 0)


@pytest.mark.parametrize(
    "schema", ["nothing", "[]", '{"action": 3}', '{"action": {"properties": 3}}', "x" * 5_000_000]
)
async def test_a_schema_that_is_none(schema: str) -> None:
    async with peer(saying(OBSERVED), schema) as table, served({"bad": table}) as client:
        async with client.session() as session, failing("PEER_INVALID", "no schema of an action"):
            await session.reset("bad", "train", 0)


async def test_a_peer_that_is_not_there() -> None:
    async with peer(saying()) as table:
        pass
    async with served({"gone": table}) as client:
        async with client.session() as session, failing("PEER_UNREACHABLE"):
            await session.reset("gone", "train", 0)
