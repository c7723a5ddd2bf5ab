"""MCP servers as suites, against servers of the official SDK over both transports."""

import asyncio
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from adapter_helpers import ADAPTERS, failing, http_server, python, served
from benchmarks.rollout import free_address
from conftest import ROOT
from envserver.registry import load_suites
from mcp_servers import TOKEN
from understudy import metrics
from understudy.client import EnvironmentClient, Session
from understudy.errors import ConfigError

MIB = 2**20


@pytest.fixture
def table(tmp_path: Path) -> dict[str, object]:
    """Options of a suite over standard input and output, but for the server's command."""
    tasks = tmp_path / "train.jsonl"
    lines = [{"question": f"What is {n} and 2?", "answer": str(n + 2)} for n in range(20)]
    lines[1]["level"] = 2  # type: ignore[assignment]
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "adapter": "mcp",
        "command": python("mcp_servers.py", "honest"),
        "tasks": {"train": str(tasks)},
    }


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """URLs of two servers that nobody kills: one answers with events, one with JSON."""
    with ExitStack() as stack:
        urls = {}
        for kind in ("sse", "json"):
            command = python("mcp_servers.py", kind)
            folder = tmp_path_factory.mktemp(kind)
            urls[kind] = stack.enter_context(http_server(command, "/mcp", folder))[0] + "/mcp"
        yield urls


@pytest.fixture
def http_table(servers: dict[str, str], table: dict[str, object]) -> dict[str, object]:
    """Options of a suite over streamable HTTP; cheap, since nothing is started an episode."""
    return {**table, "command": (), "url": servers["sse"]}


each_answer = pytest.mark.parametrize("kind", ["sse", "json"])


async def say(session: Session, name: str, **arguments: object) -> str:
    observation = await session.step([(name, arguments)])
    (message,) = observation.messages
    return str(message["content"])


async def play(session: Session) -> None:
    """An episode that calls tools in all ways, and is right in the end."""
    opening = await session.reset("sums", "train", 1)
    assert (opening.level, opening.messages[-1]["content"]) == (2, "What is 1 and 2?")
    tools = {tool["name"]: tool for tool in opening.tools}
    assert tools["add"]["parameters"]["properties"]["a"]["type"] == "integer"
    assert tools["add"]["parameters"]["required"] == ["a", "b"]
    assert await say(session, "add", a=1, b=2) == "3"
    assert (await say(session, "fail")).startswith("Error executing tool fail")
    assert "validation error" in await say(session, "add", a="one")
    assert (await say(session, "nope")).startswith("Unknown tool; use add, ")
    both = await session.step([("add", {"a": 1, "b": 1}), ("add", {"a": 2, "b": 2})])
    assert [message["content"] for message in both.messages] == ["2", "4"]
    last = await session.step(text="FINAL ANSWER: 3")
    assert (last.reward, last.terminated, last.truncated) == (1.0, True, False)


async def test_an_episode_over_standard_input_and_output(table: dict[str, object]) -> None:
    async with served({"sums": table}) as client:
        description = await client.describe("sums")
        assert list(description.levels) == [1, 2]
        async with client.session() as session:
            await play(session)
        async with client.session() as session:
            await session.reset("sums", "train", 0)
            assert (await session.step(text="3")).reward == 0.0


@each_answer
async def test_episodes_over_streamable_http(
    kind: str, servers: dict[str, str], http_table: dict[str, object]
) -> None:
    async with served({"sums": {**http_table, "url": servers[kind]}}) as client:

        async def one() -> None:
            async with client.session() as session:
                await play(session)

        await asyncio.gather(*(one() for _ in range(4)))


@pytest.fixture
def locked_table(
    table: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, object]]:
    """Options of a suite whose server asks for a token, and the right one in TEST_MCP_KEY."""
    monkeypatch.setenv("TEST_MCP_KEY", f"Bearer {TOKEN}")
    with http_server(python("mcp_servers.py", "locked"), "/mcp", tmp_path) as (url, _):
        headers = {"Authorization": "TEST_MCP_KEY"}
        yield {**table, "command": (), "url": f"{url}/mcp", "headers": headers}


