"""The intake's process: four services on one port, one event loop, one state owner each."""

import asyncio
from collections.abc import Mapping

from learner.intake.batch_servicer import BatchServicer
from learner.intake.bundle import Bundle
from learner.intake.credits import MAX_PAYLOAD_BYTES
from learner.intake.epoch import raise_epoch
from learner.intake.intake import Intake
from learner.intake.journal import Journal
from learner.intake.publication import Version
from learner.intake.records import decode_stored
from learner.intake.store import MemoryStore, Store
from learner.intake.task_servicer import TaskServicer
from learner.intake.uplink import TrajectoryServicer
from learner.intake.weight_servicer import WeightServicer
from learner.intake.weight_store import WeightStore
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

    server = IntakeServer(config)
    port = await server.start()     # SERVING from here on
    await server.drained()
    await server.stop()

    Raises:
        ConfigError: a folder that cannot be written, no model at model.path, an unusable address.
    """

    def __init__(self, config: Config, store: Store | None = None) -> None:
        run = config.run
        self.bundle = Bundle.read(config.model.path)
        self.epoch = raise_epoch(run.path)
        self.journal = Journal(run.path)
        self.control = RoleControl("learner", self.figures)
        self.intake = Intake(
            config,
            self.epoch,
            store or MemoryStore(),
            self.journal,
            decode_stored,
            paused=lambda: self.control.state == control_pb2.ROLE_STATE_PAUSED,
        )
        self.weights = WeightStore(self._committed)
        self.trajectories = TrajectoryServicer(self.intake, self.epoch)
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
        self._clock: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Bind and serve. Returns the port."""
        port = await self._server.bind()
        self._clock = asyncio.create_task(self.intake.keep_time())
        await self._server.set_serving()
        return port

    async def drained(self) -> None:
        """Wait until the process is to end. Raises what stopped the clock, if anything did."""
        assert self._clock is not None
        draining = asyncio.create_task(self.control.draining.wait())
        await asyncio.wait((draining, self._clock), return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            draining.cancel()
            await self._clock

    async def stop(self, grace: float = 5.0) -> None:
        """End waiting calls, then running ones, then the process's state."""
        self.control.drain()
        await self.intake.close()
        await self.weights.close()
        self.trajectories.close()
        await self._server.stop(grace)
        if self._clock:
            self._clock.cancel()
        self.journal.close()

    def figures(self) -> Mapping[str, float]:
        """What ControlService tells."""
        admission = self.intake.ledger.admission
        served = self.weight_servicer.replica_versions.values()
        return {
            "step": self.intake.ledger.num_completed,
            "version": admission.version,
            "epoch": self.epoch,
            "store_bytes": self.intake.store.num_bytes,
            "actor_streams": len(self.trajectories.streams),
            "replicas": len(served),
            "lowest_replica_version": min(served, default=0),
            **self.intake.balance().figures(),
        }

    async def _committed(self, version: Version, seconds: float) -> None:
        await self.intake.advance(version.version, version.step)
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
    server = IntakeServer(config)
    metrics.start_exporter(config.learner.metrics_listen, "learner")
    await server.start()
    await server.drained()
    await server.stop()
    return 0
