"""TaskService: decodes, calls, encodes."""

from typing import Any

from google.protobuf import duration_pb2

from learner.intake.intake import Intake
from learner.intake.leases import Offer, lease_seed
from learner.intake.refusals import RefusedError, mapped
from learner.intake.uplink import MAX_ACTOR_ID_BYTES
from understudy.evaluation import episode_seed
from understudy.rpc import RoleControl
from understudy.v1 import common_pb2, task_pb2, task_pb2_grpc

MAX_LEASES = 1024
MAX_RENEWALS = 4096
LONGEST_WAIT_SECONDS = 60.0


class TaskServicer(task_pb2_grpc.TaskServiceServicer):
    """Leases the tasks of one run."""

    def __init__(self, intake: Intake, control: RoleControl) -> None:
        self.intake = intake
        self.control = control
        self.run_id = intake.config.run.name
        tasks = intake.config.learner.tasks
        self._expires_after = duration_pb2.Duration()
        self._expires_after.FromNanoseconds(int(tasks.lease_seconds * 1e9))

    async def LeaseTasks(
        self, request: task_pb2.LeaseTasksRequest, context: Any
    ) -> task_pb2.LeaseTasksResponse:
        self.control.admit()
        with mapped():
            self._check(request)
            offers = await self.intake.lease(
                request.actor_id, request.max_leases, _patience(context.time_remaining())
            )
        return task_pb2.LeaseTasksResponse(
            leases=[self._encode(offer) for offer in offers],
            run_id=self.run_id,
            exhausted=self.intake.ledger.exhausted,
        )

    async def RenewLeases(
        self, request: task_pb2.RenewLeasesRequest, context: object
    ) -> task_pb2.RenewLeasesResponse:
        with mapped():
            if len(request.lease_ids) > MAX_RENEWALS:
                raise RefusedError(
                    "BAD_REQUEST", f"{len(request.lease_ids)} lease_ids; at most {MAX_RENEWALS}"
                )
        gone = self.intake.renew(request.actor_id, request.lease_ids)
        return task_pb2.RenewLeasesResponse(gone_lease_ids=gone)

    def _check(self, request: task_pb2.LeaseTasksRequest) -> None:
        if request.run_id not in ("", self.run_id):
            raise RefusedError(
                "RUN_MISMATCH", f"run_id {request.run_id!r}; served is {self.run_id!r}"
            )
        if not 1 <= request.max_leases <= MAX_LEASES:
            raise RefusedError(
                "BAD_REQUEST", f"max_leases {request.max_leases}; from 1 to {MAX_LEASES}"
            )
        if not 0 < len(request.actor_id.encode()) <= MAX_ACTOR_ID_BYTES:
            raise RefusedError(
                "BAD_REQUEST", f"actor_id {request.actor_id!r}: 1 to {MAX_ACTOR_ID_BYTES} bytes"
            )

    def _encode(self, offer: Offer) -> task_pb2.Lease:
        config, key = self.intake.config, offer.lease.sample.key
        tasks = config.learner.tasks
        pinned = config.run.deterministic and not key.evaluation
        return task_pb2.Lease(
            lease_id=offer.lease.lease_id,
            task_key=common_pb2.TaskKey(ordinal=key.ordinal, sample_index=key.sample_index),
            task=common_pb2.TaskReference(
                suite=offer.task.suite, split=offer.task.split, task_ordinal=offer.task.ordinal
            ),
            sampling=self._sampling(offer),
            max_turns=tasks.max_turns,
            max_tokens=tasks.max_tokens,
            min_version=offer.min_version,
            max_version=offer.min_version if pinned else 0,
            expires_after=self._expires_after,
        )

    def _sampling(self, offer: Offer) -> common_pb2.SamplingParameters:
        run, key = self.intake.config.run, offer.lease.sample.key
        seed = lease_seed(run.seed, key) if run.deterministic else None
        if key.evaluation:
            seed = episode_seed(run.seed, offer.task.ordinal)
        return common_pb2.SamplingParameters(
            temperature=offer.temperature,
            max_new_tokens=self.intake.config.learner.tasks.max_new_tokens,
            seed=seed,
        )


def _patience(remaining: float | None) -> float:
    """Seconds to wait so that the response comes before the caller's deadline."""
    if remaining is None:
        return LONGEST_WAIT_SECONDS
    return min(remaining - min(1.0, 0.2 * remaining), LONGEST_WAIT_SECONDS)