async def test_a_server_that_asks_for_credentials(
    locked_table: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served({"sums": locked_table}) as client, client.session() as session:
        opening = await session.reset("sums", "train", 1)
        assert [tool["name"] for tool in opening.tools] == ["add", "fail"]
        assert await say(session, "add", a=1, b=2) == "3"
    monkeypatch.setenv("TEST_MCP_KEY", "Bearer secret-8")
    for table in (locked_table, {**locked_table, "headers": {}}):
        async with served({"sums": table}) as client, client.session() as session:
            async with failing("PEER_UNREACHABLE", "with these credentials (401); see headers"):
                await session.reset("sums", "train", 1)
    assert "secret" not in caplog.text


async def test_sessions_have_processes_of_their_own_and_leave_none(
    table: dict[str, object],
) -> None:
    before = set(psutil.Process().children(recursive=True))
    async with served({"sums": table}) as client:

        async def one(number: int) -> str:
            async with client.session() as session:
                await session.reset("sums", "train", number)
                await say(session, "remember", note=f"first {number}")
                return await say(session, "remember", note=f"second {number}")

        said = await asyncio.gather(*(one(number) for number in range(3)))
    for number, text in enumerate(said):
        assert f"['first {number}', 'second {number}']" in text
    await _gone(before)


async def _gone(before: set[psutil.Process]) -> None:
    for _ in range(500):
        if not set(psutil.Process().children(recursive=True)) - before:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(set(psutil.Process().children(recursive=True)) - before)


async def test_a_server_that_is_stopped_leaves_no_process(
    table: dict[str, object], tmp_path: Path
) -> None:
    address = free_address()
    values = {
        "model": {"path": "none"},
        "envserver": {
            "listen": address,
            "metrics_listen": "127.0.0.1:0",
            "suites": {"sums": {**table, "adapter": ADAPTERS["mcp"]}},
        },
    }
    (tmp_path / "run.json").write_text(json.dumps(values))
    command = [sys.executable, "-m", "understudy.cli", "envserver", "--config", "run.json"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    process = await asyncio.create_subprocess_exec(*command, cwd=tmp_path, env=environment)
    try:
        async with EnvironmentClient.connect(address) as client:
            await client.wait_ready()
            async with client.session() as session:
                await session.reset("sums", "train", 1)
                assert await say(session, "add", a=1, b=2) == "3"
                (child,) = psutil.Process(process.pid).children()
                process.terminate()
                assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        if process.returncode is None:
            process.kill()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running()


async def test_no_more_processes_than_allowed(table: dict[str, object]) -> None:
    async with served({"sums": {**table, "max_sessions": 1}}) as client:
        async with client.session() as first:
            await first.reset("sums", "train", 0)
            async with client.session() as second, failing("SESSIONS_FULL", "max_sessions = 1"):
                await second.reset("sums", "train", 0)


async def test_a_server_that_dies_ends_its_own_episode_only(table: dict[str, object]) -> None:
    failures = metrics.ENVIRONMENT_FAILURES.labels("PEER_LOST")
    counted = failures._value.get()
    async with served({"sums": table}) as client, client.session() as neighbour:
        await neighbour.reset("sums", "train", 1)
        async with client.session() as session:
            await session.reset("sums", "train", 1)
            async with failing("PEER_LOST", "suite 'sums': the server went away"):
                await say(session, "die")
        assert await say(neighbour, "add", a=1, b=2) == "3"
    assert failures._value.get() == counted + 1


async def test_an_http_server_that_dies(table: dict[str, object], tmp_path: Path) -> None:
    with http_server(python("mcp_servers.py", "sse"), "/mcp", tmp_path) as (url, _):
        dying = {**table, "command": (), "url": f"{url}/mcp"}
        async with served({"sums": dying}, step_timeout_seconds=30) as client:
            async with client.session() as session:
                await session.reset("sums", "train", 1)
                async with failing("PEER_LOST"):
                    await say(session, "die")
            async with client.session() as session:
                async with failing("PEER_UNREACHABLE"):
                    await session.reset("sums", "train", 1)


async def test_a_slow_tool_has_failed_and_the_episode_goes_on(
    http_table: dict[str, object],
) -> None:
    async with served({"sums": {**http_table, "call_timeout_seconds": 0.5}}) as client:
        async with client.session() as session:
            await session.reset("sums", "train", 1)
            assert await say(session, "wait", seconds=60) == "wait took longer than 0.5 s."
            assert await say(session, "add", a=1, b=2) == "3"


async def test_a_long_result_is_cut_and_counted(http_table: dict[str, object]) -> None:
    cut = metrics.TOOL_CALLS.labels("sums", "much", "cut")
    async with served({"sums": {**http_table, "max_result_characters": 100}}) as client:
        async with client.session() as session:
            await session.reset("sums", "train", 1)
            text = await say(session, "much", characters=MIB)
            assert text == "x" * 100 + f"\n[cut: {MIB} characters in all]"
            many = await session.step([("much", {"characters": 200_000})] * 8)
            assert sum(len(message["content"]) for message in many.messages) < MIB
    assert cut._value.get() == 9


async def test_arguments_that_no_wire_can_carry_are_the_policys_fault(
    table: dict[str, object],
) -> None:
    deep: object = "x"
    for _ in range(300):
        deep = [deep]
    async with served({"sums": table}) as client, client.session() as session:
        await session.reset("sums", "train", 1)
        assert "'a ? b'" in await say(session, "remember", note="a \ud800 b")
        assert await say(session, "remember", note=deep) == (
            "Arguments are nested too deeply; give plain values."
        )
        assert await say(session, "add", a=1, b=2) == "3"


async def test_a_flood_ends_the_episode(table: dict[str, object]) -> None:
    async with served({"sums": table}) as client, client.session() as session:
        await session.reset("sums", "train", 1)
        async with failing("PEER_INVALID", "more than 4194304 bytes"):
            await say(session, "much", characters=20 * MIB)


@each_answer
async def test_a_flood_over_http(
    kind: str, servers: dict[str, str], http_table: dict[str, object]
) -> None:
    async with served({"sums": {**http_table, "url": servers[kind]}}) as client:
        async with client.session() as session:
            await session.reset("sums", "train", 1)
            async with failing("PEER_INVALID", "more than 4194304 bytes"):
                await say(session, "much", characters=20 * MIB)


LIES = {
    "bad_schema": ("PEER_INVALID", "the schema of add is none"),
    "big_schema": ("PEER_INVALID", "add is described in more than 65536 characters"),
    "bad_name": ("PEER_INVALID", "a tool's name is no name"),
    "many": ("PEER_INVALID", "more than 128 tools"),
    "garbage": ("PEER_UNREACHABLE", "no session could be begun"),
    "flood": ("PEER_INVALID", "the server sent a line of more than 4194304 bytes"),
}


async def test_servers_that_lie_are_found_at_the_reset(
    table: dict[str, object], http_table: dict[str, object]
) -> None:
    lying = {kind: {**table, "command": python("mcp_servers.py", kind)} for kind in LIES}
    async with served({"sums": http_table, **lying}) as client:
        for kind, (reason, said) in LIES.items():
            async with client.session() as session, failing(reason, said):
                await session.reset(kind, "train", 1)
        async with client.session() as session:
            await session.reset("sums", "train", 1)
            assert await say(session, "add", a=1, b=2) == "3"


async def test_a_schema_that_is_untrue_is_the_tools_fault(table: dict[str, object]) -> None:
    lying = {**table, "command": python("mcp_servers.py", "wrong_schema")}
    async with served({"lies": lying}) as client, client.session() as session:
        opening = await session.reset("lies", "train", 1)
        assert "c" in opening.tools[0]["parameters"]["properties"]
        assert "validation error" in await say(session, "add", c="x")
        assert (await session.step(text="3")).reward == 1.0


async def test_a_mute_server_meets_the_limit_of_a_reset(table: dict[str, object]) -> None:
    before = set(psutil.Process().children(recursive=True))
    mute = {**table, "command": python("mcp_servers.py", "mute")}
    async with served({"mute": mute}, step_timeout_seconds=3) as client:
        async with client.session() as session, failing("STEP_TIMEOUT"):
            await session.reset("mute", "train", 1)
    await _gone(before)


async def test_a_program_that_is_not_there(table: dict[str, object]) -> None:
    async with served({"none": {**table, "command": ["/no/such/program"]}}) as client:
        async with client.session() as session, failing("PEER_UNREACHABLE", "cannot be started"):
            await session.reset("none", "train", 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"url": "http://127.0.0.1:1/mcp"}, "command or url: give one of them"),
        ({"command": ()}, "command or url: give one of them"),
        ({"headers": {"A": "B"}}, "headers: leave out; a command gets none"),
        (
            {"command": (), "url": "http://192.0.2.1/mcp", "headers": {"A": "HOME"}},
            "suite 'sums': headers would go to url = 'http://192.0.2.1/mcp' in plaintext",
        ),
        (
            {"command": (), "url": "https://192.0.2.1/mcp", "headers": {"A": "NO_SUCH_KEY"}},
            "headers.A: the environment variable NO_SUCH_KEY is not set",
        ),
        ({"tasks": {"train": "/no/such/file"}}, "/no/such/file"),
        ({"grader": "no_such_module:grade"}, "cannot load 'no_such_module:grade'"),
        ({"grader": "test_adapter_mcp:LIES"}, "grader = 'test_adapter_mcp:LIES' is no function"),
        ({"max_sesions": 3}, "max_sesions: unknown key; did you mean 'max_sessions'?"),
    ],
)
def test_a_mistake_in_the_table_is_named_at_the_start(
    table: dict[str, object], changes: dict[str, object], said: str
) -> None:
    made = {**table, **changes, "adapter": ADAPTERS["mcp"]}
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_suites({"sums": made})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "?"}\nnonsense\n', "train.jsonl, line 2 is no JSON"),
        ('{"question": "?"}\n{"answer": "3"}\n', "train.jsonl, line 2: question: missing"),
        ('{"question": "?", "level": 0}\n', "line 1: level = 0"),
        ("", "is empty; give one JSON object a line"),
    ],
)
def test_a_line_that_is_no_task_is_named(table: dict[str, object], text: str, said: str) -> None:
    Path(table["tasks"]["train"]).write_text(text)  # type: ignore[index]
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_suites({"sums": {**table, "adapter": ADAPTERS["mcp"]}})


def grade(task: dict[str, object], answer: str) -> float:
    """A user's grader, which sees the keys that only it knows."""
    return {"half": 0.5, "much": 7.0}.get(answer, float(answer == task["colour"]))


async def test_a_grader_of_ones_own(http_table: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "colours.jsonl"
    path.write_text('{"question": "Which colour?", "colour": "red"}\n')
    own = {**http_table, "tasks": {"test": str(path)}, "grader": "test_adapter_mcp:grade"}
    async with served({"own": own}) as client:
        for answer, reward in (("red", 1.0), ("half", 0.5), ("blue", 0.0)):
            async with client.session() as session:
                await session.reset("own", "test", 0)
                assert (await session.step(text=answer)).reward == reward
        async with client.session() as session, failing("ENVIRONMENT_FAILED"):
            await session.reset("own", "test", 0)
            await session.step(text="much")
