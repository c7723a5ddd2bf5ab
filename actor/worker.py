"""The actor's loop: lease, play, send; M episodes at a time on one event loop.

TaskService.LeaseTasks -> [Player.play x M] -> Uplink -> TrajectoryService.PushTrajectories
"""

import asyncio
import logging
import time

import grpc

from actor.episode import Player
from understudy import metrics
from understudy.client import Lease, Leases, TaskClient
from understudy.client.trajectories import Uplink
from understudy.errors import UnderstudyError
from understudy.rpc import RoleControl, error_reason
from understudy.v1 import trajectory_pb2

_log = logging.getLogger(__name__)
_GATHER_SECONDS = 0.002
"""Episodes that end within this time are replaced by one call."""
_RETRY_SECONDS = 1.0
_MAX_LEASES = 1024
"""Most that one call may ask for."""
_SAY_SECONDS = 10.0
_PERMANENT = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
)
"""Answers to a lease that stay the same however often it is asked."""


class LearnerRefusedError(UnderstudyError):
    """The learner will never lease to this actor."""


class Worker:
    """Keeps `concurrency` episodes running while the learner has tasks."""

    def __init__(
        self,
        run_id: str,
        actor_id: str,
        concurrency: int,
        tasks: TaskClient,
        player: Player,
        uplink: Uplink,
        control: RoleControl,
    ) -> None:
        self._run_id = run_id
        self._actor_id = actor_id
        self._concurrency = concurrency
        self._tasks = tasks
        self._player = player
        self._uplink = uplink
        self._control = control
        self._running: dict[int, asyncio.Task[None]] = {}
        self._slot_free = asyncio.Event()
        self._renew_every = 0.0
        self._leased = asyncio.Event()
        self._said = 0.0

    @property
    def num_running(self) -> int:
        """Episodes that are played now."""
        return len(self._running)

    async def run(self, grace: float = 1.5) -> None:
        """Play until the run has no more tasks, or the process drains; then send what is left.

        Args:
            grace: seconds that running episodes get once the process drains; the leases of those
                that are not done by then expire and go to somebody else.

        Raises:
            LearnerRefusedError: the learner serves another run, or another protocol.
        """
        helpers = [asyncio.create_task(self._renew()), asyncio.create_task(self._wake_on_drain())]
        try:
            while await self._control.admitted():
                if not await self._refill():
                    break
                await self._wait_for_slot()
            await self._finish(grace)
            await asyncio.wait_for(self._uplink.flush(), grace)
        except TimeoutError:
            _log.error("%d records were not acked; their leases expire", self._uplink.num_unacked)
        finally:
            for helper in helpers:
                helper.cancel()

    async def _refill(self) -> bool:
        """Lease as many episodes as there are free slots; False if there will never be more."""
        free = min(self._concurrency - len(self._running), _MAX_LEASES)
        try:
            answer = await self._lease(free)
        except grpc.aio.AioRpcError as error:
            if error.code() in _PERMANENT:
                raise LearnerRefusedError(
                    f"the learner at {self._tasks.address} leases nothing to run.name = "
                    f"{self._run_id!r}: {error_reason(error)}: {error.details()}"
                ) from None
            self._say_waiting(error)
            await asyncio.sleep(_RETRY_SECONDS)
            return True
        for lease in answer.leases:
            self._renew_every = lease.expires_after_seconds / 3
            self._leased.set()
            self._running[lease.lease_id] = asyncio.create_task(self._play(lease))
        metrics.EPISODES.set(len(self._running))
        return not answer.exhausted or bool(answer.leases)

    async def _lease(self, free: int) -> Leases:
        call = asyncio.create_task(self._tasks.lease(self._actor_id, free, self._run_id))
        draining = asyncio.create_task(self._control.draining.wait())
        try:
            await asyncio.wait((call, draining), return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                return Leases(leases=(), run_id="", exhausted=False)
            return call.result()
        finally:
            call.cancel()
            draining.cancel()

    def _say_waiting(self, error: grpc.aio.AioRpcError) -> None:
        if time.monotonic() - self._said > _SAY_SECONDS:
            self._said = time.monotonic()
            _log.warning("waiting for tasks from %s (%s)", self._tasks.address, error_reason(error))

    async def _wait_for_slot(self) -> None:
        while len(self._running) >= self._concurrency and not self._control.draining.is_set():
            self._slot_free.clear()
            await self._slot_free.wait()
        await asyncio.sleep(_GATHER_SECONDS)

    async def _wake_on_drain(self) -> None:
        """A drain ends the wait for a slot: the episodes that hold them may never end."""
        await self._control.draining.wait()
        self._slot_free.set()

    async def _play(self, lease: Lease) -> None:
        try:
            trajectory = await self._player.play(lease)
            outcome = trajectory_pb2.Outcome.Name(trajectory.outcome).removeprefix("OUTCOME_")
            metrics.TRAJECTORIES.labels(lease.suite, outcome.lower()).inc()
            metrics.EPISODE_SECONDS.labels(lease.suite).observe(trajectory.duration_seconds)
            if trajectory.outcome >= trajectory_pb2.OUTCOME_ENVIRONMENT_FAILED:
                _log.warning("episode failed: %s: %s", outcome.lower(), trajectory.detail)
            await self._uplink.put(lease, trajectory)
        finally:
            del self._running[lease.lease_id]
            metrics.EPISODES.set(len(self._running))
            self._slot_free.set()

    async def _finish(self, grace: float) -> None:
        """Wait for running episodes; once the process drains, for `grace` seconds more."""
        draining = asyncio.create_task(self._control.draining.wait())
        while self._running and not draining.done():
            waited = (*self._running.values(), draining)
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        if not self._running:
            return
        _, late = await asyncio.wait(self._running.values(), timeout=grace)
        for task in late:
            task.cancel()
        if late:
            _log.warning("%d episodes were cut off by the drain; their leases expire", len(late))
            await asyncio.wait(late)

    async def _renew(self) -> None:
        await self._leased.wait()
        while True:
            await asyncio.sleep(self._renew_every)
            if not self._running:
                continue
            try:
                gone = await self._tasks.renew(self._actor_id, list(self._running))
            except grpc.aio.AioRpcError as error:
                _log.warning("leases were not renewed: %s", error_reason(error))
                continue
            if gone:
                _log.warning("%d leases are gone; their results may come late", len(gone))
