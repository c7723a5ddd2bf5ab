"""What a run's log adds up to: the state that its entries lead to, one after another.

    issue -> WAITING -> LEASED -> STORED -> ASSIGNED <-> TRAINED
                ^          |         |
                +----------+         +-> DROPPED{reason}, from WAITING and LEASED too:
             expired, failed             failed, stale, short_group, uniform_group, abandoned,
                                         or the reason of a refused record

    evaluation: WAITING <-> LEASED -> EVALUATED, or DROPPED{failed, abandoned, reason of a record}

Plain and synchronous. The ledger decides what happens, writes it to the log and applies it here; a
start applies what the log has. Both go the same way, so that a restart changes nothing.
"""

import bisect
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from learner.intake.admission import Admission
from learner.intake.batches import Batch, batch_of
from learner.intake.curriculum import Curriculum
from learner.intake.evaluations import ABANDONED, Evaluation, evaluation_of, first_key
from learner.intake.leases import Leases
from learner.intake.tasks import Balance, Counts, Group, Sample, State, TaskKey, balance_of
from learner.log.segments import Location
from understudy.config import TasksConfig
from understudy.errors import ConfigError
from understudy.v1 import common_pb2, log_pb2


class RunState:
    """Every task key of a run in exactly one state, and what goes with it.

    Args:
        tasks: what is played.
        steps: steps of the run.
        clock: seconds; leases that the log holds begin anew when they are applied.
    """

    def __init__(
        self, tasks: TasksConfig, steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.tasks = tasks
        self.admission = Admission(tasks=tasks, steps=steps)
        self.leases = Leases(tasks.lease_seconds)
        self.epoch = 0
        """Newest intake's."""
        self.trainer_epoch = 0
        """Newest trainer's."""
        self.steps_behind: list[int] = []
        """Steps behind each version, from version 1 on."""
        self.num_groups = 0
        self.num_closed = 0
        """Batches closed; also the step whose batch comes next."""
        self.ended = False
        """The newest batch is the run's last, and no trainer has started since."""
        self.num_completed = 0
        """Steps taken by the present trainer's policy."""
        self.ledger_digests: list[bytes] = [b""]
        """By step: SHA-256 over all batches before it, as BatchHeader tells it."""
        self.checkpoint_step = 0
        """Steps behind the newest checkpoint."""
        self.oldest_step = 0
        """Steps behind the oldest checkpoint that is kept: batches from it on are held."""
        self.waiting: list[Sample] = []
        """Samples that nobody plays, by task key: the oldest group is the most urgent."""
        self.open: dict[int, Group] = {}
        """Groups that are in no batch, by ordinal, in order of issue."""
        self.batches: dict[int, Batch] = {}
        """Closed batches by step."""
        self.num_evaluations = 0
        self.evaluations: dict[int, Evaluation] = {}
        """Evaluations with samples that still need a trajectory, by number."""
        self.evaluated_steps: set[int] = set()
        """Steps behind the versions of all evaluations, but for those that were abandoned."""
        self.heldout: list[Sample] = []
        """Samples of evaluations that nobody plays, by task key: the oldest evaluation first."""
        self.curriculum = Curriculum(tasks)
        self._groups: dict[int, Sequence[Group]] = {}
        self._clock = clock
        self._num_issued = 0
        self._counts: Counts = Counter()
        self._time_us = 0

    def apply(self, entry: log_pb2.LogEntry, location: Location) -> None:
        """Take an entry of the log that stands at a location."""
        event = entry.WhichOneof("event") or ""
        self._time_us = entry.time_us
        if handler := _HANDLERS.get(event):
            handler(self, getattr(entry, event), location)

    def recover(self, entry: log_pb2.LogEntry, location: Location) -> None:
        """Take an entry of a log that may be damaged.

        Raises:
            ConfigError: it builds on entries that are missing.
        """
        try:
            self.apply(entry, location)
        except (AssertionError, LookupError) as error:
            raise ConfigError(
                f"the log is damaged: entry {entry.index}, at {location.offset} of segment "
                f"{location.segment}, does not follow from those before it; see what understudy "
                "audit says, and restore the log from a copy or begin a new run"
            ) from error

    # Questions.

    def pending(self, key: TaskKey) -> Sample | None:
        """The sample of a known task key if it still needs a trajectory."""
        sample = self._find(key)
        return sample if sample and sample.pending else None

    def _find(self, key: TaskKey) -> Sample | None:
        """The sample of a known task key; None if its group or its evaluation is closed."""
        if key.evaluation:
            evaluation = self.evaluations.get(key.evaluation)
            first = first_key(key.evaluation).ordinal
            return evaluation.samples[key.ordinal - first] if evaluation else None
        group = self.open.get(key.ordinal)
        return group.samples[key.sample_index] if group else None

    def balance(self) -> Balance:
        """Count every task key that was ever issued."""
        return balance_of(self._num_issued, self._counts)

    def versions_of(self, batch: Batch) -> dict[int, int]:
        """Steps behind each version that may have sampled a token of a batch."""
        oldest = batch.step - max((item.staleness for item in batch.items), default=0)
        known = enumerate(self.steps_behind[: batch.head_version], 1)
        return {version: step for version, step in known if step >= oldest}

    def oldest_segment(self) -> int | None:
        """Oldest log segment with a trajectory that may still be asked for; None without any."""
        stored = (s.location for group in self.open.values() for s in group.in_state(State.STORED))
        assigned = (item.location for batch in self.batches.values() for item in batch.episodes)
        locations = itertools.chain(stored, assigned)
        return min((location.segment for location in locations if location), default=None)

    # Epochs and versions.

    def _on_intake_started(self, event: log_pb2.IntakeStarted, _: Location) -> None:
        self.epoch = event.epoch

    def _on_trainer_started(self, event: log_pb2.TrainerStarted, _: Location) -> None:
        self.trainer_epoch = event.epoch
        self.ended = False
        self.admission = replace(self.admission, first_version=len(self.steps_behind) + 1)
        for step in range(event.step, self.num_completed):
            self._move(self._groups[step], State.TRAINED, State.ASSIGNED)
        # A checkpoint may be ahead of what was told, or of one that was started from meanwhile.
        for step in range(self.num_completed, event.step):
            self._move(self._groups[step], State.ASSIGNED, State.TRAINED)
        self.num_completed = event.step

    def _on_version_published(self, event: log_pb2.VersionPublished, _: Location) -> None:
        self.steps_behind.append(event.step)
        self.admission = self.admission.advanced(event.version, event.step)

    # Samples.

    def _on_group_issued(self, event: log_pb2.GroupIssued, _: Location) -> None:
        samples = [Sample(key=TaskKey(event.ordinal, i)) for i in range(event.num_samples)]
        task = event.task_ordinal if event.HasField("task_ordinal") else None
        self.open[event.ordinal] = Group(ordinal=event.ordinal, samples=samples, task_ordinal=task)
        if task is not None:
            self.curriculum.issued(task)
        self.waiting += samples
        self.num_groups = event.ordinal + 1
        self._num_issued += len(samples)
        self._counts[State.WAITING, ""] += len(samples)

    def _on_evaluation_issued(self, event: log_pb2.EvaluationIssued, _: Location) -> None:
        evaluation = evaluation_of(event, self._time_us)
        self.evaluations[event.number] = evaluation
        self.heldout += evaluation.samples
        self.num_evaluations = event.number
        self.evaluated_steps.add(event.step)
        self._num_issued += len(evaluation.samples)
        self._counts[State.WAITING, ""] += len(evaluation.samples)

    def _on_sample_leased(self, event: log_pb2.SampleLeased, _: Location) -> None:
        sample = self._sample(event.task_key)
        self._withdraw(sample)
        self.leases.add(event.lease_id, sample, event.actor_id, self._clock())
        sample.lease_id = event.lease_id
        self._set(sample, State.LEASED)

    def _on_sample_returned(self, event: log_pb2.SampleReturned, _: Location) -> None:
        sample = self._sample(event.task_key)
        self._withdraw(sample)
        sample.num_failures += event.failed
        self._set(sample, State.WAITING)
        bisect.insort(self._queue(sample), sample, key=_key)

    def _on_trajectory_stored(self, event: log_pb2.TrajectoryStored, location: Location) -> None:
        sample = self._sample(event.task_key)
        self._withdraw(sample)
        sample.packed_summary = event.summary.SerializeToString()
        sample.location = location
        self._set(sample, State.EVALUATED if sample.key.evaluation else State.STORED)
        if sample.key.evaluation:
            self._end_heldout(sample.key.evaluation)

    def _on_sample_dropped(self, event: log_pb2.SampleDropped, _: Location) -> None:
        sample = self._sample(event.task_key)
        self._withdraw(sample)
        self._set(sample, State.DROPPED, event.reason)
        if number := sample.key.evaluation:
            if event.reason == ABANDONED:
                self.evaluated_steps.discard(self.evaluations[number].step)
            self._end_heldout(number)
        elif self.open[sample.key.ordinal].ended:
            del self.open[sample.key.ordinal]

    def _end_heldout(self, number: int) -> None:
        """A sample of an evaluation has ended; let go of one of which nothing is left to play."""
        self.evaluations[number].num_pending -= 1
        if not self.evaluations[number].num_pending:
            del self.evaluations[number]

    def _sample(self, key: common_pb2.TaskKey) -> Sample:
        sample = self._find(TaskKey(key.ordinal, key.sample_index))
        assert sample
        return sample

    def _queue(self, sample: Sample) -> list[Sample]:
        """Where a sample waits."""
        return self.heldout if sample.key.evaluation else self.waiting

    def _withdraw(self, sample: Sample) -> None:
        """Nobody is to play a sample any more."""
        if sample.state is State.LEASED:
            self.leases.remove(sample.lease_id)
            sample.lease_id = 0
        elif sample.state is State.WAITING:
            queue = self._queue(sample)
            del queue[bisect.bisect_left(queue, sample.key, key=_key)]

    # Batches.

    def _on_batch_assigned(self, event: log_pb2.BatchAssigned, _: Location) -> None:
        groups = [self.open.pop(assigned.ordinal) for assigned in event.groups]
        self.batches[event.step] = batch_of(event, groups)
        for group in groups:
            if group.task_ordinal is not None:
                self.curriculum.ended(group.task_ordinal, group.reward_mean)
        self._groups[event.step] = groups
        for group, assigned in zip(groups, event.groups, strict=True):
            if assigned.uniform and not event.keeps_uniform:
                for sample in group.in_state(State.STORED):
                    self._set(sample, State.DROPPED, "uniform_group")
        self._move(groups, State.STORED, State.ASSIGNED)
        self.num_closed = event.step + 1
        self.ended = event.last
        written = event.SerializeToString(deterministic=True)
        self.ledger_digests.append(hashlib.sha256(self.ledger_digests[-1] + written).digest())

    def _on_step_completed(self, event: log_pb2.StepCompleted, _: Location) -> None:
        self._move(self._groups[event.step], State.ASSIGNED, State.TRAINED)
        self.num_completed = event.step + 1

    def _on_checkpoint_saved(self, event: log_pb2.CheckpointSaved, _: Location) -> None:
        self.checkpoint_step = event.step
        for step in range(self.oldest_step, event.oldest_kept_step):
            del self.batches[step], self._groups[step]
        self.oldest_step = max(self.oldest_step, event.oldest_kept_step)

    def _move(self, groups: Iterable[Group], source: State, target: State) -> None:
        for group in groups:
            for sample in group.in_state(source):
                self._set(sample, target)

    def _set(self, sample: Sample, state: State, reason: str = "") -> None:
        """The one place where a sample's state changes once it was issued."""
        self._counts[sample.state, sample.reason] -= 1
        sample.state, sample.reason = state, reason
        self._counts[state, reason] += 1


def _key(sample: Sample) -> TaskKey:
    return sample.key


_HANDLERS: dict[str, Callable[[RunState, object, Location], None]] = {
    name.removeprefix("_on_"): handler
    for name, handler in vars(RunState).items()
    if name.startswith("_on_")
}
