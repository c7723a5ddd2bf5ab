"""Client of EnvironmentService: an episode is a session, and all sessions share a stream."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.client.base import Client
from understudy.client.sessions import SessionStream
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
    tags: tuple[str, ...] = ()
    """Kinds that the task is of."""
    unscored: bool = False
    """Rewards say nothing: the right answer is not known."""
    driven: bool = False
    """The environment leads the conversation over the endpoint that it was given; what is left to
    do is `follow`."""


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

    def __init__(self, stream: SessionStream, number: int, step_timeout_seconds: float) -> None:
        self._stream = stream
        self._number = number
        self._timeout = step_timeout_seconds
        self._turn = 0

    async def reset(self, suite: str, split: str, task_ordinal: int, endpoint: str = "") -> Opening:
        """Begin the episode.

        Args:
            endpoint: base URL that speaks for the policy in this episode, if there is one.

        Raises:
            grpc.aio.AioRpcError: with the codes that the rpc's comment lists.
            TimeoutError: the environment did not answer in time; the session is over.
        """
        task = common_pb2.TaskReference(suite=suite, split=split, task_ordinal=task_ordinal)
        request = environment_pb2.SessionRequest(
            reset=environment_pb2.ResetRequest(task=task, endpoint=endpoint)
        )
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
            tags=tuple(reset.tags),
            unscored=reset.unscored,
            driven=reset.driven,
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
        step = (await self._ask(request)).step
        self._turn += 1
        return Observation(
            messages=_messages(step.messages),
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
        )

    async def follow(self) -> Observation:
        """Wait until an environment that leads the conversation is done.

        Raises:
            grpc.aio.AioRpcError: with the codes that the rpc's comment lists.
            TimeoutError: it did not end in time; the session is over.
        """
        return await self.step()

    async def _ask(
        self, request: environment_pb2.SessionRequest
    ) -> environment_pb2.SessionResponse:
        request.session = self._number
        async with asyncio.timeout(self._timeout):
            return await self._stream.ask(request)


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
        self._stream: SessionStream | None = None
        self._num_opened = 0

    async def describe(self, suite: str = "") -> environment_pb2.DescribeSuiteResponse:
        """A suite's splits, levels and digest."""
        request = environment_pb2.DescribeSuiteRequest(suite=suite)
        return await self._stub.DescribeSuite(request, timeout=10)

    @contextlib.asynccontextmanager
    async def session(self, step_timeout_seconds: float = 330.0) -> AsyncIterator[Session]:
        """Open a session; the environment lives until the block ends."""
        if self._stream is None or self._stream.ended:
            self._stream = SessionStream(self._stub.Sessions())
        stream = self._stream
        self._num_opened += 1
        number = self._num_opened
        try:
            yield Session(stream, number, step_timeout_seconds)
        finally:
            stream.give_up(number)

    async def close(self) -> None:
        """Close the channel; sessions that are open end."""
        if self._stream:
            await self._stream.close()
        await super().close()
