"""One episode on the server: order of calls, where they run, how long they may take."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from envserver.environment import Action, AsyncEnvironment, Environment, Reset, Step
from understudy.rpc import ServiceError

_log = logging.getLogger(__name__)
T = TypeVar("T")
_closing: set[asyncio.Task[None]] = set()
"""Environments that are being closed; the event loop itself holds tasks only weakly."""


class Workers:
    """Threads that run blocking environments.

    A call that hangs cannot be ended, only left: its whole pool is then left to finish what it
    runs, and new calls get a new pool, so that hung calls never use up the threads of others.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool = self._new_pool()

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="environment")

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a blocking call. Raises TimeoutError through asyncio.timeout of the caller."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def abandon(self) -> None:
        """A call hangs: leave its pool."""
        self._pool.shutdown(wait=False)
        self._pool = self._new_pool()

    def close(self) -> None:
        """Let idle threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)


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
        self._timeout = timeout
        self._turn = -1
        self._last: tuple[Action, Step] | None = None
        self._hung = False
        self.ended = False

    async def reset(self) -> Reset:
        """Start the episode. Raises ServiceError if it was started, fails or takes too long."""
        if self._turn >= 0 or self._last:
            raise _out_of_order("reset was called before; a session is one episode")
        self._turn = 0
        reset: Reset = await self._guard("reset", self._environment.reset)
        return reset

    async def step(self, turn: int, action: Action) -> Step:
        """Answer one action. Raises ServiceError if it is out of order, fails or takes too long."""
        if self._last and turn == self._turn - 1 and action == self._last[0]:
            return self._last[1]
        if self._turn < 0 or turn != self._turn:
            expected = "a reset" if self._turn < 0 else f"turn {self._turn}"
            raise _out_of_order(f"turn {turn} came where {expected} was expected")
        step: Step = await self._guard("step", self._environment.step, action)
        self._turn += 1
        self._last = (action, step)
        self.ended = step.terminated or step.truncated
        return step

    async def close(self) -> None:
        """Free the environment, even if the caller is cancelled meanwhile."""
        if self._hung:
            return
        closing = asyncio.create_task(self._close())
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)
        await asyncio.shield(closing)

    async def _close(self) -> None:
        try:
            await self._call(self._environment.close)
        except Exception:  # the environment is a user's code: anything may come out of it
            _log.exception("closing an environment failed")

    async def _guard(self, name: str, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._call(function, *arguments)
        except TimeoutError:
            self._hung = isinstance(self._environment, Environment)
            if self._hung and self._workers:
                self._workers.abandon()
            raise ServiceError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "STEP_TIMEOUT",
                f"{name} took longer than envserver.step_timeout_seconds = {self._timeout:g}",
            ) from None
        except Exception as error:  # the environment is a user's code: anything may come out of it
            _log.exception("%s of an environment failed", name)
            raise ServiceError(
                grpc.StatusCode.INTERNAL,
                "ENVIRONMENT_FAILED",
                f"{name} raised {type(error).__name__}; the environment server's log has it",
            ) from None

    async def _call(self, function: Callable[..., Any], *arguments: object) -> Any:
        if isinstance(self._environment, AsyncEnvironment):
            return await function(*arguments)
        if self._workers is None:
            return function(*arguments)
        return await self._workers.run(function, *arguments)


def _out_of_order(message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.FAILED_PRECONDITION, "OUT_OF_ORDER", message)
