"""The intake's process: four services on one port, one event loop, one state owner each."""

import asyncio
from collections.abc import Mapping
from typing import Self

from learner.intake.batch_servicer import BatchServicer
from learner.intake.bundle import Bundle
from learner.intake.credits import MAX_PAYLOAD_BYTES
from learner.intake.intake import Intake
from learner.intake.journal import Journal
from learner.intake.publication import Version
from learner.intake.state import RunState
from learner.intake.task_servicer import TaskServicer
from learner.intake.uplink import TrajectoryServicer
from learner.intake.weight_servicer import WeightServicer
from learner.intake.weight_store import WeightStore
from learner.log.writer import DurableLog, LogLimits
from understudy import metrics
from understudy.config import Config
from understudy.rpc import RoleControl, RoleServer, Service
from understudy.v1 import (
    batch_pb2_grpc,
    control_pb2,
    task_pb2_grpc,
    trajectory_pb2_grpc,
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
        bundle = Bundle.read(config.model.path)
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
        return cls(config, bundle, log, state)

    def __init__(self, config: Config, bundle: Bundle, log: DurableLog, state: RunState) -> None:
        run = config.run
        self.bundle = bundle
        self.log = log
        self.journal = Journal(run.path)
        self.control = RoleControl("learner", self.figures)
        self.intake = Intake(
            config,
            log,
            state,
            self.journal,
            paused=lambda: self.control.state == control_pb2.ROLE_STATE_PAUSED,
        )
        self.weights = WeightStore(
            lambda: state.trainer_epoch, self.intake.advance, self._committed
        )
        self.trajectories = TrajectoryServicer(self.intake)
        self.weight_servicer = WeightServicer(self.weights, self.bundle, self.journal, run.name)
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
        await self.weights.close()
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
        served = self.weight_servicer.replica_versions.values()
        return {
            "step": state.num_completed,
            "version": state.admission.version,
            "epoch": state.epoch,
            "trainer_epoch": state.trainer_epoch,
            "log_bytes": self.log.num_bytes,
            "actor_streams": len(self.trajectories.streams),
            "replicas": len(served),
            "lowest_replica_version": min(served, default=0),
            **self.intake.balance().figures(),
        }

    def _committed(self, version: Version, seconds: float) -> None:
        self.journal.version(
            version.version,
            {
                "step": version.step,
                "epoch": version.epoch,
                "payload_bytes": version.num_bytes,
                "publish_seconds": round(seconds, 6),
            },
        )

    def _services(self) -> list[Service]:
        return [
            _service("Task", task_pb2_grpc, TaskServicer(self.intake, self.control)),
            _service("Trajectory", trajectory_pb2_grpc, self.trajectories),
            _service("Batch", batch_pb2_grpc, BatchServicer(self.intake)),
            _service("Weight", weight_pb2_grpc, self.weight_servicer),
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
