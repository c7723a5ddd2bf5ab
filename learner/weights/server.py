"""The weight store's own process, where it has one: network.weights."""

import asyncio
from typing import Self

from learner.weights.intake_link import IntakeLink
from learner.weights.opening import (
    MAX_MESSAGE_BYTES,
    OpenedWeights,
    open_weights,
    weight_service,
)
from understudy import metrics
from understudy.config import Config
from understudy.errors import ConfigError
from understudy.rpc import RoleControl, RoleServer


class StoreServer:
    """Everything that the store's process serves; the counterpart of IntakeServer."""

    @classmethod
    async def open(cls, config: Config) -> Self:
        """Take up a run's weights.

        Raises:
            ConfigError: network.weights is not set; as open_weights.
        """
        if config.network.weights is None:
            raise ConfigError(
                "network.weights is not set: the intake has the weight store; set an address there"
            )
        return cls(config, config.network.weights, await open_weights(config))

    def __init__(self, config: Config, listen: str, opened: OpenedWeights) -> None:
        self._link = IntakeLink(config)
        self.weights = opened.servicer(self._link.issue)
        store = self.weights.store
        self.control = RoleControl("weights", lambda: {"version": store.newest_version})
        self._server = RoleServer(
            "weights",
            listen,
            config.network,
            [weight_service(self.weights)],
            self.control,
            MAX_MESSAGE_BYTES,
            field="network.weights",
        )
        self._attached: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Bind and serve. Returns the port."""
        port = await self._server.bind()
        self._attached = asyncio.create_task(self._link.keep_attached(self.weights.store))
        await self._server.set_serving()
        return port

    async def drained(self) -> None:
        """Wait until the process is to end. Raises ConfigError: the intake serves another run."""
        assert self._attached
        draining = asyncio.create_task(self.control.draining.wait())
        await asyncio.wait((draining, self._attached), return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        if self._attached.done():
            self._attached.result()

    async def stop(self, grace: float = 5.0) -> None:
        """End waiting calls, then running ones, then the process's state."""
        self.control.drain()
        await self.weights.store.close()
        await self._server.stop(grace)
        if self._attached:
            self._attached.cancel()
            await asyncio.gather(self._attached, return_exceptions=True)
        await self._link.close()


async def serve_weights(config: Config) -> int:
    """Serve the weight store on network.weights until drained. Returns the exit code."""
    server = await StoreServer.open(config)
    settings = config.learner.weights
    metrics.start_exporter(settings.metrics_listen, "weights", "learner.weights.metrics_listen")
    await server.start()
    try:
        await server.drained()
    finally:
        await server.stop()
    return 0
