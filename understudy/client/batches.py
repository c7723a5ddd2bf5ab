"""Client of BatchService: the batches that the learner's steps learn from."""

from collections.abc import Mapping
from dataclasses import dataclass

from understudy.client.base import Client
from understudy.config import NetworkConfig
from understudy.trajectory import Trajectory, decode_record
from understudy.v1 import batch_pb2, batch_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class BatchTrajectory:
    """One trajectory of a batch."""

    group_index: int
    """Index of its group in the header's groups."""
    reward_index: int
    """Index of its reward in that group's rewards."""
    trajectory: Trajectory


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a step's batch."""

    header: batch_pb2.BatchHeader
    """The whole batch in numbers, the same for every rank."""
    trajectories: tuple[BatchTrajectory, ...]
    """The rank's own; uniform groups have none unless the header says that they are kept."""


class BatchClient(Client):
    """Takes batches as a trainer rank does.

        async with BatchClient("127.0.0.1:7000", NetworkConfig()) as batches:
            epoch = await batches.start_training("run")
            batch = await batches.next_batch(0)

    A run has one trainer: whoever starts fences the one before.
    """

    peer = "learner"
    epoch = 0
    """Of this trainer. Further ranks take over the one that start_training returned."""

    def __init__(self, address: str, network: NetworkConfig) -> None:
        super().__init__(address, network)
        self._stub = batch_pb2_grpc.BatchServiceStub(self.channel)

    async def start_training(self, run_id: str, step: int = 0, ledger_digest: bytes = b"") -> int:
        """Begin an epoch as the run's trainer and return it; parts of weights carry it, too.

        Args:
            run_id: run that is trained.
            step: steps behind the weights; above 0 for one that takes up a checkpoint.
            ledger_digest: of the header of the last of those steps.
        """
        request = batch_pb2.StartTrainingRequest(
            run_id=run_id, step=step, ledger_digest=ledger_digest
        )
        self.epoch = (await self._stub.StartTraining(request, timeout=10)).epoch
        return self.epoch

    async def next_batch(
        self, step: int, rank: int = 0, world_size: int = 1, timeout: float = 600.0
    ) -> Batch:
        """Wait for a step's batch and return the rank's share of it.

        Raises:
            grpc.aio.AioRpcError: with the codes that the rpc's comment lists.
            TrajectoryError: a trajectory that breaks the format; the learner checked it before.
        """
        request = batch_pb2.NextBatchRequest(
            step=step, rank=rank, world_size=world_size, epoch=self.epoch
        )
        header = batch_pb2.BatchHeader()
        trajectories = []
        async for response in self._stub.NextBatch(request, timeout=timeout):
            if response.HasField("header"):
                header = response.header
            else:
                trajectories.append(_decode(response.trajectory))
        return Batch(header=header, trajectories=tuple(trajectories))

    async def complete_step(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Say that a step was taken, with what was measured by name."""
        request = batch_pb2.CompleteStepRequest(step=step, metrics=metrics, epoch=self.epoch)
        await self._stub.CompleteStep(request, timeout=10)

    async def record_checkpoint(
        self, step: int, manifest_digest: bytes, oldest_kept_step: int
    ) -> None:
        """Say that a checkpoint is durable, and which is the oldest that is kept."""
        request = batch_pb2.RecordCheckpointRequest(
            step=step,
            epoch=self.epoch,
            manifest_digest=manifest_digest,
            oldest_kept_step=oldest_kept_step,
        )
        await self._stub.RecordCheckpoint(request, timeout=10)


def _decode(message: batch_pb2.BatchTrajectory) -> BatchTrajectory:
    return BatchTrajectory(
        group_index=message.group_index,
        reward_index=message.reward_index,
        trajectory=decode_record(message.record),
    )
