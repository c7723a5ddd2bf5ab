"""The account of evaluations: which versions were evaluated, and by whose tokens."""

from learner.audit.samples import Samples, evaluation_of, name
from learner.audit.trainers import Trainers
from learner.audit.violations import Rule, Violations
from understudy.v1 import log_pb2


class Evaluations:
    """Evaluations by number. Their samples are in the account of samples."""

    def __init__(self, samples: Samples, trainers: Trainers, violations: Violations) -> None:
        self.issued: dict[int, log_pb2.EvaluationIssued] = {}
        self._samples = samples
        self._trainers = trainers
        self._violations = violations

    def on_evaluation_issued(self, event: log_pb2.EvaluationIssued) -> None:
        """The newest version is to be evaluated."""
        if event.number != len(self.issued) + 1:
            self._add(f"evaluation {event.number}, where {len(self.issued) + 1} was next")
        if not event.num_tasks:
            self._add(f"evaluation {event.number} has no task")
        newest = (self._trainers.num_versions, self._trainers.newest_step)
        if (event.version, event.step) != newest:
            self._add(
                f"evaluation {event.number} is of version {event.version}, step {event.step}; "
                f"newest is version {newest[0]}, step {newest[1]}"
            )
        self.issued.setdefault(event.number, event)
        self._samples.on_evaluation_issued(event)

    def on_trajectory_stored(self, event: log_pb2.TrajectoryStored) -> None:
        """What is evaluated was sampled by the version in question, or by later ones."""
        issued = self.issued.get(evaluation_of(event.task_key))
        summary = event.summary
        if not issued or not summary.HasField("oldest_version"):
            return
        if summary.oldest_version < issued.version:
            what = f"{name(event.task_key)} is of version {issued.version}, but was sampled by"
            self._add(f"{what} {summary.oldest_version}")

    def _add(self, what: str) -> None:
        self._violations.add(Rule.EVALUATION, what)
