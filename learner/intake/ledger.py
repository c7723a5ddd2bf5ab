"""The ledger: decides what becomes of task keys, writes it to the log, applies it to the state.

No clock and no wire: `Intake` owns the one ledger of a run. What a method writes is durable after
the log's next flush, which whoever tells others about it awaits first.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from learner.intake.batches import Batch, assignment, is_uniform
from learner.intake.evaluations import ABANDONED, Evaluation
from learner.intake.leases import Lease, Offer
from learner.intake.lineup import Lineup
from learner.intake.refusals import RefusedError
from learner.intake.state import RunState
from learner.intake.tasks import Group, Sample, State, Task, TaskKey
from learner.log.segments import Location
from understudy import metrics
from understudy.config import EvaluationConfig, TasksConfig
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
        evaluation: what is evaluated, and when.
        keeps_uniform: whether groups whose rewards are all equal are trained.
    """

    def __init__(
        self,
        log: Appender,
        state: RunState,
        evaluation: EvaluationConfig | None = None,
        *,
        keeps_uniform: bool = False,
    ) -> None:
        self.state = state
        self.tasks: TasksConfig = state.tasks
        self._evaluation = evaluation or EvaluationConfig()
        self._keeps_uniform = keeps_uniform
        self._log = log
        self._ended: list[Evaluation] = []
        self._lineup = Lineup(state.tasks)
        for group in state.open.values():
            self._judge(group)
        self._lineup.rebuild(state.open.values())
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
        # What is left of an evaluation of a later step would be played by an earlier one's weights.
        for evaluation in list(state.evaluations.values()):
            if evaluation.step > step:
                self._abandon(evaluation)
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
        if self._is_due(step):
            self._issue_evaluation(version, step)
        return version

    # Leases.

    @property
    def last_is_closed(self) -> bool:
        """The run's last batch is closed: nothing will be leased to be trained on any more."""
        return self.state.ended or self.state.num_closed >= self.state.admission.steps

    @property
    def exhausted(self) -> bool:
        """Nothing will be leased any more: the last batch is closed, and its version evaluated."""
        evaluated = not self.state.evaluations and self._last_is_published
        return self.last_is_closed and (evaluated or not self._evaluation.every_steps)

    @property
    def _last_is_published(self) -> bool:
        """The newest version has every batch behind it."""
        return self.state.admission.step >= self.state.num_closed

    def end_with(self, step: int) -> None:
        """Make this step's batch the run's last; episodes meant for later ones stay untrained."""
        self.state.admission = replace(self.state.admission, steps=step + 1)

    @property
    def can_lease(self) -> bool:
        """Whether there is a task to play."""
        return bool(self.state.heldout) or self._can_lease_to_train

    @property
    def _can_lease_to_train(self) -> bool:
        if self.last_is_closed:
            return False
        admission = self.state.admission
        if self.state.waiting:
            return admission.admits(self._batch_of(self.state.waiting[0].key))
        return self.state.num_closed + self._lineup.next_batch < admission.batch_limit

    def _batch_of(self, key: TaskKey) -> int:
        """Batch that a task key's group is meant for."""
        return self.state.num_closed + self._lineup.batch_of(key.ordinal)

    def lease(self, actor_id: str, max_leases: int) -> list[Lease]:
        """Lease up to so many samples: those of evaluations, then those that were given back.

        Evaluations come first, since their figures are of the policy as it was a moment ago.
        """
        leases: list[Lease] = []
        while len(leases) < max_leases and self.can_lease:
            if not self.state.heldout and not self.state.waiting:
                self._issue_group()
            leases.append(self._lease((self.state.heldout or self.state.waiting)[0], actor_id))
        return leases

    def _issue_group(self) -> None:
        ordinal = self.state.num_groups
        self._write(
            group_issued=log_pb2.GroupIssued(
                ordinal=ordinal,
                batch=self.state.num_closed + self._lineup.next_batch,
                num_samples=self.tasks.group_size,
                task_ordinal=self.state.curriculum.choose(ordinal),
            )
        )
        self._lineup.add(ordinal)

    def _lease(self, sample: Sample, actor_id: str) -> Lease:
        lease_id = next(self._lease_ids)
        self._write(
            sample_leased=log_pb2.SampleLeased(
                task_key=encode_key(sample.key), lease_id=lease_id, actor_id=actor_id
            )
        )
        return self.state.leases.get(lease_id)

    def offer(self, lease: Lease) -> Offer:
        """What an actor has to know of a lease that was just given."""
        key = lease.sample.key
        evaluation = self.state.evaluations.get(key.evaluation)
        return Offer(
            lease=lease,
            task=self.task(key),
            temperature=evaluation.temperature if evaluation else self.tasks.temperature,
            min_version=self.min_version(lease),
        )

    def min_version(self, lease: Lease) -> int:
        """Lowest version that may play a lease."""
        key = lease.sample.key
        if key.evaluation:
            return self.state.evaluations[key.evaluation].version
        return self.state.admission.min_version(self._batch_of(key))

    def task(self, key: TaskKey) -> Task:
        """Task of a task key that still needs a trajectory."""
        if key.evaluation:
            return self.state.evaluations[key.evaluation].task(key)
        ordinal = self.state.open[key.ordinal].task_ordinal
        if ordinal is None:  # issued by an intake that took tasks in order only
            ordinal = self.tasks.first_ordinal + key.ordinal % self.tasks.num_tasks
        return Task(self.tasks.suite, self.tasks.split, ordinal)

    def expire(self, now: float) -> int:
        """Give back the samples of leases whose time is over; returns how many."""
        late = self.state.leases.expired(now)
        for lease in late:
            self._give_back(lease.sample, "expired", failed=False)
        return len(late)

    # Results.

    def knows(self, key: TaskKey) -> bool:
        """Whether a task key was ever issued."""
        # What is closed needs nothing; what is open has the size of its issue.
        if number := key.evaluation:
            evaluation = self.state.evaluations.get(number)
            known = evaluation is None or evaluation.has(key)
            return number <= self.state.num_evaluations and known
        group = self.state.open.get(key.ordinal)
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
        evaluation = self.state.evaluations.get(result.key.evaluation)
        if not evaluation and self._too_stale(result.summary):
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
        if evaluation:
            self._end_if_done(evaluation)
        else:
            self._review(result.key.ordinal)
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

    # Evaluations.

    def _is_due(self, step: int) -> bool:
        """Whether the version that has so many steps behind it is to be evaluated."""
        every = self._evaluation.every_steps
        if not every or step in self.state.evaluated_steps:
            return False
        return step % every == 0 or (self.last_is_closed and self._last_is_published)

    def _issue_evaluation(self, version: int, step: int) -> None:
        config, temperature = self._evaluation, self._evaluation.temperature
        event = log_pb2.EvaluationIssued(
            number=self.state.num_evaluations + 1,
            version=version,
            step=step,
            suite=self.tasks.suite,
            split=config.split,
            first_ordinal=config.first_ordinal,
            num_tasks=config.num_tasks,
            temperature=self.tasks.temperature if temperature is None else temperature,
        )
        self._write(evaluation_issued=event)

    def abandon_evaluations(self) -> bool:
        """Drop what is left of the evaluations of a run that has its last version, since there is
        nobody to play it; returns whether anything was."""
        if not (self.last_is_closed and self._last_is_published and self.state.evaluations):
            return False
        for evaluation in list(self.state.evaluations.values()):
            self._abandon(evaluation)
        return True

    def _abandon(self, evaluation: Evaluation) -> None:
        for sample in evaluation.pending:
            self._drop(sample.key, ABANDONED)

    def _end_if_done(self, evaluation: Evaluation) -> None:
        if evaluation.number not in self.state.evaluations:
            self._ended.append(evaluation)

    def take_ended(self) -> list[Evaluation]:
        """The evaluations that have ended since this was last asked, oldest first."""
        ended, self._ended = self._ended, []
        return ended

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
        groups = list(itertools.islice(self.state.open.values(), self._lineup.num_first))
        return groups if all(group.complete for group in groups) else []

    def assign(self, groups: Sequence[Group], shuffle_seed: int | None = None) -> Batch:
        """Close the next batch with these groups."""
        step = self.state.num_closed
        event = assignment(
            step,
            groups,
            self.state.admission,
            keeps_uniform=self._keeps_uniform,
            shuffle_seed=shuffle_seed,
        )
        self._write(batch_assigned=event)
        self._lineup.rebuild(self.state.open.values())
        batch = self.state.batches[step]
        num_dropped = len(batch.episodes) - len(batch.items)
        metrics.TRAJECTORIES_DROPPED.labels("uniform_group").inc(num_dropped)
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
                summary = sample.summary
                assert summary is not None
                if self._too_stale(summary):
                    self._drop(sample.key, "stale")
            self._settle(group.ordinal)

    def _give_back(self, sample: Sample, reason: str, *, failed: bool) -> None:
        self._write(
            sample_returned=log_pb2.SampleReturned(
                task_key=encode_key(sample.key), reason=reason, failed=failed
            )
        )

    def _review(self, ordinal: int) -> None:
        """A sample of a group has ended: it may be known to be uniform now, or be gone."""
        group = self.state.open.get(ordinal)
        if group is None or self._judge(group):
            self._lineup.rebuild(self.state.open.values())

    def _judge(self, group: Group) -> bool:
        """Tell the line-up whether a group is uniform, if that matters; returns whether it is
        news."""
        if not self._lineup.resamples:
            return False
        return self._lineup.judge(group.ordinal, is_uniform(group, self.tasks))

    def _settle(self, ordinal: int) -> None:
        """Drop a group that lost too many samples; admission makes room for another."""
        group = self.state.open.get(ordinal)
        if group is None or not group.hopeless:
            return
        for sample in group.in_state(State.WAITING, State.LEASED, State.STORED):
            self._drop(sample.key, "short_group")

    def _drop(self, key: TaskKey, reason: str) -> None:
        evaluation = self.state.evaluations.get(key.evaluation)
        self._write(sample_dropped=log_pb2.SampleDropped(task_key=encode_key(key), reason=reason))
        metrics.TRAJECTORIES_DROPPED.labels(reason).inc()
        if evaluation:
            self._end_if_done(evaluation)
        else:
            self._review(key.ordinal)


def encode_key(key: TaskKey) -> common_pb2.TaskKey:
    """A task key as a message."""
    return common_pb2.TaskKey(ordinal=key.ordinal, sample_index=key.sample_index)
