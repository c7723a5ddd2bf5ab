"""The account of trainers: epochs, steps, versions, checkpoints."""

from learner.audit.batches import Batches
from learner.audit.samples import ASSIGNED, TRAINED
from learner.audit.violations import Rule, Violations
from understudy.v1 import log_pb2


class Trainers:
    """What the trainers of a run did, one after another."""

    def __init__(self, batches: Batches, violations: Violations) -> None:
        self.epoch = 0
        """The present trainer's."""
        self.num_completed = 0
        """Steps behind the present trainer's weights."""
        self.num_versions = 0
        """Also the newest version."""
        self.newest_step = 0
        """Steps behind that version."""
        self.oldest_kept_step = 0
        """Steps behind the oldest checkpoint that is kept."""
        self.num_twice = 0
        """Task keys of steps that one trainer took twice."""
        self._batches = batches
        self._violations = violations

    def on_trainer_started(self, event: log_pb2.TrainerStarted) -> None:
        """Steps from the trainer's on are assigned, but not trained; those below are trained."""
        if event.epoch <= self.epoch:
            self._violations.add(Rule.TRAINER, f"epoch {event.epoch} after epoch {self.epoch}")
        if not self.oldest_kept_step <= event.step <= self._batches.next_step:
            self._violations.add(
                Rule.TRAINER,
                f"start at step {event.step}; kept is {self.oldest_kept_step}, assigned are "
                f"{self._batches.next_step}",
            )
        self.epoch = max(self.epoch, event.epoch)
        for step in range(event.step, self.num_completed):
            self._batches.move(step, TRAINED, ASSIGNED)
        for step in range(self.num_completed, min(event.step, self._batches.next_step)):
            self._batches.move(step, ASSIGNED, TRAINED)
        self.num_completed = min(event.step, self._batches.next_step)

    def on_step_completed(self, event: log_pb2.StepCompleted) -> None:
        """A batch was trained."""
        if event.epoch != self.epoch:
            self._violations.add(
                Rule.STEP, f"step {event.step} by epoch {event.epoch}; present is {self.epoch}"
            )
        if event.step < self.num_completed:
            self.num_twice += self._batches.move(event.step, TRAINED, TRAINED)
            what = f"step {event.step} is taken twice; {self.num_completed} was next"
            self._violations.add(Rule.TWICE, what)
            return
        if event.step >= self._batches.next_step:
            self._violations.add(Rule.STEP, f"step {event.step} was never assigned")
            return
        if event.step > self.num_completed:
            what = f"step {event.step}, where {self.num_completed} was next"
            self._violations.add(Rule.STEP, what)
        self._batches.move(event.step, ASSIGNED, TRAINED)
        self.num_completed = event.step + 1

    def on_version_published(self, event: log_pb2.VersionPublished) -> None:
        """A version of the policy."""
        if event.version != self.num_versions + 1:
            what = f"version {event.version}, where {self.num_versions + 1} was next"
            self._violations.add(Rule.VERSION, what)
        if event.epoch > self.epoch:
            what = f"version {event.version} by epoch {event.epoch}, which never started"
            self._violations.add(Rule.VERSION, what)
        if event.step > self._batches.next_step:
            what = f"version {event.version} of step {event.step}, which was never assigned"
            self._violations.add(Rule.VERSION, what)
        if event.version > self.num_versions:
            self.num_versions, self.newest_step = event.version, event.step

    def on_trajectory_stored(self, event: log_pb2.TrajectoryStored) -> None:
        """Tokens come from versions that were published."""
        summary = event.summary
        if summary.HasField("oldest_version") and not (
            1 <= summary.oldest_version <= self.num_versions
        ):
            what = f"sampled by version {summary.oldest_version}; newest is {self.num_versions}"
            self._violations.add(Rule.VERSION, what)

    def on_batch_assigned(self, event: log_pb2.BatchAssigned) -> None:
        """A batch names the newest version."""
        if event.head_version != self.num_versions:
            what = f"head_version {event.head_version}; newest is {self.num_versions}"
            self._violations.add(Rule.VERSION, what)

    def on_checkpoint_saved(self, event: log_pb2.CheckpointSaved) -> None:
        """A checkpoint is durable; what is older than the oldest one is needed no longer."""
        if event.epoch != self.epoch:
            self._violations.add(
                Rule.CHECKPOINT,
                f"step {event.step} by epoch {event.epoch}; present is {self.epoch}",
            )
        if not event.oldest_kept_step <= event.step <= self.num_completed:
            self._violations.add(
                Rule.CHECKPOINT,
                f"step {event.step}, oldest kept {event.oldest_kept_step}; completed are "
                f"{self.num_completed}",
            )
        self.oldest_kept_step = max(self.oldest_kept_step, event.oldest_kept_step)
