"""EnvironmentService: decodes, calls, encodes."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import grpc

from envserver.environment import (
    Action,
    AsyncEnvironment,
    Environment,
    Message,
    Reset,
    Step,
    Suite,
    ToolCall,
)
from envserver.episode import Episode, Workers, guard
from understudy import metrics
from understudy.config import EnvserverConfig
from understudy.rpc import RoleControl, ServiceError
from understudy.v1 import common_pb2, environment_pb2, environment_pb2_grpc

MAX_OBSERVATION_CHARACTERS = 2**20
SessionRequests = AsyncIterator[environment_pb2.SessionRequest]


class EnvironmentServicer(environment_pb2_grpc.EnvironmentServiceServicer):
    """Serves a fixed set of suites to many sessions."""

    def __init__(
        self, suites: Mapping[str, Suite], config: EnvserverConfig, control: RoleControl
    ) -> None:
        self.suites = suites
        self.config = config
        self.control = control
        self.workers = Workers(config.worker_threads)
        self.num_sessions = 0
        self._step_seconds = {
            name: metrics.ENVIRONMENT_STEP_SECONDS.labels(name) for name in suites
        }

    async def DescribeSuite(
        self, request: environment_pb2.DescribeSuiteRequest, context: object
    ) -> environment_pb2.DescribeSuiteResponse:
        description = self._suite(request.suite).describe()
        low, high = description.reward_range
        return environment_pb2.DescribeSuiteResponse(
            suite=description.name,
            splits=[
                environment_pb2.SplitDescription(name=name, num_tasks=number)
                for name, number in description.splits.items()
            ],
            levels=description.levels,
            digest=description.digest,
            min_reward=low,
            max_reward=high,
        )

    async def Session(
        self, requests: SessionRequests, context: object
    ) -> AsyncIterator[environment_pb2.SessionResponse]:
        self._admit()
        self.num_sessions += 1
        metrics.SESSIONS.inc()
        try:
            async for response in self._play(requests):
                yield response
        except ServiceError as error:
            metrics.ENVIRONMENT_FAILURES.labels(error.reason).inc()
            raise
        finally:
            self.num_sessions -= 1
            metrics.SESSIONS.dec()

    async def _play(
        self, requests: SessionRequests
    ) -> AsyncIterator[environment_pb2.SessionResponse]:
        first = await self._next(requests)
        if first is None:
            return
        if not first.HasField("reset"):
            raise ServiceError(
                grpc.StatusCode.FAILED_PRECONDITION, "OUT_OF_ORDER", "the first message is a reset"
            )
        task = first.reset.task
        suite = self._suite(task.suite)
        seconds = self._step_seconds[suite.name]
        if suite.blocking:
            timeout = self.config.step_timeout_seconds
            environment = await guard("open", timeout, self.workers.run(_open, suite, task))
            episode = Episode(environment, self.workers, self.config.step_timeout_seconds)
        else:
            episode = Episode(_open(suite, task), None, self.config.step_timeout_seconds)
        try:
            start = time.perf_counter()
            reset = await episode.reset()
            seconds.observe(time.perf_counter() - start)
            yield environment_pb2.SessionResponse(reset=_encode_reset(reset))
            while not episode.ended and (request := await self._next(requests)) is not None:
                if not request.HasField("step"):
                    await episode.reset()  # refuses: a session is one episode
                start = time.perf_counter()
                step = await episode.step(request.step.turn, _decode_action(request.step))
                seconds.observe(time.perf_counter() - start)
                _count_tools(suite.name, step)
                yield environment_pb2.SessionResponse(step=_encode_step(request.step.turn, step))
        finally:
            await episode.close()

    async def _next(self, requests: SessionRequests) -> environment_pb2.SessionRequest | None:
        try:
            async with asyncio.timeout(self.config.idle_timeout_seconds):
                return await anext(requests, None)
        except TimeoutError:
            raise ServiceError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "SESSION_IDLE",
                "no message within envserver.idle_timeout_seconds = "
                f"{self.config.idle_timeout_seconds:g}; the episode is over",
            ) from None

    def _admit(self) -> None:
        self.control.admit()
        if self.num_sessions >= self.config.max_sessions:
            raise ServiceError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "SESSIONS_FULL",
                f"envserver.max_sessions = {self.config.max_sessions} are open; try again, raise "
                "it, or start another environment server",
                retry_after_seconds=0.5,
            )

    def _suite(self, name: str) -> Suite:
        if not name and len(self.suites) == 1:
            return next(iter(self.suites.values()))
        if name not in self.suites:
            raise ServiceError(
                grpc.StatusCode.NOT_FOUND,
                "UNKNOWN_SUITE",
                f"suite {name!r} is not served here; served: {', '.join(sorted(self.suites))}; "
                "add it to envserver.suites",
            )
        return self.suites[name]


def _open(suite: Suite, task: common_pb2.TaskReference) -> Environment | AsyncEnvironment:
    try:
        return suite.open(task.split, task.task_ordinal)
    except KeyError as error:
        raise ServiceError(
            grpc.StatusCode.NOT_FOUND,
            "UNKNOWN_TASK",
            f"suite {suite.name!r} has no task {task.task_ordinal} in split {task.split!r}: "
            f"{error}; DescribeSuite lists splits and sizes",
        ) from None


def _decode_action(request: environment_pb2.StepRequest) -> Action:
    calls: list[ToolCall] = []
    for call in request.tool_calls:
        try:
            arguments = json.loads(call.arguments_json or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ServiceError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "BAD_ACTION",
                f"tool_calls[{len(calls)}].arguments_json is no JSON object",
            )
        calls.append(ToolCall(name=call.name, arguments=arguments))
    return Action(tool_calls=tuple(calls), text=request.text)


def _encode_reset(reset: Reset) -> environment_pb2.ResetResponse:
    return environment_pb2.ResetResponse(
        task_id=reset.task_id,
        level=reset.level,
        messages=_encode_messages(reset.messages),
        tools=[
            common_pb2.ToolDefinition(
                name=tool.name,
                description=tool.description,
                parameters_json=json.dumps(tool.parameters),
            )
            for tool in reset.tools
        ],
    )


def _encode_messages(messages: Sequence[Message]) -> list[common_pb2.ChatMessage]:
    # A lone surrogate, which JSON arguments can hold, has no place in protobuf's text.
    return [
        common_pb2.ChatMessage(
            role=message.role, content=message.content.encode("utf-8", "replace").decode()
        )
        for message in messages
    ]


def _encode_step(turn: int, step: Step) -> environment_pb2.StepResponse:
    if not math.isfinite(step.reward):
        raise _failed(f"reward {step.reward} is not finite")
    size = sum(len(message.content) for message in step.messages)
    if size > MAX_OBSERVATION_CHARACTERS:
        raise _failed(f"an observation of {size} characters is above {MAX_OBSERVATION_CHARACTERS}")
    return environment_pb2.StepResponse(
        turn=turn,
        messages=_encode_messages(step.messages),
        reward=step.reward,
        terminated=step.terminated,
        truncated=step.truncated,
    )


def _failed(message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.INTERNAL, "ENVIRONMENT_FAILED", message)


def _count_tools(suite: str, step: Step) -> None:
    for outcome in step.tool_outcomes:
        kind = "ok" if outcome.ok else "error"
        metrics.TOOL_CALLS.labels(suite, outcome.name, kind).inc()
