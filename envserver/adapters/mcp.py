"""The tools of an MCP server as a suite, with tasks from a file or from another suite.

    [envserver.suites.files]
    adapter = "mcp"
    command = ["python", "my_server.py"]        # or url = "http://127.0.0.1:8000/mcp"
    tasks = { train = "train.jsonl", test = "test.jsonl" }      # or suite = "practice"

Each episode has a session of its own: with `command` a process of its own too.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import mcp_types
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from envserver.adapters.mcp_peer import McpPeer, PeerError, read_headers
from envserver.adapters.mcp_tasks import FileTasks, SuiteTasks, Task, Tasks
from envserver.adapters.peer import peer_fault, peer_full
from envserver.environment import (
    Action,
    AsyncEnvironment,
    Message,
    Reset,
    Step,
    Suite,
    SuiteDescription,
    ToolCall,
    ToolOutcome,
    ToolSpec,
)
from understudy.config.base import Section

MAX_TOOLS = 128
MAX_SCHEMA_CHARACTERS = 2**16
MAX_ARGUMENT_DEPTH = 64
"""Lists and objects within each other in a call; the SDK's parsers end somewhere above."""
MAX_STEP_CHARACTERS = 2**19
"""What the results of all calls of a step are cut to; half of what a step may have."""
_TOOL_NAME = re.compile(r"[A-Za-z0-9_./-]{1,128}")


class McpOptions(Section):
    """Options of a suite of an MCP server."""

    command: tuple[str, ...] = ()
    """Program and arguments of a server that speaks over its standard input and output; it is
    started for each episode. `{split}` and `{task}` in a word become the task's split and
    ordinal."""
    url: str = ""
    """Address of a server that speaks streamable HTTP. Either this or `command`."""
    headers: Mapping[str, str] = Field(default_factory=dict)
    """Headers of every request to `url`, and the environment variable of the server's that has the
    value of each, such as a token's."""
    tasks: Mapping[str, Path] = Field(default_factory=dict)
    """Splits and their files: JSON lines with `question`, `answer`, and `level` from 1 if any."""
    suite: str = ""
    """Another suite, by registered name or `module:Class`, that gives tasks, opening messages and
    grades in place of `tasks`, `grader` and `prompt`. Its own tools are not offered, but its limit
    of tool turns holds."""
    grader: str = ""
    """`module:function` of (task, answer) that returns the reward, 0 to 1. Without it: 1 if the
    answer is right by GAIA's rules."""
    prompt: str = "Use the tools, then reply with the bare answer."
    """The system message."""
    max_sessions: PositiveInt = 64
    """Episodes at one time; one more is refused with a retry hint."""
    call_timeout_seconds: PositiveFloat = 60.0
    """A tool that takes longer has failed; the policy is told, and the episode goes on."""
    max_result_characters: PositiveInt = 16_384
    """What is longer is cut, and says so."""

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if bool(self.command) == bool(self.url):
            raise ValueError("command or url: give one of them")
        if bool(self.tasks) == bool(self.suite):
            raise ValueError("tasks or suite: give one of them")
        if self.headers and not self.url:
            raise ValueError("headers: leave out; a command gets none")
        if self.suite and (unused := {"grader", "prompt"} & self.model_fields_set):
            raise ValueError(
                f"{', '.join(sorted(unused))}: leave out; the suite {self.suite!r} has its own"
            )
        return self


class McpSuite(Suite):
    """Tasks to be done with the tools of an MCP server."""

    Options = McpOptions
    blocking = False

    def __init__(self, name: str, options: McpOptions) -> None:
        """Read the tasks and the headers, and find the grader.

        Raises:
            ConfigError: a header's variable is not set, or its value would go in plaintext beyond
                this machine.
            Exception: what FileTasks and SuiteTasks raise.
        """
        self.name = name
        self.options = options
        self.headers = read_headers(name, options.url, options.headers)
        self.tasks: Tasks
        if options.suite:
            self.tasks = SuiteTasks(options.suite)
        else:
            self.tasks = FileTasks(name, options.tasks, options.prompt, options.grader)
        self.num_sessions = 0
        self._counted: set[str] = set()

    def describe(self) -> SuiteDescription:
        """The suite's splits, levels and digest: of tasks and options, not of the server."""
        options = self.options.model_dump_json(exclude={"tasks", "max_sessions"})
        content = f"{options}\n{self.tasks.content}"
        return SuiteDescription(
            name=self.name,
            splits=dict(self.tasks.splits),
            levels=self.tasks.levels,
            digest=hashlib.sha256(content.encode()).hexdigest()[:16],
            reward_range=self.tasks.reward_range,
            metadata=dict(self.tasks.metadata),
        )

    def open(self, split: str, task_ordinal: int) -> "McpEnvironment":
        """Make the environment of one task. Raises SESSIONS_FULL beyond max_sessions."""
        if not 0 <= task_ordinal < self.tasks.splits[split]:
            raise KeyError(task_ordinal)
        if self.num_sessions >= self.options.max_sessions:
            raise peer_full(self.name, f"max_sessions = {self.options.max_sessions} are open")
        self.num_sessions += 1
        reference = {"{split}": split, "{task}": str(task_ordinal)}
        command = tuple(_fill(self.options.command, reference))
        return McpEnvironment(self, self.tasks.open(split, task_ordinal), command)

    def label(self, tool: str, listed: bool) -> str:
        """What a tool is counted as: names of the policy's or without end make no new series."""
        if listed and len(self._counted) < MAX_TOOLS:
            self._counted.add(tool)
        return tool if tool in self._counted else "unknown"


