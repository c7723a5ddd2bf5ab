"""Client of TaskService: leases on episodes to play."""

from collections.abc import Sequence
from dataclasses import dataclass

from understudy.client.base import Client
from understudy.config import NetworkConfig
from understudy.v1 import common_pb2, task_pb2, task_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to play one episode, for a while."""

    lease_id: int
    ordinal: int
    """Ordinal of the task in the run; all samples of one ordinal form a group."""
    sample_index: int
    suite: str
    split: str
    task_ordinal: int
    sampling: common_pb2.SamplingParameters
    max_turns: int
    max_tokens: int
    min_version: int
    max_version: int = 0
    """Highest policy version that may play it; 0 for any."""
    expires_after_seconds: float


@dataclass(frozen=True, kw_only=True)
class Leases:
    """What one call handed out."""

    leases: tuple[Lease, ...]
    run_id: str
    exhausted: bool
    """The run will never lease another task."""


class TaskClient(Client):
    """Calls the learner for tasks."""

    peer = "learner"

    def __init__(self, address: str, network: NetworkConfig) -> None:
        super().__init__(address, network)
        self._stub = task_pb2_grpc.TaskServiceStub(self.channel)

    async def lease(
        self, actor_id: str, max_leases: int, run_id: str = "", timeout: float = 30.0
    ) -> Leases:
        """Wait for up to max_leases episodes; none if there was no task within the timeout."""
        request = task_pb2.LeaseTasksRequest(
            run_id=run_id, actor_id=actor_id, max_leases=max_leases
        )
        response = await self._stub.LeaseTasks(request, timeout=timeout)
        return Leases(
            leases=tuple(_lease(lease) for lease in response.leases),
            run_id=response.run_id,
            exhausted=response.exhausted,
        )

    async def renew(self, actor_id: str, lease_ids: Sequence[int]) -> list[int]:
        """Extend leases; returns those that are gone."""
        request = task_pb2.RenewLeasesRequest(actor_id=actor_id, lease_ids=lease_ids)
        return list((await self._stub.RenewLeases(request, timeout=10)).gone_lease_ids)


def _lease(message: task_pb2.Lease) -> Lease:
    return Lease(
        lease_id=message.lease_id,
        ordinal=message.task_key.ordinal,
        sample_index=message.task_key.sample_index,
        suite=message.task.suite,
        split=message.task.split,
        task_ordinal=message.task.task_ordinal,
        sampling=message.sampling,
        max_turns=message.max_turns,
        max_tokens=message.max_tokens,
        min_version=message.min_version,
        max_version=message.max_version,
        expires_after_seconds=message.expires_after.ToNanoseconds() / 1e9,
    )
