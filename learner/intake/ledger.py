"""The ledger: decides what becomes of task keys, writes it to the log, applies it to the state.

No clock and no wire: `Intake` owns the one ledger of a run. What a method writes is durable after
the log's next flush, which whoever tells others about it awaits first.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from learner.intake.batches import Batch, assignment
from learner.intake.leases import Lease
from learner.intake.refusals import RefusedError
from learner.intake.state import RunState
from learner.intake.tasks import Group, Sample, State, TaskKey
from learner.log.segments import Location
from understudy import metrics
from understudy.config import TasksConfig
from understudy.v1 import common_pb2, log_pb2, trajectory_pb2

IDS_PER_EPOCH = 2**32
"""Ids begin at epoch times this, so that no two starts of an intake give the same one."""


class Appender(Protocol):
    """What the ledger needs of the log."""

    def append(self, entry: log_pb2.LogEntry, payload: bytes = b"") -> Location:
        """Add an entry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A sound record of a trajectory that may be trained."""

    key: TaskKey
    origin: log_pb2.RecordOrigin
    record: trajectory_pb2.TrajectoryRecord
    payload: bytes
    """The record's, which every look at its field would copy."""
    summary: log_pb2.EpisodeSummary


class Ledger:
    """Every task key of a run, each in exactly one state.

    Args:
        log: takes every event.
        state: what the log adds up to so far.
    """

    def __init__(self, log: Appender, state: RunState) -> None:
        self.state = state
        self.tasks: TasksConfig = state.tasks
        self._log = log
        self._write(intake_started=log_pb2.IntakeStarted(epoch=state.epoch + 1))
        self._lease_ids = itertools.count(state.epoch * IDS_PER_EPOCH + 1)

    def _write(self, payload: bytes = b"", **event: Any) -> None:
        """The one place where anything changes."""
        entry = log_pb2.LogEntry(**event)
        self.state.apply(entry, self._log.append(entry, payload))

    # Trainers and versions.

    def start_training(self, step: int, ledger_digest: bytes) -> int:
        """A trainer starts with so many steps behind it; returns its epoch.

        Raises:
            RefusedError: STEP_OUT_OF_ORDER, LEDGER_MISMATCH.
        """
        state = self.state
        if not state.oldest_step <= step <= state.num_closed:
            remedy = (
                "an older checkpoint than the oldest one that was kept; restore a newer one"
                if step < state.oldest_step
                else "more than the log knows of; restore the log, or choose another run.name"
            )
            raise RefusedError(
                "STEP_OUT_OF_ORDER",
                f"step {step}; {state.oldest_step} to {state.num_closed} can be started from: "
                f"{remedy}",
            )
        if ledger_digest != state.ledger_digests[step]:
            raise RefusedError(
                "LEDGER_MISMATCH",
                f"step {step}: the checkpoint learned from other batches than the log has; restore "
                "the log and the checkpoints of one run together",
            )
        epoch = state.trainer_epoch + 1
        self._write(trainer_started=log_pb2.TrainerStarted(epoch=epoch, step=step))
        return epoch

    def require_trainer(self, epoch: int) -> None:
        """Raise OLD_EPOCH unless a trainer's epoch is the newest."""
        if epoch != self.state.trainer_epoch:
            raise RefusedError(
                "OLD_EPOCH", f"epoch {epoch}; the present trainer's is {self.state.trainer_epoch}"
            )

    def publish(self, step: int, epoch: int) -> int:
        """Issue a version that has so many steps behind it.

        Raises:
            RefusedError: OLD_EPOCH.
        """
        self.require_trainer(epoch)
        version = len(self.state.steps_behind) + 1
        self._write(
            version_published=log_pb2.VersionPublished(version=version, step=step, epoch=epoch)
        )
        self._drop_stale()
        return version

    # Leases.

    @property
    def exhausted(self) -> bool:
        """The run's last batch is closed: nothing will be leased any more."""
        return self.state.ended or self.state.num_closed >= self.state.admission.steps

    def end_with(self, step: int) -> None:
        """Make this step's batch the run's last; episodes meant for later ones stay untrained."""
        self.state.admission = replace(self.state.admission, steps=step + 1)

    @property
    def can_lease(self) -> bool:
        """Whether there is a task to play."""
        if self.exhausted:
            return False
        if self.state.waiting:
            return self.state.admission.admits(self._batch_of(self.state.waiting[0]))
        return self._may_issue

    @property
    def _may_issue(self) -> bool:
        closed = self.state.num_closed * self.tasks.groups_per_batch
        return closed + len(self.state.open) < self.state.admission.group_limit

    def _batch_of(self, sample: Sample) -> int:
        return max(self.state.open[sample.key.ordinal].batch, self.state.num_closed)

    def lease(self, actor_id: str, max_leases: int) -> list[Lease]:
        """Lease up to so many samples, those that were given back first."""
        leases: list[Lease] = []
        while len(leases) < max_leases and self.can_lease:
            if not self.state.waiting:
                self._issue_group()
            leases.append(self._lease(self.state.waiting[0], actor_id))
        return leases

    def _issue_group(self) -> None:
        per_batch = self.tasks.groups_per_batch
        position = self.state.num_closed * per_batch + len(self.state.open)
        self._write(
            group_issued=log_pb2.GroupIssued(
                ordinal=self.state.num_groups,
                batch=position // per_batch,
                num_samples=self.tasks.group_size,
            )
        )

    def _lease(self, sample: Sample, actor_id: str) -> Lease:
        lease_id = next(self._lease_ids)
        self._write(
            sample_leased=log_pb2.SampleLeased(
                task_key=encode_key(sample.key), lease_id=lease_id, actor_id=actor_id
            )
        )
        return self.state.leases.get(lease_id)

    def min_version(self, lease: Lease) -> int:
        """Lowest version that may play a lease."""
        return self.state.admission.min_version(self._batch_of(lease.sample))

    def task_ordinal(self, key: TaskKey) -> int:
        """Ordinal in the split of a task key's task."""
        return self.tasks.first_ordinal + key.ordinal % self.tasks.num_tasks

    def expire(self, now: float) -> int:
        """Give back the samples of leases whose time is over; returns how many."""
        late = self.state.leases.expired(now)
        for lease in late:
            self._give_back(lease.sample, "expired", failed=False)
        return len(late)

    # Results.

    def knows(self, key: TaskKey) -> bool:
        """Whether a task key was ever issued."""
        group = self.state.open.get(key.ordinal)
        # A group that is closed needs nothing; one that is open has the size of its issue.
        known = group is None or key.sample_index < len(group.samples)
        return key.ordinal < self.state.num_groups and known

    def has_result(self, key: TaskKey) -> bool:
        """Whether a known task key needs no trajectory any more: it has one, or has ended."""
        return self.state.pending(key) is None

    def oldest_step(self, versions: Sequence[int]) -> int | None:
        """Fewest steps behind any of these versions; None without any."""
        return min((self.state.steps_behind[version - 1] for version in versions), default=None)

    def deliver(self, result: Result) -> bool:
        """Take the trajectory of a known task key, whichever lease it was played under.

        Returns:
            False for a duplicate: the task key has its trajectory, or has ended.
        """
        if self.has_result(result.key):
            self.answer(result.origin, result.key, log_pb2.ANSWER_DUPLICATE)
            return False
        if self._too_stale(result.summary):
            self.answer(result.origin, result.key, log_pb2.ANSWER_STALE)
            self._drop(result.key, "stale")
            self._settle(result.key.ordinal)
            return True
        record = result.record
        self._write(
            result.payload,
            trajectory_stored=log_pb2.TrajectoryStored(
                task_key=record.task_key,
                origin=result.origin,
                lease_id=record.lease_id,
                outcome=record.outcome,
                encoding=record.encoding,
                payload_digest=record.payload_digest,
                summary=result.summary,
            ),
        )
        metrics.TRAJECTORIES_STORED.inc()
        return True

    def answer(
        self,
        origin: log_pb2.RecordOrigin,
        key: TaskKey,
        answer: "log_pb2.Answer.ValueType",
        reason: str = "",
        payload: bytes = b"",
    ) -> None:
        """Account for a record that is not stored."""
        self._write(
            payload,
            record_answered=log_pb2.RecordAnswered(
                origin=origin, task_key=encode_key(key), answer=answer, reason=reason
            ),
        )

    def fail(self, key: TaskKey, lease_id: int, reason: str) -> None:
        """An episode came to nothing: play it again, or drop it after `max_attempts`.

        Only the lease that the sample is played under counts: a late failure changes nothing.
        """
        sample = self.state.pending(key)
        if sample is None or not lease_id or sample.lease_id != lease_id:
            return
        if sample.num_failures + 1 < self.tasks.max_attempts:
            self._give_back(sample, reason, failed=True)
            return
        self._drop(key, reason)
        self._settle(key.ordinal)

    # Batches.

    def is_complete(self, ordinal: int) -> bool:
        """Whether a group waits for its batch."""
        return ordinal in self.state.open and self.state.open[ordinal].complete

    def ready_groups(self) -> list[Group]:
        """The groups of the next batch; empty until they are complete.

        A batch is the oldest groups in order of issue, never those that happened to end first:
        that would train on short episodes and drop the long ones as stale, which are more often the
        thorough ones. Later groups are played meanwhile, within the limits of admission.
        """
        number = self.tasks.groups_per_batch
        groups = list(itertools.islice(self.state.open.values(), number))
        return groups if len(groups) == number and all(g.complete for g in groups) else []

    def assign(self, groups: Sequence[Group], shuffle_seed: int | None = None) -> Batch:
        """Close the next batch with these groups."""
        step = self.state.num_closed
        event = assignment(step, groups, self.state.admission, shuffle_seed)
        self._write(batch_assigned=event)
        batch = self.state.batches[step]
        num_uniform = sum(batch.groups[item.group_index].uniform for item in batch.episodes)
        metrics.TRAJECTORIES_DROPPED.labels("uniform_group").inc(num_uniform)
        self._drop_stale()
        return batch

    def complete(self, step: int) -> None:
        """The batch of the oldest step that is not completed was trained."""
        assert step == self.state.num_completed
        self._write(step_completed=log_pb2.StepCompleted(step=step, epoch=self.state.trainer_epoch))

    def record_checkpoint(self, step: int, oldest_kept_step: int, digest: bytes) -> None:
        """A checkpoint is durable.

        Raises:
            RefusedError: STEP_OUT_OF_ORDER.
        """
        if not oldest_kept_step <= step <= self.state.num_completed:
            raise RefusedError(
                "STEP_OUT_OF_ORDER",
                f"step {step} and oldest_kept_step {oldest_kept_step}; completed are "
                f"{self.state.num_completed}",
            )
        self._write(
            checkpoint_saved=log_pb2.CheckpointSaved(
                step=step,
                epoch=self.state.trainer_epoch,
                manifest_digest=digest,
                oldest_kept_step=oldest_kept_step,
            )
        )

    # Ends.

    def _too_stale(self, summary: log_pb2.EpisodeSummary) -> bool:
        oldest = summary.oldest_step if summary.HasField("oldest_step") else None
        return self.state.admission.too_stale(self.state.num_closed, oldest)

    def _drop_stale(self) -> None:
        for group in list(self.state.open.values()):
            for sample in group.in_state(State.STORED):
                assert sample.summary is not None
                if self._too_stale(sample.summary):
                    self._drop(sample.key, "stale")
            self._settle(group.ordinal)

    def _give_back(self, sample: Sample, reason: str, *, failed: bool) -> None:
        self._write(
            sample_returned=log_pb2.SampleReturned(
                task_key=encode_key(sample.key), reason=reason, failed=failed
            )
        )

    def _settle(self, ordinal: int) -> None:
        """Drop a group that lost too many samples; admission makes room for another."""
        group = self.state.open.get(ordinal)
        if group is None or not group.hopeless:
            return
        for sample in group.in_state(State.WAITING, State.LEASED, State.STORED):
            self._drop(sample.key, "short_group")

    def _drop(self, key: TaskKey, reason: str) -> None:
        self._write(sample_dropped=log_pb2.SampleDropped(task_key=encode_key(key), reason=reason))
        metrics.TRAJECTORIES_DROPPED.labels(reason).inc()


def encode_key(key: TaskKey) -> common_pb2.TaskKey:
    """A task key as a message."""
    return common_pb2.TaskKey(ordinal=key.ordinal, sample_index=key.sample_index)
