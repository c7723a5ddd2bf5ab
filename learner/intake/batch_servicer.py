"""BatchService: decodes, calls, encodes."""

from collections.abc import AsyncIterator

from learner.intake.batches import Batch
from learner.intake.intake import Intake
from learner.intake.refusals import mapped
from understudy.v1 import batch_pb2, batch_pb2_grpc, trajectory_pb2

Response = batch_pb2.NextBatchResponse


class BatchServicer(batch_pb2_grpc.BatchServiceServicer):
    """Feeds the trainer ranks."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake

    async def NextBatch(
        self, request: batch_pb2.NextBatchRequest, context: object
    ) -> AsyncIterator[Response]:
        with mapped():
            batch, share = await self.intake.next_batch(
                request.step, request.rank, request.world_size
            )
        yield Response(header=_encode_header(batch))
        for item, record in share:
            yield Response(
                trajectory=batch_pb2.BatchTrajectory(
                    group_index=item.group_index,
                    reward_index=item.reward_index,
                    record=trajectory_pb2.TrajectoryRecord.FromString(record),
                )
            )

    async def CompleteStep(
        self, request: batch_pb2.CompleteStepRequest, context: object
    ) -> batch_pb2.CompleteStepResponse:
        with mapped():
            await self.intake.complete_step(request.step, dict(request.metrics))
        return batch_pb2.CompleteStepResponse()


def _encode_header(batch: Batch) -> batch_pb2.BatchHeader:
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
    )