class McpEnvironment(AsyncEnvironment):
    """One episode: each turn calls tools, and the first turn without a call is the answer."""

    def __init__(self, suite: McpSuite, task: Task, command: tuple[str, ...]) -> None:
        self._suite = suite
        self._task = task
        self._command = command
        self._peer: McpPeer | None = None
        self._tools: dict[str, ToolSpec] = {}
        self._num_tool_turns = 0

    async def reset(self) -> Reset:
        """Begin the session and take over its tools."""
        self._peer = McpPeer(self._command, self._suite.options.url, self._suite.headers)
        try:
            for tool in await self._peer.tools(MAX_TOOLS):
                self._tools[tool.name] = _specify(tool)
        except PeerError as error:
            raise self._fault(error) from error
        opening = await self._task.begin()
        return replace(opening, tools=list(self._tools.values()))

    async def step(self, action: Action) -> Step:
        """Make the calls one after the other, or grade the answer."""
        if not action.tool_calls:
            return await self._task.grade(action.text)
        if self._num_tool_turns == self._suite.tasks.max_tool_turns:
            return Step(truncated=True)
        self._num_tool_turns += 1
        room = MAX_STEP_CHARACTERS // len(action.tool_calls)
        limit = min(self._suite.options.max_result_characters, room)
        try:
            results = [await self._call(call, limit) for call in action.tool_calls]
        except PeerError as error:
            raise self._fault(error) from error
        return Step(
            messages=[Message(role="tool", content=text) for text, _ in results],
            tool_outcomes=[outcome for _, outcome in results],
        )

    async def close(self) -> None:
        """End the session and the task."""
        self._suite.num_sessions -= 1
        try:
            await self._task.close()
        finally:
            if self._peer:
                await self._peer.close()

    async def _call(self, call: ToolCall, limit: int) -> tuple[str, ToolOutcome]:
        assert self._peer
        if call.name not in self._tools:
            known = ", ".join(self._tools)
            return f"Unknown tool; use {known}."[:limit], ToolOutcome(name="unknown", ok=False)
        name = self._suite.label(call.name, listed=True)
        try:
            arguments = _sendable(call.arguments, MAX_ARGUMENT_DEPTH)
        except ValueError as error:
            return str(error), ToolOutcome(name=name, ok=False)
        timeout = self._suite.options.call_timeout_seconds
        result = await self._peer.call(call.name, arguments, timeout)
        text = _text(result)
        cut = len(text) > limit
        if cut:
            text = f"{text[:limit]}\n[cut: {len(text)} characters in all]"
        return text, ToolOutcome(name=name, ok=not result.is_error, cut=cut)

    def _fault(self, error: PeerError) -> Exception:
        return peer_fault(error.reason, self._suite.name, str(error), repr(error.__cause__))


def _fill(command: Iterable[str], reference: Mapping[str, str]) -> Iterator[str]:
    """The words of a command with the task's reference in place of its placeholders."""
    for word in command:
        for placeholder, value in reference.items():
            word = word.replace(placeholder, value)
        yield word


def _sendable(value: Any, depth: int) -> Any:
    """A policy's arguments without lone surrogates, which have no UTF-8.

    Raises ValueError, with a remedy, for what is nested deeper than `depth`.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if not isinstance(value, dict | list):
        return value
    if depth == 0:
        raise ValueError("Arguments are nested too deeply; give plain values.")
    if isinstance(value, list):
        return [_sendable(item, depth - 1) for item in value]
    return {_sendable(key, depth): _sendable(item, depth - 1) for key, item in value.items()}


def _specify(tool: mcp_types.Tool) -> ToolSpec:
    """A tool as the policy sees it. Raises PeerError for a name or a schema that is none."""
    if not _TOOL_NAME.fullmatch(tool.name):
        raise PeerError("PEER_INVALID", "a tool's name is no name")
    schema = tool.input_schema
    try:
        Draft202012Validator.check_schema(schema)
        size = len(json.dumps(schema)) + len(tool.description or "")
    except (SchemaError, RecursionError, ValueError) as error:
        raise PeerError("PEER_INVALID", f"the schema of {tool.name} is none") from error
    if schema.get("type") != "object":
        raise PeerError("PEER_INVALID", f"the schema of {tool.name} is of no object")
    if size > MAX_SCHEMA_CHARACTERS:
        raise PeerError(
            "PEER_INVALID",
            f"{tool.name} is described in more than {MAX_SCHEMA_CHARACTERS} characters",
        )
    return ToolSpec(name=tool.name, description=tool.description or "", parameters=schema)


def _text(result: mcp_types.CallToolResult) -> str:
    """A result's texts; what is no text is only named."""
    parts = []
    for block in result.content:
        if isinstance(block, mcp_types.TextContent):
            parts.append(block.text)
        elif isinstance(block, mcp_types.EmbeddedResource) and isinstance(
            block.resource, mcp_types.TextResourceContents
        ):
            parts.append(block.resource.text)
        else:
            parts.append(f"[{block.type}, which is no text]")
    if not parts and result.structured_content is not None:
        parts.append(json.dumps(result.structured_content))
    return "\n".join(parts)
