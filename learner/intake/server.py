"""The intake's process: its services on one port, one event loop, one state owner each."""

import asyncio
from collections.abc import Mapping
from typing import Self

from learner.intake.batch_servicer import BatchServicer
from learner.intake.credits import MAX_PAYLOAD_BYTES
from learner.intake.intake import Intake
from learner.intake.journal import Journal
from learner.intake.state import RunState
from learner.intake.task_servicer import TaskServicer
from learner.intake.uplink import TrajectoryServicer, add_service
from learner.intake.version_servicer import VersionServicer
from learner.intake.versions import Versions
from learner.log.writer import DurableLog, LogLimits
from learner.weights.opening import OpenedWeights, open_weights, weight_service
from understudy import metrics
from understudy.config import Config
from understudy.rpc import RoleControl, RoleServer, Service
from understudy.v1 import (
    batch_pb2_grpc,
    control_pb2,
    task_pb2_grpc,
    weight_pb2_grpc,
)

MAX_MESSAGE_BYTES = 2 * MAX_PAYLOAD_BYTES
"""Largest message: a trajectory that is too large is to be rejected by name, not by gRPC."""


class IntakeServer:
    """Everything that the intake's process serves.

    server = await IntakeServer.open(config)
    port = await server.start()     # SERVING from here on
    await server.drained()
    await server.stop()
    """

    @classmethod
    async def open(cls, config: Config) -> Self:
        """Take up a run where its log ends, or begin it.

        Raises:
            ConfigError: a folder that cannot be written, a damaged log, another intake that serves
                the run, no model at model.path, an unusable address.
        """
        settings = config.learner.log
        state = RunState(config.learner.tasks, config.learner.train.steps)
        log = await DurableLog.open(
            config.run.path / "log",
            config.run.name,
            LogLimits(
                segment_bytes=settings.segment_bytes,
                buffer_bytes=settings.buffer_bytes,
                quota_bytes=settings.quota_bytes,
            ),
            state.recover,
        )
        if config.network.weights:
            return cls(config, log, state, None)
        try:
            opened = await open_weights(config, state.steps_behind)
        except BaseException:  # whatever it is, the next attempt needs the log
            await log.close()
            raise
        server = cls(config, log, state, opened)
        # Where weights go past the store, an empty one has lost nothing.
        stored = config.learner.weights.transport == "delta"
        await server.intake.set_weights(not stored or opened.recovered.is_newest)
        return server

    def __init__(
        self, config: Config, log: DurableLog, state: RunState, opened: OpenedWeights | None
    ) -> None:
        self.log = log
        self.journal = Journal(config.run.path)
        self.control = RoleControl("learner", self.figures)
        self.intake = Intake(
            config,
            log,
            state,
            self.journal,
            paused=lambda: self.control.state == control_pb2.ROLE_STATE_PAUSED,
        )
        self.versions = Versions(self.intake, self.journal, config.run.name)
        self.weights = opened.servicer(self.versions.issue_here) if opened else None
        """None where the weight store is a process of its own."""
        self.trajectories = TrajectoryServicer(self.intake)
        self.intake.on_room = self.trajectories.room_freed
        self._server = RoleServer(
            "learner",
            config.learner.listen,
            config.network,
            self._services(),
            self.control,
            MAX_MESSAGE_BYTES,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> int:
        """Bind and serve. Returns the port."""
        await self.log.flush()  # the epoch is durable before the port opens
        port = await self._server.bind()
        self._tasks = [
            asyncio.create_task(self.intake.keep_time()),
            asyncio.create_task(self.log.wait_failed()),
        ]
        await self._server.set_serving()
        return port

    async def drained(self) -> None:
        """Wait until the process is to end. Raises what stopped the clock or the log."""
        draining = asyncio.create_task(self.control.draining.wait())
        done, _ = await asyncio.wait((draining, *self._tasks), return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        for task in done - {draining}:
            task.result()

    async def stop(self, grace: float = 5.0) -> None:
        """End waiting calls, then running ones, then the process's state."""
        self.control.drain()
        await self.intake.close()
        if self.weights:
            await self.weights.store.close()
        self.trajectories.close()
        await self._server.stop(grace)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.log.close()
        self.journal.close()

    def figures(self) -> Mapping[str, float]:
        """What ControlService tells."""
        state = self.intake.state
        served = self.versions.replicas.versions
        return {
            "step": state.num_completed,
            "version": state.admission.version,
            "epoch": state.epoch,
            "trainer_epoch": state.trainer_epoch,
            "log_bytes": self.log.num_bytes,
            "actor_streams": len(self.trajectories.streams),
            "evaluating": sum(e.num_pending for e in state.evaluations.values()),
            "replicas": len(served),
            "lowest_replica_version": min(served, default=0),
            **self.intake.balance().figures(),
        }

    def _services(self) -> list[Service]:
        return [
            _service("Task", task_pb2_grpc, TaskServicer(self.intake, self.control)),
            Service(
                name="understudy.v1.TrajectoryService",
                add=add_service,
                servicer=self.trajectories,
            ),
            _service("Batch", batch_pb2_grpc, BatchServicer(self.intake, self.control.draining)),
            _service("Version", weight_pb2_grpc, VersionServicer(self.versions)),
            *([weight_service(self.weights)] if self.weights else []),
        ]


def _service(word: str, generated: object, servicer: object) -> Service:
    name = f"{word}Service"
    add = getattr(generated, f"add_{name}Servicer_to_server")
    return Service(name=f"understudy.v1.{name}", add=add, servicer=servicer)


async def serve_intake(config: Config) -> int:
    """Serve the intake on config.learner.listen until drained. Returns the exit code."""
    server = await IntakeServer.open(config)
    metrics.start_exporter(config.learner.metrics_listen, "learner")
    await server.start()
    try:
        await server.drained()
    finally:
        await server.stop()
    return 0
