"""BatchService: decodes, calls, encodes."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from learner.intake.attendance import Attendance
from learner.intake.batches import Batch, BatchItem
from learner.intake.refusals import RefusedError, mapped
from learner.intake.state import RunState
from understudy.config import Config
from understudy.v1 import batch_pb2, batch_pb2_grpc, trajectory_pb2

Response = batch_pb2.NextBatchResponse

READ_RECORDS = 32
"""Records that are in memory at one time for a rank's share."""


class BatchSource(Protocol):
    """Where batches come from: an intake, or the log of one. Intake documents the methods."""

    config: Config
    state: RunState

    async def start_training(self, step: int, ledger_digest: bytes) -> int: ...

    async def next_batch(
        self, step: int, rank: int, world_size: int, epoch: int
    ) -> tuple[Batch, list[BatchItem]]: ...

    async def read(self, items: Sequence[BatchItem]) -> list[trajectory_pb2.TrajectoryRecord]: ...

    async def complete_step(self, step: int, epoch: int, measured: Mapping[str, float]) -> None: ...

    async def record_checkpoint(
        self, step: int, oldest_kept_step: int, epoch: int, digest: bytes
    ) -> None: ...


class BatchServicer(batch_pb2_grpc.BatchServiceServicer):
    """Feeds the trainer ranks."""

    def __init__(self, source: BatchSource, draining: asyncio.Event) -> None:
        """Take the source, and what is set when this process ends."""
        self.source = source
        self._attendance = Attendance(source.state, draining)

    async def StartTraining(
        self, request: batch_pb2.StartTrainingRequest, context: object
    ) -> batch_pb2.StartTrainingResponse:
        with mapped():
            served = self.source.config.run.name
            if request.run_id != served:
                raise RefusedError("RUN_MISMATCH", f"run_id {request.run_id!r}; served: {served!r}")
            epoch = await self.source.start_training(request.step, request.ledger_digest)
        return batch_pb2.StartTrainingResponse(epoch=epoch)

    async def NextBatch(
        self, request: batch_pb2.NextBatchRequest, context: object
    ) -> AsyncIterator[Response]:
        with mapped():
            batch, share = await self.source.next_batch(
                request.step, request.rank, request.world_size, request.epoch
            )
        yield Response(header=_encode_header(batch, self.source.state))
        for start in range(0, len(share), READ_RECORDS):
            items = share[start : start + READ_RECORDS]
            with mapped():
                records = await self.source.read(items)
            for item, record in zip(items, records, strict=True):
                yield Response(
                    trajectory=batch_pb2.BatchTrajectory(
                        group_index=item.group_index,
                        reward_index=item.reward_index,
                        record=record,
                    )
                )

    async def CompleteStep(
        self, request: batch_pb2.CompleteStepRequest, context: object
    ) -> batch_pb2.CompleteStepResponse:
        with mapped():
            await self.source.complete_step(request.step, request.epoch, dict(request.metrics))
        return batch_pb2.CompleteStepResponse()

    async def RecordCheckpoint(
        self, request: batch_pb2.RecordCheckpointRequest, context: object
    ) -> batch_pb2.RecordCheckpointResponse:
        with mapped():
            await self.source.record_checkpoint(
                request.step, request.oldest_kept_step, request.epoch, request.manifest_digest
            )
        return batch_pb2.RecordCheckpointResponse()

    async def Attend(
        self, requests: AsyncIterator[batch_pb2.AttendRequest], context: object
    ) -> batch_pb2.AttendResponse:
        with mapped():
            await self._attendance.follow(requests)
        return batch_pb2.AttendResponse()


def _encode_header(batch: Batch, state: RunState) -> batch_pb2.BatchHeader:
    items = batch.items
    return batch_pb2.BatchHeader(
        step=batch.step,
        groups=[
            batch_pb2.BatchGroup(
                ordinal=group.ordinal,
                rewards=group.rewards.astype("<f4", copy=False).tobytes(),
                uniform=group.uniform,
            )
            for group in batch.groups
        ],
        num_trajectories=len(items),
        num_sampled_tokens=sum(item.summary.num_sampled_tokens for item in items),
        head_version=batch.head_version,
        last=batch.last,
        ledger_digest=state.ledger_digests[batch.step + 1],
        steps_behind=state.versions_of(batch),
    )
