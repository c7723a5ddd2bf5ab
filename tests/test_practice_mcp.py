"""The practice suite's tools behind MCP: the same episodes, word for word."""

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Sequence
from random import Random
from typing import Any

import mcp_types
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.server.lowlevel import Server

from adapter_helpers import ADAPTERS, served
from envserver.adapters import mcp_peer
from envserver.adapters.mcp import McpSuite
from envserver.environment import Action, AsyncEnvironment, Reset, Step, Suite, ToolCall
from envserver.registry import load_suites
from envserver.suites.practice import PracticeEnvironment, PracticeSuite
from envserver.suites.practice.expert import Expert
from envserver.suites.practice.mcp_server import make_server
from envserver.suites.practice.suite import MAX_TOOL_TURNS
from envserver.suites.practice.tasks import make_task
from envserver.suites.practice.tools import Toolbox
from understudy.client import Session
from understudy.errors import ConfigError

COMMAND = (sys.executable, "-m", "envserver.suites.practice.mcp_server")
TABLE = {
    "adapter": "mcp",
    "suite": "practice",
    "command": [*COMMAND, "--split", "{split}", "--task", "{task}"],
}
CODE = "envserver.suites.code:CodeSuite"
NUM_TASKS = 300


def _suite(**changes: object) -> Suite:
    (suite,) = load_suites({"tools": {**TABLE, "adapter": ADAPTERS["mcp"], **changes}}).values()
    return suite


