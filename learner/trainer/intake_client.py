"""The trainer's side of BatchService."""

from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from learner.trainer.calls import patiently
from learner.trainer.ranks import Ranks
from understudy.config import NetworkConfig
from understudy.v1 import batch_pb2, batch_pb2_grpc

ASK_SECONDS = 60.0
"""Deadline of one NextBatch call; while there is no batch, the trainer asks again."""
COMPLETE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """One rank's share of a step's batch."""

    header: batch_pb2.BatchHeader
    """The whole batch in numbers."""
    trajectories: tuple[batch_pb2.BatchTrajectory, ...]
    """The rank's own trajectories; may be empty."""


class IntakeClient:
    """Takes batches and reports completed steps."""

    def __init__(self, channel: grpc.Channel, network: NetworkConfig, ranks: Ranks) -> None:
        self._stub = batch_pb2_grpc.BatchServiceStub(channel)
        self._network = network
        self._ranks = ranks

    def next_batch(self, step: int) -> BatchShare:
        """Wait for the step's batch, as long as it takes, and return this rank's share.

        Raises:
            PeerUnreachableError: when the intake went away and stayed away.
            UnderstudyError: when it refuses.
        """
        while True:
            share = patiently(lambda: self._ask(step), self._network)
            if share is not None:
                return share

    def complete_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Say that a step was taken. Raises like next_batch."""
        request = batch_pb2.CompleteStepRequest(step=step, metrics=metrics)
        patiently(lambda: self._stub.CompleteStep(request, timeout=COMPLETE_SECONDS), self._network)

    def _ask(self, step: int) -> BatchShare | None:
        """One call; None if there was no batch before its deadline."""
        request = batch_pb2.NextBatchRequest(
            step=step, rank=self._ranks.rank, world_size=self._ranks.world_size
        )
        try:
            header, *rest = self._stub.NextBatch(request, timeout=ASK_SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            raise
        return BatchShare(
            header=header.header, trajectories=tuple(message.trajectory for message in rest)
        )
