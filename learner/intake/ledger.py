"""The ledger: the state machine of task keys.

    issue -> WAITING -> LEASED -> STORED -> ASSIGNED -> TRAINED
                ^          |         |         stored, leased or waiting -> DROPPED{reason}:
                +----------+         |            failed, stale, short_group, uniform_group,
             expired, failed         |            or the reason of a refused record
                                     +-> a late result is taken from WAITING too

Plain synchronous state, no clock and no wire: `Intake` owns the one ledger of a run.
"""

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from learner.intake.admission import Admission
from learner.intake.leases import Lease, Leases
from learner.intake.store import Event, Store
from learner.intake.tasks import (
    Balance,
    Ended,
    Group,
    Sample,
    State,
    Summary,
    TaskKey,
    count_balance,
)
from understudy import metrics
from understudy.config import TasksConfig

_ENDS = (State.TRAINED, State.DROPPED)


class Ledger:
    """Every task key of a run, each in exactly one state.

    Args:
        tasks: what is played.
        steps: steps of the run.
        store: takes every event, and the records.
        first_lease_id: ids rise from here; the caller sees to it that no earlier start used them.
    """

    def __init__(
        self, tasks: TasksConfig, steps: int, store: Store, first_lease_id: int = 1
    ) -> None:
        self.tasks = tasks
        self.steps = steps
        self.store = store
        self.admission = Admission(tasks=tasks, steps=steps)
        self.leases = Leases(first_lease_id, tasks.lease_seconds)
        self.num_closed = 0
        """Batches closed; also the step whose batch comes next."""
        self._num_groups = 0
        self._waiting: deque[Sample] = deque()
        self._open: dict[int, Group] = {}
        self._assigned: dict[int, Sequence[Group]] = {}
        self._ended: Ended = Counter()

    @property
    def num_completed(self) -> int:
        """Batches that were trained."""
        return self.num_closed - len(self._assigned)

    # Leases.

    @property
    def can_lease(self) -> bool:
        """Whether there is a task to play."""
        return not self.exhausted and (bool(self._waiting) or self._may_issue)

    @property
    def exhausted(self) -> bool:
        """The run's last batch is closed: nothing will be leased any more."""
        return self.num_closed >= self.steps

    def end_with(self, step: int) -> None:
        """Make this step's batch the run's last; episodes meant for later ones stay untrained."""
        self.steps = step + 1
        self.admission = replace(self.admission, steps=self.steps)

    @property
    def _may_issue(self) -> bool:
        closed = self.num_closed * self.tasks.groups_per_batch
        return closed + len(self._open) < self.admission.group_limit

    def lease(self, actor_id: str, max_leases: int, now: float) -> list[Lease]:
        """Lease up to so many samples, those that were given back first."""
        leases: list[Lease] = []
        while len(leases) < max_leases and self.can_lease:
            if not self._waiting:
                self._issue_group()
            leases.append(self._lease(self._waiting.popleft(), actor_id, now))
        return leases

    def _issue_group(self) -> None:
        position = self.num_closed * self.tasks.groups_per_batch + len(self._open)
        group = Group(ordinal=self._num_groups, batch=position // self.tasks.groups_per_batch)
        for index in range(self.tasks.group_size):
            sample = Sample(key=TaskKey(group.ordinal, index))
            group.samples.append(sample)
            self._enter(sample, State.WAITING)
            self._waiting.append(sample)
        self._open[group.ordinal] = group
        self._num_groups += 1

    def _lease(self, sample: Sample, actor_id: str, now: float) -> Lease:
        batch = max(self._open[sample.key.ordinal].batch, self.num_closed)
        lease = self.leases.add(sample, actor_id, self.admission.min_version(batch), now)
        sample.lease_id = lease.lease_id
        self._enter(sample, State.LEASED)
        return lease

    def task_ordinal(self, key: TaskKey) -> int:
        """Ordinal in the split of a task key's task."""
        return self.tasks.first_ordinal + key.ordinal % self.tasks.num_tasks

    def expire(self, now: float) -> int:
        """Give back the samples of leases whose time is over; returns how many."""
        late = self.leases.expired(now)
        for lease in late:
            self._give_back(lease.sample, "expired")
        return len(late)

    # Results.

    def knows(self, key: TaskKey) -> bool:
        """Whether a task key was ever issued."""
        return key.ordinal < self._num_groups and key.sample_index < self.tasks.group_size

    def has_result(self, key: TaskKey) -> bool:
        """Whether a known task key needs no trajectory any more: it has one, or has ended."""
        return self._pending(key) is None

    def deliver(self, key: TaskKey, summary: Summary, record: bytes) -> bool:
        """Take the trajectory of a known task key, whichever lease it was played under.

        Returns:
            False for a duplicate: the task key has its trajectory, or has ended.
        """
        sample = self._pending(key)
        if sample is None:
            return False
        self._withdraw(sample)
        if self.admission.too_stale(self.num_closed, summary.oldest_version):
            self._drop(sample, "stale")
            self._settle(key.ordinal)
            return True
        sample.summary = summary
        self.store.put(key, record)
        self._enter(sample, State.STORED)
        return True

    def fail(self, key: TaskKey, lease_id: int, reason: str) -> None:
        """An episode came to nothing: play it again, or drop it after `max_attempts`.

        Only the lease that the sample is played under counts: a late failure changes nothing.
        """
        sample = self._pending(key)
        if sample is None or not lease_id or sample.lease_id != lease_id:
            return
        sample.num_failures += 1
        if sample.num_failures < self.tasks.max_attempts:
            self._give_back(sample, reason)
            return
        self._withdraw(sample)
        self._drop(sample, reason)
        self._settle(key.ordinal)

    def _pending(self, key: TaskKey) -> Sample | None:
        group = self._open.get(key.ordinal)
        sample = group.samples[key.sample_index] if group else None
        pending = sample and sample.state in (State.WAITING, State.LEASED)
        return sample if pending else None

    # Batches.

    def is_complete(self, ordinal: int) -> bool:
        """Whether a group waits for its batch."""
        return ordinal in self._open and self._open[ordinal].complete

    def ready_groups(self) -> list[Group]:
        """The groups of the next batch; empty until they are complete.

        A batch is the oldest groups in order of issue, never those that happened to end first:
        that would train on short episodes and drop the long ones as stale, which are more often the
        thorough ones. Later groups are played meanwhile, within the limits of admission.
        """
        number = self.tasks.groups_per_batch
        groups = list(itertools.islice(self._open.values(), number))
        return groups if len(groups) == number and all(g.complete for g in groups) else []

    def assign(self, groups: Sequence[Group], uniform: Iterable[int]) -> None:
        """Close the next batch with these groups; the uniform ones (ordinals) are dropped."""
        uniform = set(uniform)
        for group in groups:
            del self._open[group.ordinal]
            for sample in group.in_state(State.STORED):
                if group.ordinal in uniform:
                    self._drop(sample, "uniform_group")
                else:
                    self._enter(sample, State.ASSIGNED)
        self._assigned[self.num_closed] = groups
        self.num_closed += 1
        self._drop_stale()

    def complete(self, step: int) -> None:
        """The batch of a step was trained."""
        for group in self._assigned.pop(step):
            for sample in group.in_state(State.ASSIGNED):
                self._enter(sample, State.TRAINED)
            self._forget(group)

    def advance(self, version: int, step: int) -> None:
        """A version was published that has so many steps behind it."""
        self.admission = self.admission.advanced(version, step)
        self._drop_stale()

    def _drop_stale(self) -> None:
        for group in list(self._open.values()):
            for sample in group.in_state(State.STORED):
                assert sample.summary is not None
                if self.admission.too_stale(self.num_closed, sample.summary.oldest_version):
                    self._drop(sample, "stale")
            self._settle(group.ordinal)

    # Accounts.

    def balance(self) -> Balance:
        """Count every task key that was ever issued."""
        issued = self._num_groups * self.tasks.group_size
        return count_balance(issued, self._held(), self._ended)

    def _held(self) -> Iterable[Sample]:
        for groups in (self._open.values(), *self._assigned.values()):
            for group in groups:
                yield from group.samples

    # Transitions.

    def _enter(self, sample: Sample, state: State, reason: str = "") -> None:
        """The one place where a task key changes its state."""
        if state in _ENDS and sample.state in (State.STORED, State.ASSIGNED):
            self.store.forget(sample.key)
        sample.state = state
        self.store.append(Event(key=sample.key, state=state, reason=reason))
        if state is State.STORED:
            metrics.TRAJECTORIES_STORED.inc()
        elif state is State.DROPPED:
            sample.reason = reason
            metrics.TRAJECTORIES_DROPPED.labels(reason).inc()

    def _drop(self, sample: Sample, reason: str) -> None:
        self._enter(sample, State.DROPPED, reason)

    def _withdraw(self, sample: Sample) -> None:
        """Nobody is to play a pending sample any more."""
        if sample.state is State.LEASED:
            self.leases.remove(sample.lease_id)
            sample.lease_id = 0
        else:
            self._waiting.remove(sample)

    def _give_back(self, sample: Sample, reason: str) -> None:
        self._withdraw(sample)
        self._enter(sample, State.WAITING, reason)
        self._waiting.appendleft(sample)

    def _settle(self, ordinal: int) -> None:
        """Drop a group that lost too many samples; admission makes room for another."""
        group = self._open[ordinal]
        if not group.hopeless:
            return
        for sample in group.in_state(State.WAITING, State.LEASED):
            self._withdraw(sample)
            self._drop(sample, "short_group")
        for sample in group.in_state(State.STORED):
            self._drop(sample, "short_group")
        del self._open[ordinal]
        self._forget(group)

    def _forget(self, group: Group) -> None:
        self._ended.update((sample.state, sample.reason) for sample in group.samples)
