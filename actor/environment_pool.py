"""Which environment server plays an episode: the connected one with the fewest of ours."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc

from understudy.client import EnvironmentClient, Opening, Session, wait_any_ready
from understudy.config import NetworkConfig
from understudy.errors import ConfigError
from understudy.rpc import error_reason, retry_after_seconds
from understudy.v1 import environment_pb2


class EnvironmentFailedError(Exception):
    """The environment failed, hung or could not be reached."""


class EnvironmentPool:
    """All environment servers of a run. Starting an episode is retried; a step never is."""

    def __init__(self, network: NetworkConfig, step_timeout_seconds: float) -> None:
        self._servers = [EnvironmentClient(address, network) for address in network.envservers]
        self._sessions = [0] * len(self._servers)
        self._timeout = step_timeout_seconds
        self._patience = network.connect_timeout_seconds

    async def wait_ready(self) -> None:
        """Wait until a server answers. Raises PeerUnreachableError if none does."""
        await wait_any_ready(self._servers)

    async def describe(self, suite: str) -> environment_pb2.DescribeSuiteResponse:
        """What a suite holds. Raises ConfigError that names what there is, if it is not served."""
        try:
            return await self._describe(suite)
        except grpc.aio.AioRpcError as error:
            raise ConfigError(describe_failure(error)) from None

    async def check_tasks(self, suite: str, split: str, num_tasks: int) -> None:
        """Refuse tasks that the servers lack before any is played.

        Args:
            num_tasks: one above the highest task ordinal.

        Raises:
            ConfigError: naming the suite, split or number, and what there is.
        """
        description = await self.describe(suite)
        sizes = {entry.name: entry.num_tasks for entry in description.splits}
        if num_tasks > sizes.get(split, 0):
            known = ", ".join(f"{name!r} with {size} tasks" for name, size in sizes.items())
            raise ConfigError(
                f"suite {suite!r} lacks the {num_tasks} tasks of split {split!r} that are asked "
                f"for; it has {known}"
            )

    async def _describe(self, suite: str) -> environment_pb2.DescribeSuiteResponse:
        for server in self._servers[:-1]:
            try:
                return await server.describe(suite)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
        return await self._servers[-1].describe(suite)

    @contextlib.asynccontextmanager
    async def episode(
        self, suite: str, split: str, task_ordinal: int, endpoint: str = ""
    ) -> AsyncIterator[tuple[Session, Opening]]:
        """Open a session and begin a task in it.

        Args:
            endpoint: base URL that speaks for the policy in this episode, if there is one.

        Raises:
            EnvironmentFailedError: no server would begin it within connect_timeout_seconds.
        """
        async with contextlib.AsyncExitStack() as stack:
            yield await self._open(stack, suite, split, task_ordinal, endpoint)

    async def _open(
        self,
        stack: contextlib.AsyncExitStack,
        suite: str,
        split: str,
        task_ordinal: int,
        endpoint: str,
    ) -> tuple[Session, Opening]:
        deadline = asyncio.get_running_loop().time() + self._patience
        while True:
            index = min(range(len(self._servers)), key=self._reluctance)
            attempt = contextlib.AsyncExitStack()
            try:
                session = await attempt.enter_async_context(self._session(index))
                opening = await session.reset(suite, split, task_ordinal, endpoint)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                await attempt.aclose()
                wait = _retry_wait(error)
                if wait is None or asyncio.get_running_loop().time() + wait >= deadline:
                    raise EnvironmentFailedError(describe_failure(error)) from None
                # Until it answers, the server counts as busy, so that others are tried first.
                self._sessions[index] += 1
                try:
                    await asyncio.sleep(wait)
                finally:
                    self._sessions[index] -= 1
                continue
            except BaseException:  # cancelled: the session must not stay behind
                await attempt.aclose()
                raise
            stack.push_async_exit(attempt)
            return session, opening

    def _reluctance(self, index: int) -> tuple[bool, int]:
        """A server that hangs loses its sessions, and would otherwise get all new ones."""
        state = self._servers[index].channel.get_state(try_to_connect=True)
        return state is not grpc.ChannelConnectivity.READY, self._sessions[index]

    @contextlib.asynccontextmanager
    async def _session(self, index: int) -> AsyncIterator[Session]:
        self._sessions[index] += 1
        try:
            async with self._servers[index].session(self._timeout) as session:
                yield session
        finally:
            self._sessions[index] -= 1

    async def close(self) -> None:
        """Close all channels."""
        for server in self._servers:
            await server.close()


def describe_failure(error: Exception) -> str:
    """One line about what an environment's call died of."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error_reason(error)}: {error.details()}"
    return "the environment did not answer within actor.step_timeout_seconds"


def _retry_wait(error: Exception) -> float | None:
    if not isinstance(error, grpc.aio.AioRpcError):
        return None
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return retry_after_seconds(error) or 0.5
    return retry_after_seconds(error)