def _served_in_memory(command: Sequence[str], _: object) -> Server:
    """What the SDK's client takes in place of a process: its server, spoken to in memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--split")
    parser.add_argument("--task", type=int)
    args = parser.parse_args(command[len(COMMAND) :])
    task = make_task(args.split, args.task)
    return make_server(Toolbox(task.world, task.attachment))


async def _both(suite: McpSuite, ordinal: int) -> int:
    """Play a task with and without MCP; what is said must be equal. Returns how many calls."""
    native, through = PracticeSuite().open("test", ordinal), suite.open("test", ordinal)
    num_calls = 0
    try:
        opening, expected = await through.reset(), native.reset()
        assert (opening.task_id, opening.level) == (expected.task_id, expected.level)
        assert (opening.messages, opening.tags) == (expected.messages, expected.tags)
        # As text, so that the order of keys counts: a prompt's tokens come from it.
        tools, same = ([vars(tool) for tool in each.tools] for each in (opening, expected))
        assert json.dumps(tools) == json.dumps(same)
        actions = Expert(native.task, Random(ordinal), carelessness=0.2).actions()
        action, step = next(actions), Step()
        while not step.terminated:
            step = native.step(action)
            assert await through.step(action) == step
            num_calls += len(action.tool_calls)
            if not step.terminated:
                action = actions.send(step)
    finally:
        native.close()
        await through.close()
    return num_calls


async def test_hundreds_of_episodes_are_the_same_word_for_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mcp_peer, "_stdio", _served_in_memory)
    suite = _suite()
    assert isinstance(suite, McpSuite)
    num_calls = [await _both(suite, ordinal) for ordinal in range(NUM_TASKS)]
    assert sum(num_calls) > 2 * NUM_TASKS
    assert suite.num_sessions == 0


async def test_what_is_wrong_with_a_call_is_said_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_peer, "_stdio", _served_in_memory)
    native, through = PracticeSuite().open("test", 0), _suite().open("test", 0)
    native.reset()
    await through.reset()
    calls = [
        ToolCall(name="lookup", arguments={}),
        ToolCall(name="lookup", arguments={"entity": "Mara", "field": 7}),
        ToolCall(name="lookup", arguments={"entity": "\0", "field": "\u265e"}),
        ToolCall(name="search", arguments={"query": "chess \ud800"}),
        ToolCall(name="search", arguments={"query": "x" * 100_000}),
        ToolCall(name="calculate", arguments={"expression": "1 / 0"}),
        ToolCall(name="made-up", arguments={"a": {"b": [None]}}),
    ]
    for turn in [calls[:3], *([call] for call in calls[3:])]:
        action = Action(tool_calls=turn)
        assert await through.step(action) == native.step(action)
    for _ in range(MAX_TOOL_TURNS - 5):
        assert not (await through.step(Action(tool_calls=calls[:1]))).truncated
    assert await through.step(Action(tool_calls=calls[:1])) == Step(truncated=True)
    native.close()
    await through.close()


class _Blocking(PracticeSuite):
    """As suites are unless they say otherwise: in threads."""

    blocking = True


class _Coroutines(_Blocking):
    def open(self, split: str, task_ordinal: int) -> Any:
        return _Awaited(super().open(split, task_ordinal))


class _Awaited(AsyncEnvironment):
    def __init__(self, inner: PracticeEnvironment) -> None:
        self._inner = inner

    async def reset(self) -> Reset:
        return self._inner.reset()

    async def step(self, action: Action) -> Step:
        return self._inner.step(action)

    async def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("kind", [_Blocking, _Coroutines])
async def test_suites_of_every_kind_give_tasks(
    kind: type[Suite], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_peer, "_stdio", _served_in_memory)
    suite = _suite(suite=f"test_practice_mcp:{kind.__name__}")
    assert isinstance(suite, McpSuite)
    assert await _both(suite, 2)
    assert suite.num_sessions == 0


async def _open(session: Session, suite: str, ordinal: int) -> list[object]:
    opening = await session.reset(suite, "test", ordinal)
    return [opening.messages, json.dumps(opening.tools), opening.tags, opening.level]


async def test_real_processes_over_the_wire() -> None:
    tables = {"through": TABLE, "practice": {"adapter": "practice"}}

    async def play(ordinal: int) -> None:
        async with client.session() as one, client.session() as other:
            assert await _open(one, "through", ordinal) == await _open(other, "practice", ordinal)
            task = make_task("test", ordinal)
            calls = [(call.name, call.arguments) for call in task.chains[0].calls[:1]]
            calls.append(("search", {"query": "chess \ud800"}))
            through, native = await one.step(calls), await other.step(calls)
            assert through.messages == native.messages
            assert (await one.step(text=task.answer)).reward == 1.0
            assert (await other.step(text="wrong")).reward == 0.0

    async with served(tables) as client:
        described, native = await client.describe("through"), await client.describe("practice")
        assert described.splits == native.splits
        assert described.digest != native.digest
        await asyncio.gather(*(play(ordinal) for ordinal in (0, 1, 2)))


async def test_any_client_of_the_sdk_can_use_the_server() -> None:
    words = [*COMMAND[1:], "--split", "test", "--task", "2"]
    server = StdioServerParameters(command=COMMAND[0], args=words)
    task = make_task("test", 2)
    name = task.world.entities["city"][0]
    async with Client(stdio_client(server)) as client:
        tools = (await client.list_tools()).tools
        assert [tool.name for tool in tools] == ["lookup", "search", "read_csv", "calculate"]
        right = await client.call_tool("lookup", {"entity": name, "field": "mayor"})
        wrong = await client.call_tool("lookup", {"entity": name, "field": "age"})
    assert right.content == [
        mcp_types.TextContent(type="text", text=task.world.facts[name]["mayor"])
    ]
    assert (right.is_error, wrong.is_error) == (False, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": {"test": "t.jsonl"}}, "tasks or suite: give one of them"),
        ({"suite": ""}, "tasks or suite: give one of them"),
        ({"prompt": "Go."}, "prompt: leave out; the suite 'practice' has its own"),
        ({"suite": "nothing"}, "'nothing' is not registered"),
        ({"suite": CODE}, f"suite = '{CODE}' needs its own tools and the sandbox"),
    ],
)
def test_a_mistake_in_the_table_is_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        _suite(**changes)
