"""Tells the learner which version a replica serves, and how far it computes as the learner does."""

import logging

import grpc
import numpy as np

from inference.engine import Engine
from understudy import metrics
from understudy.trajectory import FloatArray, IntArray
from understudy.v1 import weight_pb2, weight_pb2_grpc

_log = logging.getLogger(__name__)
_REPORT_TIMEOUT_SECONDS = 10.0
_MISMATCH_ALARM = 0.1
"""Mean |engine's - learner's| log-probability, in nats, above which something is wrong."""


class Reporter:
    """Reports one replica's versions to the intake."""

    def __init__(self, engine: Engine, learner: grpc.aio.Channel, replica_id: str) -> None:
        self._engine = engine
        self._versions = weight_pb2_grpc.VersionServiceStub(learner)
        self._replica_id = replica_id

    async def report(
        self,
        *,
        version: int,
        step: int,
        probe: tuple[IntArray, FloatArray] | None,
        pause_seconds: float,
        apply_seconds: float,
    ) -> None:
        """Compare the engine with the learner over the probe, and report.

        Args:
            version: that is served now.
            step: optimizer steps behind it.
            probe: token ids [N] and the learner's log-probabilities [N-1].
            pause_seconds: for which generation stood still.
            apply_seconds: from the version's announcement until it was served.
        """
        report = weight_pb2.ReportReplicaRequest(
            replica_id=self._replica_id,
            version=version,
            pause_seconds=pause_seconds,
            apply_seconds=apply_seconds,
        )
        if probe is not None:
            await self._measure_mismatch(*probe, report)
        await self._send(report, step)

    async def _measure_mismatch(
        self, token_ids: IntArray, logprobs: FloatArray, report: weight_pb2.ReportReplicaRequest
    ) -> None:
        """Compare the engine with the learner; the health metric of the whole system."""
        difference = np.abs(await self._engine.prompt_logprobs(token_ids) - logprobs)
        report.mismatch_mean = float(difference.mean())
        report.mismatch_max = float(difference.max())
        metrics.LOGPROB_MISMATCH.labels("mean").set(report.mismatch_mean)
        metrics.LOGPROB_MISMATCH.labels("max").set(report.mismatch_max)
        if self._engine.computes and not report.mismatch_mean < _MISMATCH_ALARM:
            _log.error(
                "version %d: log-probabilities differ from the learner's by %.4f on average, %.4f "
                "at most; ratios are wrong: check that model.dtype agrees",
                report.version, report.mismatch_mean, report.mismatch_max,
            )  # fmt: skip

    async def _send(self, report: weight_pb2.ReportReplicaRequest, step: int) -> None:
        metrics.POLICY_VERSION.set(report.version)
        metrics.WEIGHT_APPLY_SECONDS.observe(report.apply_seconds)
        metrics.GENERATION_PAUSE_SECONDS.observe(report.pause_seconds)
        _log.info(
            "serving version %d (step %d): %.3f s after its announcement, paused %.3f s, "
            "mismatch %.5f",
            report.version, step, report.apply_seconds, report.pause_seconds, report.mismatch_mean,
        )  # fmt: skip
        try:
            await self._versions.ReportReplica(report, timeout=_REPORT_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            _log.warning("could not report version %d: %s", report.version, error.code().name)
