"""An OpenEnv server's environment as a suite, over its WebSocket.

    [envserver.suites.echo]
    adapter = "openenv"
    url = "http://127.0.0.1:8000"

The wire, as openenv 0.10 speaks it: `{"type": "reset" | "step", "data": ...}`, answered by
`{"type": "observation", "data": {"observation": ..., "reward": ..., "done": ...}}` or by
`{"type": "error", "data": {"code": ..., "message": ...}}`. The schema of actions is at `/schema`.
One socket is one environment.
"""

import asyncio
import json
import urllib.request
from contextlib import suppress
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from envserver.adapters.peer import MAX_PEER_BYTES, peer_fault, peer_full
from envserver.adapters.seeded import SeededOptions, as_text, opening
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
    user_message,
)

_CONNECT_SECONDS = 10.0
_CLOSE_SECONDS = 2.0
_TOO_BIG = 1009  # the close code of WebSockets for a message above the limit


class OpenEnvOptions(SeededOptions):
    """Options of a suite of an OpenEnv server."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")]
    """Where the server is."""


class _Observed(BaseModel):
    observation: dict[str, Any]
    reward: float | None = None
    done: bool = False


class _Answer(BaseModel):
    type: str
    data: dict[str, Any]


class OpenEnvSuite(Suite):
    """Episodes of the one environment that an OpenEnv server has."""

    Options = OpenEnvOptions
    blocking = False

    def __init__(self, name: str, options: OpenEnvOptions) -> None:
        self.name = name
        self.options = options
        self._tool: ToolSpec | None = None

    def describe(self) -> SuiteDescription:
        """The suite's splits and digest: of the options, not of what the server has behind them."""
        return self.options.describe(self.name, "openenv")

    def open(self, split: str, task_ordinal: int) -> "OpenEnvEnvironment":
        """Make the environment of one seed."""
        seed = self.options.seed(split, task_ordinal)
        return OpenEnvEnvironment(self, f"{self.name}-{split}-{task_ordinal}", seed)

    async def tool(self) -> ToolSpec:
        """The tool `act`, whose arguments are an action; asked for once."""
        if self._tool is None:
            try:
                self._tool = await asyncio.to_thread(_fetch_tool, self.options.url)
            except OSError as error:
                raise peer_fault(
                    "PEER_UNREACHABLE", self.name, f"{self.options.url}/schema gave nothing", error
                ) from error
            except (ValueError, RecursionError) as error:
                raise peer_fault(
                    "PEER_INVALID", self.name, "/schema has no schema of an action", error
                ) from error
        return self._tool


class OpenEnvEnvironment(AsyncEnvironment):
    """One episode. The wire has `done` only, which is taken for `terminated`."""

    def __init__(self, suite: OpenEnvSuite, task_id: str, seed: int) -> None:
        self._suite = suite
        self._task_id = task_id
        self._seed = seed
        self._socket: ClientConnection | None = None

    async def reset(self) -> Reset:
        """Open the socket and begin with the task's seed."""
        tool = await self._suite.tool()
        url = f"ws{self._suite.options.url.removeprefix('http').rstrip('/')}/ws"
        try:
            self._socket = await connect(
                url,
                max_size=MAX_PEER_BYTES,
                open_timeout=_CONNECT_SECONDS,
                close_timeout=_CLOSE_SECONDS,
                ping_interval=None,  # a step may keep the server's loop; it has a limit here
                compression=None,
                proxy=None,
            )
        except (OSError, WebSocketException) as error:
            raise peer_fault(
                "PEER_UNREACHABLE", self._suite.name, f"{url} gave no session", error
            ) from error
        observed = await self._ask("reset", {"seed": self._seed})
        if isinstance(observed, str):
            raise peer_fault("PEER_FAILED", self._suite.name, "reset was refused", observed)
        message = opening(self._suite.options.prompt, _text(observed.observation))
        return Reset(task_id=self._task_id, level=1, messages=[message], tools=[tool])

    async def step(self, action: Action) -> Step:
        """Act once a call, until the episode ends."""
        if not action.tool_calls:
            return Step(messages=[user_message("Call the tool act.")])
        messages, outcomes, reward, done = [], [], 0.0, False
        for call in action.tool_calls:
            observed = await self._act(call)
            ok = isinstance(observed, _Observed)
            name = "act" if call.name == "act" else "unknown"
            outcomes.append(ToolOutcome(name=name, ok=ok))
            if isinstance(observed, str):
                messages.append(Message(role="tool", content=observed))
                continue
            messages.append(Message(role="tool", content=_text(observed.observation)))
            reward += observed.reward or 0.0
            done = observed.done
            if done:
                break
        return Step(messages=messages, reward=reward, terminated=done, tool_outcomes=outcomes)

    async def close(self) -> None:
        """Close the socket, and with it the server's environment."""
        if self._socket:
            await self._socket.close()

    async def _act(self, call: ToolCall) -> _Observed | str:
        if call.name != "act":
            return "Unknown tool; use act."
        return await self._ask("step", call.arguments)

    async def _ask(self, kind: str, data: dict[str, Any]) -> _Observed | str:
        """One exchange: what was observed, or why the action was refused."""
        assert self._socket
        name = self._suite.name
        try:
            with suppress(
                ConnectionClosed
            ):  # a full server has said so and gone before it is asked
                await self._socket.send(json.dumps({"type": kind, "data": data}))
            answer = _Answer.model_validate_json(await self._socket.recv())
            if answer.type == "observation":
                return _Observed.model_validate(answer.data)
        except ConnectionClosed as error:
            if error.sent and error.sent.code == _TOO_BIG:
                raise peer_fault(
                    "PEER_INVALID", name, f"a message was above {MAX_PEER_BYTES} bytes"
                ) from error
            raise peer_fault(
                "PEER_LOST", name, f"the server went away in a {kind}", error
            ) from error
        except ValidationError as error:
            raise peer_fault(
                "PEER_INVALID", name, f"the answer to a {kind} was no answer", error
            ) from error
        code = answer.data.get("code")
        if code == "CAPACITY_REACHED":
            raise peer_full(name, "the OpenEnv server has no session left")
        if code == "VALIDATION_ERROR":
            return "This is no action; see the tool's schema."
        raise peer_fault("PEER_FAILED", name, f"the server failed in a {kind}", answer.data)


def _text(observation: dict[str, Any]) -> str:
    """The observation without empty metadata: its only field if that is text, else JSON."""
    shown = {key: value for key, value in observation.items() if key != "metadata" or value}
    values = list(shown.values())
    return as_text(values[0] if len(values) == 1 and isinstance(values[0], str) else shown)


def _fetch_tool(url: str) -> ToolSpec:
    """Read `/schema`. Raises OSError or ValueError."""
    with urllib.request.urlopen(f"{url.rstrip('/')}/schema", timeout=_CONNECT_SECONDS) as answer:
        body = answer.read(MAX_PEER_BYTES + 1)
    if len(body) > MAX_PEER_BYTES:
        raise ValueError(f"/schema is above {MAX_PEER_BYTES} bytes")
    schema = json.loads(body).get("action") if body.startswith(b"{") else None
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        raise ValueError("no properties of an action")
    properties = {key: value for key, value in schema["properties"].items() if key != "metadata"}
    return ToolSpec(
        name="act",
        description="Act in the environment.",
        parameters={**schema, "properties": properties},
    )
