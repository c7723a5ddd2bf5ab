"""The trainer's side of BatchService."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from learner.trainer.calls import patiently
from learner.trainer.ranks import Ranks
from understudy.config import Config
from understudy.rpc import error_reason
from understudy.v1 import batch_pb2, batch_pb2_grpc

ASK_SECONDS = 60.0
"""Deadline of one NextBatch call; while there is no batch, the trainer asks again."""
CALL_SECONDS = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """One data rank's share of a step's batch."""

    header: batch_pb2.BatchHeader
    """The whole batch in numbers."""
    trajectories: tuple[batch_pb2.BatchTrajectory, ...]
    """Its own trajectories; may be empty."""


class _NoWeightsError(Exception):
    """The weight store is empty: it has started anew."""


class IntakeClient:
    """Takes batches and reports what became of them.

    All methods raise PeerUnreachableError when the intake went away and stayed away, and
    UnderstudyError when it refuses.
    """

    def __init__(self, channel: grpc.Channel, config: Config, ranks: Ranks) -> None:
        self._stub = batch_pb2_grpc.BatchServiceStub(channel)
        self._run_id = config.run.name
        self._network = config.network
        self._ranks = ranks
        self.epoch = 0
        """Of this trainer; 0 before start_training."""

    def start_training(self, step: int, ledger_digest: bytes) -> int:
        """Begin this trainer's epoch and return it. Every rank calls it; rank 0 asks.

        Args:
            step: steps behind the weights.
            ledger_digest: of the batches of those steps.
        """
        if self._ranks.rank == 0:
            request = batch_pb2.StartTrainingRequest(
                run_id=self._run_id, step=step, ledger_digest=ledger_digest
            )
            response = patiently(
                lambda: self._stub.StartTraining(request, timeout=CALL_SECONDS), self._network
            )
            self.epoch = response.epoch
        self.epoch = int(self._ranks.max([self.epoch])[0])
        return self.epoch

    def next_batch(
        self, step: int, *, publish_again: Callable[[], None], check: Callable[[], None]
    ) -> BatchShare:
        """Wait for the step's batch, as long as it takes, and return this rank's share.

        Args:
            step: the next one.
            publish_again: publishes the present weights whole; called on all ranks together if the
                weight store has lost them, since without weights nobody plays.
            check: raises if what the batch depends on has failed; called at each attempt.
        """
        share = None
        while True:
            if share is None:
                share = self._ask_patiently(step, check)
            [lost] = self._ranks.max([share is None])
            if not lost:
                assert share is not None
                return share
            _log.warning("the weight store is empty; publishing the weights again")
            publish_again()

    def complete_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Say that a step was taken."""
        request = batch_pb2.CompleteStepRequest(step=step, metrics=metrics, epoch=self.epoch)
        patiently(lambda: self._stub.CompleteStep(request, timeout=CALL_SECONDS), self._network)

    def record_checkpoint(self, step: int, oldest_kept_step: int, digest: bytes) -> None:
        """Say that a checkpoint is durable."""
        request = batch_pb2.RecordCheckpointRequest(
            step=step, oldest_kept_step=oldest_kept_step, epoch=self.epoch, manifest_digest=digest
        )
        patiently(lambda: self._stub.RecordCheckpoint(request, timeout=CALL_SECONDS), self._network)

    def _ask_patiently(self, step: int, check: Callable[[], None]) -> BatchShare | None:
        """This rank's share; None if the weight store has no weights."""
        while True:
            check()
            try:
                share = patiently(lambda: self._ask(step), self._network)
            except _NoWeightsError:
                return None
            if share is not None:
                return share

    def _ask(self, step: int) -> BatchShare | None:
        """One call; None if there was no batch before its deadline."""
        request = batch_pb2.NextBatchRequest(
            step=step,
            rank=self._ranks.data_rank,  # all ranks of a tensor group get the same share
            world_size=self._ranks.data_size,
            epoch=self.epoch,
        )
        try:
            header, *rest = self._stub.NextBatch(request, timeout=ASK_SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            if error_reason(error) == "WEIGHTS_LOST":
                raise _NoWeightsError from error
            raise
        return BatchShare(
            header=header.header, trajectories=tuple(message.trajectory for message in rest)
        )
