"""Sessions of one client: what comes is spread over episodes, what they answer is gathered.

    SessionsRequest -> SessionStream -> Session -> Episode
                            ^              |
    SessionsResponse <------+---- outbox <-+

A request of an environment that never waits is answered on the spot; all others run in a task each,
so that sessions do not wait for each other. Answers that are ready at one time travel together.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TypeVar

import grpc

from envserver.environment import AsyncEnvironment, Environment, Step, Suite
from envserver.episode import Episode, Workers, guard
from envserver.messages import decode_action, encode_failure, encode_reset, encode_step
from understudy import metrics
from understudy.config import EnvserverConfig
from understudy.rpc import RoleControl, ServiceError
from understudy.v1 import common_pb2, environment_pb2

_log = logging.getLogger(__name__)
MAX_REQUESTS = 2**12
"""Most requests, or answers, of one message."""
_MESSAGE_BYTES = 2**20
"""Answers that one message packs; a larger one goes alone."""
_OUTBOX_BYTES = 4 * 2**20
"""Answers that wait to be sent; above that, no request is read."""
_IDLE_LOOKS = 4
"""How often within envserver.idle_timeout_seconds silent sessions are looked for."""

Response = environment_pb2.SessionResponse
T = TypeVar("T")


class Host:
    """What the sessions of all clients share: suites, threads, and room for so many of them."""

    def __init__(
        self,
        suites: Mapping[str, Suite],
        config: EnvserverConfig,
        control: RoleControl,
        workers: Workers,
    ) -> None:
        self.config = config
        self.control = control
        self.workers = workers
        self.num_sessions = 0
        self.closing: set[asyncio.Task[None]] = set()
        """Sessions that are being closed; the event loop itself holds tasks only weakly."""
        self._suites = suites
        self.step_seconds = {name: metrics.ENVIRONMENT_STEP_SECONDS.labels(name) for name in suites}

    def suite(self, name: str) -> Suite:
        """A suite by its name; by none, the only one. Raises ServiceError (UNKNOWN_SUITE)."""
        if not name and len(self._suites) == 1:
            return next(iter(self._suites.values()))
        if name not in self._suites:
            raise ServiceError(
                grpc.StatusCode.NOT_FOUND,
                "UNKNOWN_SUITE",
                f"suite {name!r} is not served here; served: {', '.join(sorted(self._suites))}; "
                "add it to envserver.suites",
            )
        return self._suites[name]

    def admit(self) -> None:
        """Take the room of a session. Raises ServiceError while the role does not serve, or is
        full."""
        self.control.admit()
        if self.num_sessions >= self.config.max_sessions:
            raise ServiceError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "SESSIONS_FULL",
                f"envserver.max_sessions = {self.config.max_sessions} are open; try again, raise "
                "it, or start another environment server",
                retry_after_seconds=0.5,
            )
        self.num_sessions += 1
        metrics.SESSIONS.inc()

    def leave(self) -> None:
        """Give the room of a session back."""
        self.num_sessions -= 1
        metrics.SESSIONS.dec()


class Session:
    """One episode, and which request of it is under way."""

    def __init__(self, host: Host, suite: Suite) -> None:
        self._host = host
        self._suite = suite
        self._seconds = host.step_seconds[suite.name]
        self._episode: Episode | None = None
        self.task: asyncio.Task[None] | None = None
        """Answers a request, if that has to wait for anything."""
        self.silent_since = 0.0
        """Loop time of the last answer."""

    @property
    def waits(self) -> bool:
        """Whether calls of the environment may have to wait."""
        return self._episode.waits if self._episode else self._suite.blocking

    @property
    def ended(self) -> bool:
        """Whether the environment ended the episode."""
        return self._episode is not None and self._episode.ended

    async def open(self, task: common_pb2.TaskReference) -> None:
        """Open the environment. Raises ServiceError."""
        timeout = self._host.config.step_timeout_seconds
        workers = self._host.workers if self._suite.blocking else None
        opening = (workers.run if workers else _run_here)(_open, self._suite, task)
        environment = await guard("open", timeout if workers else None, opening)
        self._episode = Episode(environment, workers, timeout)

    async def answer(self, request: environment_pb2.SessionRequest) -> Response:
        """Play what is asked. Raises ServiceError."""
        if self._episode is None:
            await self.open(request.reset.task)
        assert self._episode
        start = time.perf_counter()
        if request.HasField("step"):
            action = decode_action(request.step)
            step = await self._episode.step(request.step.turn, action)
            self._seconds.observe(time.perf_counter() - start)
            _count_tools(self._suite.name, step)
            encoded = encode_step(request.step.turn, step)
            return Response(session=request.session, step=encoded)
        driven = self._episode.drive(request.reset.endpoint)
        reset = await self._episode.reset()
        self._seconds.observe(time.perf_counter() - start)
        return Response(session=request.session, reset=encode_reset(reset, driven))

    async def close(self) -> None:
        """Free the environment and the session's room."""
        try:
            if self._episode:
                await self._episode.close()
        finally:
            self._host.leave()


