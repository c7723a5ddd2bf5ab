"""The intake's state behind one condition: ledger, store and batches.

| loop or call   | consumes            | waits for                | woken by                       |
|----------------|---------------------|--------------------------|--------------------------------|
| lease          | waiting task keys   | one to be leasable       | version, failure, expiry, drop |
| next_batch     | complete groups     | groups_per_batch of them | the record that completes one  |
| deliver, fail  | results of episodes | nothing                  |                                |
| keep_time      | expired leases      | the clock                |                                |

`close` wakes everybody, and every waiting call is refused as DRAINING.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from learner.intake.batches import Batch, BatchItem, assemble, choose_samples, split, statistics
from learner.intake.journal import Journal
from learner.intake.leases import Lease
from learner.intake.ledger import Ledger
from learner.intake.refusals import RefusedError, draining
from learner.intake.store import Store
from learner.intake.tasks import Balance, Group, State, Summary, TaskKey
from understudy import metrics
from understudy.config import Config
from understudy.trajectory import Trajectory

_log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
"""How often leases are checked for expiry and gauges are set."""
SAMPLES_PER_STEP = 2
"""Episodes of each batch that go to samples.jsonl."""
_SAY_SECONDS = 30.0
IDS_PER_EPOCH = 2**32
"""Ids begin at epoch times this, so that no two starts of an intake give the same one."""


class Intake:
    """Owns a run's experience, from the lease to the trained batch.

    Args:
        config: the run.
        epoch: of this start.
        store: holds records.
        journal: takes the line of each step.
        decode: turns a stored record into a trajectory, for samples.jsonl.
        paused: whether leasing is to stand still.
    """

    def __init__(
        self,
        config: Config,
        epoch: int,
        store: Store,
        journal: Journal,
        decode: Callable[[bytes], Trajectory],
        paused: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self.store = store
        learner = config.learner
        self.ledger = Ledger(learner.tasks, learner.train.steps, store, epoch * IDS_PER_EPOCH + 1)
        self.on_room: Callable[[], None] = lambda: None
        """Called when the store has let go of records."""
        self._journal = journal
        self._decode = decode
        self._paused = paused
        self._changed = asyncio.Condition()
        self._closed = False
        self._batches: dict[int, Batch] = {}
        self._world_sizes: dict[int, int] = {}
        self._samples: dict[int, list[Trajectory]] = {}
        self._dropped: Mapping[str, int] = {}
        self._num_askers = 0
        self._first_asked = math.inf
        self._waited_seconds = 0.0
        self._gauges = {name: metrics.TASK_KEYS.labels(name) for name in self.balance().figures()}

    def balance(self) -> Balance:
        """The accounts of all task keys."""
        return self.ledger.balance()

    @property
    def free_bytes(self) -> int:
        """Room in the store; not negative."""
        return max(self.config.learner.store_bytes - self.store.num_bytes, 0)

    async def close(self) -> None:
        """Refuse what waits and what comes."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    # Tasks.

    async def lease(self, actor_id: str, max_leases: int, timeout: float) -> list[Lease]:
        """Lease samples, waiting until there is one; none after `timeout` seconds, or if the run
        is exhausted."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._changed.wait_for(self._may_answer_lease)
            self._raise_if_closed()
            if self._paused():
                return []
            return self.ledger.lease(actor_id, max_leases, time.monotonic())

    def _may_answer_lease(self) -> bool:
        leasable = self.ledger.can_lease and not self._paused()
        return self._closed or self.ledger.exhausted or leasable

    def renew(self, actor_id: str, lease_ids: Sequence[int]) -> list[int]:
        """Extend leases; returns those that are gone."""
        return self.ledger.leases.renew(actor_id, lease_ids, time.monotonic())

    # Results.

    async def deliver(self, key: TaskKey, summary: Summary, record: bytes) -> bool:
        """Take a trajectory; False for a duplicate."""
        async with self._changed:
            taken = self.ledger.deliver(key, summary, record)
            # Waking all who wait costs more than a record: only if there is something for them.
            if self.ledger.can_lease or self._batch_is_ready(key):
                self._changed.notify_all()
        return taken

    def _batch_is_ready(self, key: TaskKey) -> bool:
        """Whether a result made a batch complete that somebody waits for."""
        complete = self._num_askers and self.ledger.is_complete(key.ordinal)
        return bool(complete and self.ledger.ready_groups())

    async def fail(self, key: TaskKey, lease_id: int, reason: str) -> None:
        """An episode came to nothing, for example because its environment failed."""
        async with self._changed:
            self.ledger.fail(key, lease_id, reason)
            self._changed.notify_all()

    async def advance(self, version: int, step: int) -> None:
        """A version was committed that has so many steps behind it."""
        async with self._changed:
            self.ledger.advance(version, step)
            self._changed.notify_all()
        self.on_room()

    # Batches.

    async def next_batch(
        self, step: int, rank: int, world_size: int
    ) -> tuple[Batch, list[tuple[BatchItem, bytes]]]:
        """The batch of a step, and a rank's share of it with its records.

        Raises:
            RefusedError: BAD_RANK, STEP_OUT_OF_ORDER, DRAINING.
        """
        if not rank < world_size:
            raise RefusedError("BAD_RANK", f"rank {rank} is not below world_size {world_size}")
        async with self._changed:
            with metrics.timed(metrics.BATCH_WAIT_SECONDS):
                await self._wait_for_batch(step, world_size)
            agreed = self._world_sizes[step]
            if world_size != agreed:
                raise RefusedError(
                    "BAD_RANK", f"world_size {world_size}: step {step} is split over {agreed} ranks"
                )
            batch = self._batches[step]
            share = split(batch.items, world_size)[rank]
            return batch, [(item, self.store.get(item.key)) for item in share]

    async def _wait_for_batch(self, step: int, world_size: int) -> None:
        self._check_step(step)
        self._first_asked = min(self._first_asked, time.monotonic())
        self._num_askers += 1
        try:
            while step not in self._batches:
                self._raise_if_closed()
                if groups := self.ledger.ready_groups():
                    self._close_batch(step, groups, world_size)
                else:
                    await self._changed.wait()
                self._check_step(step)  # others may have completed it meanwhile
        finally:
            self._num_askers -= 1

    def _time_is_up(self) -> bool:
        limit = self.config.learner.train.max_seconds
        return limit is not None and time.monotonic() - self._first_asked > limit

    def _check_step(self, step: int) -> None:
        next_step = self.ledger.num_closed
        if step not in self._batches and (step != next_step or self.ledger.exhausted):
            remedy = (
                f"the run has {self.ledger.steps} steps"
                if self.ledger.exhausted
                else f"step {next_step} is next"
            )
            raise RefusedError("STEP_OUT_OF_ORDER", f"step {step} cannot be asked for; {remedy}")

    def _close_batch(self, step: int, groups: Sequence[Group], world_size: int) -> None:
        if self._time_is_up():
            self.ledger.end_with(step)
        tasks = self.config.learner.tasks
        seed = self.config.run.seed if tasks.shuffle_rewards else None
        batch = assemble(step, groups, self.ledger.admission, seed)
        self._samples[step] = [
            self._decode(self.store.get(item.key))
            for item in choose_samples(batch, SAMPLES_PER_STEP)
        ]
        self.ledger.assign(groups, batch.uniform)
        self._batches[step] = batch
        self._world_sizes[step] = world_size
        self._changed.notify_all()

    async def complete_step(self, step: int, measured: Mapping[str, float]) -> None:
        """The optimizer step of a batch was taken. Idempotent.

        Raises:
            RefusedError: STEP_OUT_OF_ORDER for a step whose batch was never asked for.
        """
        async with self._changed:
            if step >= self.ledger.num_closed:
                raise RefusedError(
                    "STEP_OUT_OF_ORDER", f"the batch of step {step} was never asked for"
                )
            batch = self._batches.pop(step, None)
            if batch is None:
                return
            self.ledger.complete(step)
            del self._world_sizes[step]
            self._changed.notify_all()
        self._write_step(batch, measured)
        self.on_room()

    def _write_step(self, batch: Batch, measured: Mapping[str, float]) -> None:
        for item in batch.items:
            metrics.POLICY_STALENESS.observe(item.staleness)
        dropped = self.balance().dropped
        new = Counter(dropped)
        new.subtract(self._dropped)
        self._dropped = dropped
        figures = {"dropped": {reason: n for reason, n in new.items() if n}}
        self._journal.step(batch.step, {**measured, **statistics(batch), **figures})
        self._journal.samples(batch.step, batch.trained_version, self._samples.pop(batch.step))

    # Time.

    async def keep_time(self) -> None:
        """Expire leases and set gauges until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            async with self._changed:
                num_expired = self.ledger.expire(time.monotonic())
                if num_expired:
                    metrics.LEASES_EXPIRED.inc(num_expired)
                    _log.warning("%d leases expired; their tasks are leased again", num_expired)
                if self.ledger.can_lease:  # given back just now, or held up by a pause
                    self._changed.notify_all()
            self._set_gauges()
            self._say_waiting()

    def _set_gauges(self) -> None:
        balance = self.balance()
        if not balance.holds:
            _log.error("task keys do not balance: %s", balance)
        for name, number in balance.figures().items():
            self._gauges[name].set(number)
        metrics.STORED_TRAJECTORIES.set(balance.states[State.STORED])

    def _say_waiting(self) -> None:
        """Tell why the trainer waits, now and then."""
        self._waited_seconds = self._waited_seconds + TICK_SECONDS if self._num_askers else 0.0
        if self._waited_seconds < _SAY_SECONDS:
            return
        self._waited_seconds = 0.0
        admission = self.ledger.admission
        figures = self.balance().figures().items()
        _log.warning(
            "step %d waits for experience: version %d of step %d is newest, %s",
            self.ledger.num_closed,
            admission.version,
            admission.step,
            ", ".join(f"{number} {name}" for name, number in figures),
        )
        if not self.free_bytes:
            _log.error(
                "learner.store_bytes = %d is full and no batch is complete; raise it",
                self.config.learner.store_bytes,
            )

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise draining()
