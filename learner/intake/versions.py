"""The intake's account of versions: who got which number, who serves which, who stores them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from learner.intake.intake import Intake
from learner.intake.journal import Journal
from learner.intake.refusals import RefusedError
from learner.log.errors import LogFailedError
from understudy.v1 import weight_pb2
from understudy.weights.errors import WeightsRefusedError

FORGET_SECONDS = 30.0
"""A replica that is behind, and has said nothing for so long, is not counted any more."""


@dataclass(kw_only=True)
class _Replica:
    version: int
    heard: float
    """When it reported last, or fell behind."""


class Replicas:
    """The version that each replica said it serves.

    Replicas report at each switch, so that silence means something only while there is a newer
    version: whether one that serves the newest is still alive shows at the next.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._newest = 0
        self._replicas: dict[str, _Replica] = {}

    def issued(self, version: int) -> None:
        """There is a newer version."""
        for replica in self._replicas.values():
            if replica.version == self._newest:
                replica.heard = self._clock()
        self._newest = version

    def reported(self, replica_id: str, version: int) -> None:
        """A replica serves a version."""
        self._replicas[replica_id] = _Replica(version=version, heard=self._clock())

    @property
    def versions(self) -> list[int]:
        """Versions that are served, one a replica."""
        limit = self._clock() - FORGET_SECONDS
        self._replicas = {
            name: replica
            for name, replica in self._replicas.items()
            if replica.version >= self._newest or replica.heard > limit
        }
        return [replica.version for replica in self._replicas.values()]


class Versions:
    """Numbers versions for the one weight store of a run, wherever that is."""

    def __init__(self, intake: Intake, journal: Journal, run_id: str) -> None:
        self.replicas = Replicas()
        self.replicas.issued(intake.state.admission.version)
        self._intake = intake
        self._journal = journal
        self._run_id = run_id

    async def issue(self, request: weight_pb2.IssueVersionRequest) -> int:
        """The next number, durably.

        Raises:
            RefusedError: OLD_EPOCH, RUN_MISMATCH, DRAINING.
        """
        self._require_run(request.run_id)
        version = await self._intake.advance(request.step, request.epoch)
        self.replicas.issued(version)
        self._journal.version(
            version,
            {
                "step": request.step,
                "epoch": request.epoch,
                "payload_bytes": request.payload_bytes,
                "publish_seconds": round(request.publish_seconds, 6),
            },
        )
        return version

    async def issue_here(self, request: weight_pb2.IssueVersionRequest) -> int:
        """As issue, for a store in this process, which knows refusals of weights only."""
        try:
            return await self.issue(request)
        except RefusedError as error:
            raise WeightsRefusedError(error.reason, error.detail) from error
        except LogFailedError as error:
            raise WeightsRefusedError("LOG_FAILED", str(error)) from error

    async def attached(self, run_id: str, newest_version: int) -> None:
        """A store of its own says what it holds.

        Raises:
            RefusedError: RUN_MISMATCH.
        """
        self._require_run(run_id)
        await self._intake.set_weights(newest_version > 0)

    def reported(self, request: weight_pb2.ReportReplicaRequest) -> None:
        """A replica serves a version."""
        self.replicas.reported(request.replica_id, request.version)
        self._journal.replica(
            request.replica_id,
            {
                "version": request.version,
                "mismatch_mean": request.mismatch_mean,
                "mismatch_max": request.mismatch_max,
                "pause_seconds": request.pause_seconds,
                "apply_seconds": request.apply_seconds,
            },
        )

    def _require_run(self, run_id: str) -> None:
        if run_id != self._run_id:
            raise RefusedError("RUN_MISMATCH", f"run_id {run_id!r}; served: {self._run_id!r}")
