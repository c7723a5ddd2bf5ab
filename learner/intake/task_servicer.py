"""TaskService: decodes, calls, encodes."""

from typing import Any

from google.protobuf import duration_pb2

from learner.intake.intake import Intake
from learner.intake.leases import Lease
from learner.intake.refusals import RefusedError, mapped
from learner.intake.uplink import MAX_ACTOR_ID_BYTES
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
        self._sampling = common_pb2.SamplingParameters(
            temperature=tasks.temperature, max_new_tokens=tasks.max_new_tokens
        )
        self._expires_after = duration_pb2.Duration()
        self._expires_after.FromNanoseconds(int(tasks.lease_seconds * 1e9))

    async def LeaseTasks(
        self, request: task_pb2.LeaseTasksRequest, context: Any
    ) -> task_pb2.LeaseTasksResponse:
        self.control.admit()
        with mapped():
            self._check(request)
            leases = await self.intake.lease(
                request.actor_id, request.max_leases, _patience(context.time_remaining())
            )
        return task_pb2.LeaseTasksResponse(
            leases=[self._encode(lease) for lease in leases],
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

    def _encode(self, lease: Lease) -> task_pb2.Lease:
        tasks = self.intake.config.learner.tasks
        key = lease.sample.key
        return task_pb2.Lease(
            lease_id=lease.lease_id,
            task_key=common_pb2.TaskKey(ordinal=key.ordinal, sample_index=key.sample_index),
            task=common_pb2.TaskReference(
                suite=tasks.suite,
                split=tasks.split,
                task_ordinal=self.intake.ledger.task_ordinal(key),
            ),
            sampling=self._sampling,
            max_turns=tasks.max_turns,
            max_tokens=tasks.max_tokens,
            min_version=self.intake.ledger.min_version(lease),
            expires_after=self._expires_after,
        )


def _patience(remaining: float | None) -> float:
    """Seconds to wait so that the response comes before the caller's deadline."""
    if remaining is None:
        return LONGEST_WAIT_SECONDS
    return min(remaining - min(1.0, 0.2 * remaining), LONGEST_WAIT_SECONDS)
