"""Client of EnvironmentService: an episode is a session, a session is a stream."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from understudy.client.base import Client
from understudy.config import NetworkConfig
from understudy.v1 import common_pb2, environment_pb2, environment_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How an episode begins."""

    task_id: str
    level: int
    messages: list[dict[str, Any]]
    """[{"role", "content"}]."""
    tools: list[dict[str, Any]]
    """[{"name", "description", "parameters"}]."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the environment answers to one action."""

    messages: list[dict[str, Any]]
    """[{"role", "content"}]."""
    reward: float
    terminated: bool
    truncated: bool


class Session:
    """One episode. Calls go strictly one after another."""

    def __init__(
        self,
        call: "grpc.aio.StreamStreamCall[Any, Any]",
        step_timeout_seconds: float,
    ) -> None:
        self._call = call
        self._timeout = step_timeout_seconds
        self._turn = 0

    async def reset(self, suite: str, split: str, task_ordinal: int) -> Opening:
        """Begin the episode.

        Raises:
            grpc.aio.AioRpcError: with the codes that the rpc's comment lists.
            TimeoutError: the environment did not answer in time; the session is over.
        """
        task = common_pb2.TaskReference(suite=suite, split=split, task_ordinal=task_ordinal)
        request = environment_pb2.SessionRequest(reset=environment_pb2.ResetRequest(task=task))
        reset = (await self._ask(request)).reset
        return Opening(
            task_id=reset.task_id,
            level=reset.level,
            messages=_messages(reset.messages),
            tools=[
                {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": json.loads(tool.parameters_json),
                }
                for tool in reset.tools
            ],
        )

    async def step(
        self, calls: Sequence[tuple[str, Mapping[str, Any]]] = (), text: str = ""
    ) -> Observation:
        """Send one action: tool calls (name, arguments), or the final text if there are none.

        Raises:
            grpc.aio.AioRpcError: with the codes that the rpc's comment lists.
            TimeoutError: the environment did not answer in time; the session is over.
        """
        request = environment_pb2.SessionRequest(
            step=environment_pb2.StepRequest(
                turn=self._turn,
                tool_calls=[
                    environment_pb2.ToolCall(name=_utf8(name), arguments_json=json.dumps(arguments))
                    for name, arguments in calls
                ],
                text=_utf8(text),
            )
        )
        self._turn += 1
        step = (await self._ask(request)).step
        return Observation(
            messages=_messages(step.messages),
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
        )

    async def _ask(
        self, request: environment_pb2.SessionRequest
    ) -> environment_pb2.SessionResponse:
        async with asyncio.timeout(self._timeout):
            try:
                await self._call.write(request)
                response = await self._call.read()
            except asyncio.InvalidStateError:  # the server has ended the call
                await self._raise_status()
        if not isinstance(response, environment_pb2.SessionResponse):
            await self._raise_status()
        return response

    async def _raise_status(self) -> NoReturn:
        raise grpc.aio.AioRpcError(
            await self._call.code(),
            await self._call.initial_metadata(),
            await self._call.trailing_metadata(),
            await self._call.details(),
        )


def _utf8(text: str) -> str:
    # A lone surrogate, which JSON can hold, has no place in protobuf's text.
    return text.encode("utf-8", "replace").decode()


def _messages(messages: Sequence[common_pb2.ChatMessage]) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content} for message in messages]


class EnvironmentClient(Client):
    """Calls one environment server."""

    peer = "environment server"

    def __init__(self, address: str, network: NetworkConfig) -> None:
        super().__init__(address, network)
        self._stub = environment_pb2_grpc.EnvironmentServiceStub(self.channel)

    async def describe(self, suite: str = "") -> environment_pb2.DescribeSuiteResponse:
        """A suite's splits, levels and digest."""
        request = environment_pb2.DescribeSuiteRequest(suite=suite)
        return await self._stub.DescribeSuite(request, timeout=10)

    @contextlib.asynccontextmanager
    async def session(self, step_timeout_seconds: float = 330.0) -> AsyncIterator[Session]:
        """Open a session; the environment lives until the block ends."""
        call = self._stub.Session()
        try:
            yield Session(call, step_timeout_seconds)
        finally:
            # An abandoned call is never collected: cancel ends it whatever its state.
            call.cancel()
