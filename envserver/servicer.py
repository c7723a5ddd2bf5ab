"""EnvironmentService: suites, and streams of sessions."""

import asyncio
from collections.abc import AsyncIterator, Mapping

from envserver.environment import Suite
from envserver.episode import Workers
from envserver.sessions import Host, SessionStream
from understudy.config import EnvserverConfig
from understudy.rpc import RoleControl
from understudy.v1 import environment_pb2, environment_pb2_grpc


class EnvironmentServicer(environment_pb2_grpc.EnvironmentServiceServicer):
    """Serves a fixed set of suites to many clients."""

    def __init__(
        self, suites: Mapping[str, Suite], config: EnvserverConfig, control: RoleControl
    ) -> None:
        self.workers = Workers(config.worker_threads)
        self._host = Host(suites, config, control, self.workers)

    @property
    def num_sessions(self) -> int:
        """Sessions of all clients that are open now."""
        return self._host.num_sessions

    async def DescribeSuite(
        self, request: environment_pb2.DescribeSuiteRequest, context: object
    ) -> environment_pb2.DescribeSuiteResponse:
        """Splits, levels and digest of a suite."""
        description = self._host.suite(request.suite).describe()
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

    async def Sessions(
        self, requests: AsyncIterator[environment_pb2.SessionsRequest], context: object
    ) -> AsyncIterator[environment_pb2.SessionsResponse]:
        """All episodes that one client plays."""
        stream = SessionStream(self._host)
        try:
            async for responses in stream.serve(requests):
                yield responses
        finally:
            stream.close()

    async def wait_closed(self, timeout: float) -> None:
        """Wait until all environments that are being closed are, at most `timeout` seconds.

        They may hold processes, which would outlive this one.
        """
        if self._host.closing:
            await asyncio.wait(self._host.closing, timeout=timeout)
