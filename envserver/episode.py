"""One episode on the server: order of calls, where they run, how long they may take."""

import asyncio
import contextlib
import functools
import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import grpc

from envserver.environment import (
    Action,
    AsyncEnvironment,
    DrivenEnvironment,
    Environment,
    Reset,
    Step,
)
from understudy.rpc import ServiceError

MAX_ENDPOINT_CHARACTERS = 2048
_ENDPOINT = re.compile(r"https?://[^\s?#]+")
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class _Job:
    """A blocking call; what has become of it is told apart under the lock of its Workers."""

    call: Callable[[], Any]
    future: "asyncio.Future[Any]"
    begun: bool = False
    left: bool = False
    result: Any = None
    error: Exception | None = None
    done: bool = False

    def run(self) -> None:
        try:
            self.result = self.call()
        except Exception as error:
            # The event loop would take a StopIteration for its own and never end the await.
            stop = isinstance(error, StopIteration)
            self.error = RuntimeError(repr(error)) if stop else error
        except BaseException as error:  # sys.exit in a user's code ends its episode, nothing else
            self.error = RuntimeError(repr(error))


class Workers:
    """Threads that run blocking environments.

    A call that hangs cannot be ended, only left: its thread ends when the call does, and another
    takes its place, so that hung calls never use up the threads of others. The threads are daemons,
    so that hung calls do not keep the process from ending either.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._done: deque[_Job] = deque()
        self._told = False
        """The event loop knows that there is something done."""
        for _ in range(num_threads):
            self._start_thread()

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a blocking call; when cancelled, by a timeout or otherwise, leave it."""
        future = asyncio.get_running_loop().create_future()
        job = _Job(functools.partial(function, *arguments), future)
        self._jobs.put(job)
        try:
            result: T = await future
            return result
        except asyncio.CancelledError:
            self._leave(job)
            raise

    def close(self) -> None:
        """Let idle threads end."""
        for _ in range(self._num_threads):
            self._jobs.put(None)

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, name="environment", daemon=True).start()

    def _work(self) -> None:
        while job := self._jobs.get():
            with self._lock:
                if job.left:
                    continue
                job.begun = True
            job.run()
            with self._lock:
                job.done = True
                if job.left:
                    return
            self._done.append(job)
            if not self._told:  # once for all that end before the event loop looks
                self._told = True
                with contextlib.suppress(
                    RuntimeError
                ):  # the loop has ended, and who waited with it
                    job.future.get_loop().call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        self._told = False
        while self._done:
            job = self._done.popleft()
            if job.future.done():  # cancelled
                continue
            if job.error:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)

    def _leave(self, job: _Job) -> None:
        with self._lock:
            job.left = True
            hangs = job.begun and not job.done
        if hangs:
            self._start_thread()


async def guard(name: str, timeout: float | None, work: Coroutine[Any, Any, T]) -> T:
    """Await what runs a user's code, for `timeout` seconds if any, and attribute what comes of it.

    Raises:
        ServiceError: STEP_TIMEOUT, ENVIRONMENT_FAILED, or one that the work raised itself.
    """
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            return await work
    except ServiceError:
        raise
    except Exception as error:  # the environment is a user's code: anything may come out of it
        if limit.expired():
            raise ServiceError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "STEP_TIMEOUT",
                f"{name} took longer than envserver.step_timeout_seconds = {timeout:g}",
            ) from None
        _log.exception("%s of an environment failed", name)
        raise ServiceError(
            grpc.StatusCode.INTERNAL,
            "ENVIRONMENT_FAILED",
            f"{name} raised {type(error).__name__}; the environment server's log has it",
        ) from None


class Episode:
    """Plays one environment: reset once, then steps with turns 0, 1, 2, ...

    The last step is remembered, so that a repeated turn is answered and not played again.
    """

    def __init__(
        self, environment: Environment | AsyncEnvironment, workers: Workers | None, timeout: float
    ) -> None:
        """Take an opened environment, threads for its calls (None: the event loop), and the time
        in seconds that each may take."""
        self._environment = environment
        self._workers = workers
        # What runs on the event loop and never waits cannot be ended by a timer either.
        self.waits = workers is not None or isinstance(environment, AsyncEnvironment)
        self._timeout = timeout if self.waits else None
        self._turn = -1
        self._last: tuple[Action, Step] | None = None
        self._hung = False
        self.ended = False

    def drive(self, endpoint: str) -> bool:
        """Give an environment that leads the conversation its endpoint; returns whether it does.

        Raises:
            ServiceError: NO_ENDPOINT or BAD_ENDPOINT; others have no use for one, and get none.
        """
        if not isinstance(self._environment, DrivenEnvironment):
            return False
        if not endpoint:
            raise ServiceError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "NO_ENDPOINT",
                "the suite leads the conversation itself and the reset names no endpoint; set "
                "actor.recording_listen",
            )
        if len(endpoint) > MAX_ENDPOINT_CHARACTERS or not _ENDPOINT.fullmatch(endpoint):
            raise ServiceError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "BAD_ENDPOINT",
                "the reset's endpoint is no http or https URL of at most "
                f"{MAX_ENDPOINT_CHARACTERS} characters",
            )
        self._environment.endpoint = endpoint
        return True

    async def reset(self) -> Reset:
        """Start the episode. Raises ServiceError if it was started, fails or takes too long."""
        if self._turn >= 0 or self._last:
            raise _out_of_order("reset was called before; a session is one episode")
        self._turn = 0
        reset = await self._guard("reset", self._environment.reset)
        return _expect(Reset, reset)

    async def step(self, turn: int, action: Action) -> Step:
        """Answer one action. Raises ServiceError if it is out of order, fails or takes too long."""
        if self._last and turn == self._turn - 1 and action == self._last[0]:
            return self._last[1]
        if self._turn < 0 or turn != self._turn:
            expected = "a reset" if self._turn < 0 else f"turn {self._turn}"
            raise _out_of_order(f"turn {turn} came where {expected} was expected")
        step = _expect(Step, await self._guard("step", self._environment.step, action))
        self._turn += 1
        self._last = (action, step)
        self.ended = step.terminated or step.truncated
        return step

    async def close(self) -> None:
        """Free the environment."""
        if self._hung:
            return
        try:
            await guard("close", self._timeout, self._call(self._environment.close))
        except ServiceError as error:
            _log.error("closing an environment failed: %s", error.message)

    async def _guard(self, name: str, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return await guard(name, self._timeout, self._call(function, *arguments))
        except ServiceError as error:
            # A hung call still uses the environment: nobody may close it.
            hung = error.reason == "STEP_TIMEOUT"
            self._hung = hung and isinstance(self._environment, Environment)
            raise

    async def _call(self, function: Callable[..., Any], *arguments: object) -> Any:
        if isinstance(self._environment, AsyncEnvironment):
            return await function(*arguments)
        if self._workers is None:
            return function(*arguments)
        return await self._workers.run(function, *arguments)


def _expect(kind: type[T], result: object) -> T:
    if isinstance(result, kind):
        return result
    raise ServiceError(
        grpc.StatusCode.INTERNAL,
        "ENVIRONMENT_FAILED",
        f"{kind.__name__.lower()} returned a {type(result).__name__}, not a {kind.__name__}",
    )


def _out_of_order(message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.FAILED_PRECONDITION, "OUT_OF_ORDER", message)