class SessionStream:
    """Serves the sessions of one stream."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[int, Session] = {}
        self._outbox: list[Response] = []
        self._outbox_bytes = 0
        self._changed = asyncio.Event()
        self._sent = asyncio.Event()

    async def serve(
        self, stream: AsyncIterator[environment_pb2.SessionsRequest]
    ) -> AsyncIterator[environment_pb2.SessionsResponse]:
        """Answer requests until there are no more, or the server drains."""
        helpers = [
            asyncio.create_task(self._read(stream)),
            asyncio.create_task(self._watch_idle()),
            asyncio.create_task(self._wake_on_drain()),
        ]
        reader = helpers[0]
        try:
            while True:
                if self._outbox:
                    yield environment_pb2.SessionsResponse(responses=self._pack())
                elif reader.done() and (reader.exception() or not self._num_busy):
                    reader.result()
                    return
                elif self._host.control.draining.is_set() and not self._sessions:
                    return
                else:
                    self._changed.clear()
                    await self._changed.wait()
        finally:
            for helper in helpers:
                helper.cancel()

    def close(self) -> None:
        """Give up the sessions that are left."""
        for number in list(self._sessions):
            self._give_up(number)

    async def _read(self, stream: AsyncIterator[environment_pb2.SessionsRequest]) -> None:
        try:
            async for message in stream:
                if len(message.requests) > MAX_REQUESTS:
                    raise _too_many(len(message.requests))
                for request in message.requests:
                    await self._take(request)
                while self._outbox_bytes > _OUTBOX_BYTES:
                    self._sent.clear()
                    await self._sent.wait()
        finally:
            self._changed.set()

    async def _take(self, request: environment_pb2.SessionRequest) -> None:
        session = self._sessions.get(request.session)
        if request.HasField("close"):
            self._give_up(request.session)
            return
        if session is None and request.HasField("reset"):
            await self._begin(request)
            return
        try:
            _check_order(session, request)
        except ServiceError as error:
            self._fail(request.session, error)
            return
        assert session
        await self._start(session, request)

    async def _begin(self, request: environment_pb2.SessionRequest) -> None:
        try:
            self._host.admit()
        except ServiceError as error:  # not a failure of any environment, and not counted as one
            self._send(Response(session=request.session, failure=encode_failure(error)))
            return
        try:
            suite = self._host.suite(request.reset.task.suite)
        except ServiceError as error:
            self._host.leave()
            self._fail(request.session, error)
            return
        session = self._sessions[request.session] = Session(self._host, suite)
        try:
            if not suite.blocking:
                await session.open(request.reset.task)
        except ServiceError as error:
            self._fail(request.session, error)
            return
        await self._start(session, request)

    async def _start(self, session: Session, request: environment_pb2.SessionRequest) -> None:
        if session.waits:
            session.task = asyncio.create_task(self._answer(session, request))
        else:
            await self._answer(session, request)

    async def _answer(self, session: Session, request: environment_pb2.SessionRequest) -> None:
        try:
            response = await session.answer(request)
        except ServiceError as error:
            self._fail(request.session, error)
            return
        except Exception:
            _log.exception("session %d failed", request.session)
            hidden = ServiceError(grpc.StatusCode.INTERNAL, "INTERNAL", "see the server's log")
            self._fail(request.session, hidden)
            return
        session.task = None
        session.silent_since = self._loop.time()
        self._send(response)
        if session.ended:
            self._give_up(request.session)

    def _fail(self, number: int, error: ServiceError) -> None:
        metrics.ENVIRONMENT_FAILURES.labels(error.reason).inc()
        self._send(Response(session=number, failure=encode_failure(error)))
        self._give_up(number)

    def _give_up(self, number: int) -> None:
        """Forget a session, and close its environment once its task has ended."""
        session = self._sessions.pop(number, None)
        if session is None:
            return
        closing = asyncio.create_task(_close(session, asyncio.current_task()))
        self._host.closing.add(closing)
        closing.add_done_callback(self._host.closing.discard)
        self._changed.set()

    def _send(self, response: Response) -> None:
        self._outbox.append(response)
        self._outbox_bytes += response.ByteSize()
        self._changed.set()

    def _pack(self) -> list[Response]:
        """Take as many answers as one message has room for."""
        count = size = 0
        for response in self._outbox[:MAX_REQUESTS]:
            size += response.ByteSize()
            if count and size > _MESSAGE_BYTES:
                break
            count += 1
        packed, self._outbox = self._outbox[:count], self._outbox[count:]
        self._outbox_bytes = sum(response.ByteSize() for response in self._outbox)
        self._sent.set()
        return packed

    @property
    def _num_busy(self) -> int:
        return sum(session.task is not None for session in self._sessions.values())

    async def _watch_idle(self) -> None:
        """End sessions whose client is silent. One timer for all: one a session costs a fifth of a
        small step's processor time."""
        limit = self._host.config.idle_timeout_seconds
        while True:
            await asyncio.sleep(limit / _IDLE_LOOKS)
            end = self._loop.time() - limit
            for number, session in list(self._sessions.items()):
                if session.task is None and session.silent_since < end:
                    self._fail(number, _idle(limit))

    async def _wake_on_drain(self) -> None:
        await self._host.control.draining.wait()
        self._changed.set()


async def _close(session: Session, closer: asyncio.Task[None] | None) -> None:
    if session.task and session.task is not closer:
        session.task.cancel()
        await asyncio.wait([session.task])
    await session.close()


def _check_order(session: Session | None, request: environment_pb2.SessionRequest) -> None:
    if session is None:
        raise _out_of_order("a session begins with a reset")
    if session.task:
        raise _out_of_order("a request came before the one before was answered")
    if not request.HasField("step"):
        raise _out_of_order("reset was called before; a session is one episode")


async def _run_here(function: Callable[..., T], *arguments: object) -> T:
    return function(*arguments)


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


def _count_tools(suite: str, step: Step) -> None:
    for outcome in step.tool_outcomes:
        kind = "cut" if outcome.cut else "ok" if outcome.ok else outcome.limit or "error"
        metrics.TOOL_CALLS.labels(suite, outcome.name, kind).inc()


def _too_many(number: int) -> ServiceError:
    return ServiceError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "BAD_MESSAGE",
        f"{number} requests in one message; send at most {MAX_REQUESTS}",
    )


def _idle(limit: float) -> ServiceError:
    return ServiceError(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "SESSION_IDLE",
        f"no message within envserver.idle_timeout_seconds = {limit:g}; the episode is over",
    )


def _out_of_order(message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.FAILED_PRECONDITION, "OUT_OF_ORDER", message)
