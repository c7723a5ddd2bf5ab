"""The account of records: what came over the wire, and what became of it.

The records of an incarnation are answered from 0 on, none left out: an actor forgets what is acked.
A conflict is the exception: it repeats a number that was answered before.
"""

from dataclasses import dataclass

from learner.audit.samples import Samples, name
from learner.audit.violations import Rule, Violations
from understudy.v1 import log_pb2

MAX_CONFLICTS = 1000
"""Conflicts that are listed; later ones are counted only."""


@dataclass(kw_only=True, slots=True)
class _Incarnation:
    actor_id: str
    intake_epoch: int
    next_sequence: int = 0


class Origins:
    """How far the records of each incarnation of each actor were answered."""

    def __init__(self, samples: Samples, violations: Violations) -> None:
        self.intake_epoch = 0
        self.num_answered = 0
        """Records, those that were stored included."""
        self.num_duplicates = 0
        self.num_conflicts = 0
        self.num_missing = 0
        """Sequence numbers that were left out."""
        self.conflicts: list[str] = []
        self._incarnations: dict[int, _Incarnation] = {}
        self._samples = samples
        self._violations = violations

    def require_intake(self, event: str) -> None:
        """Every event but its own start is some intake's."""
        if not self.intake_epoch and event != "intake_started":
            self._violations.add(Rule.INTAKE, f"{event} before any intake started")

    def on_intake_started(self, event: log_pb2.IntakeStarted) -> None:
        """What earlier intakes welcomed is fenced."""
        if event.epoch <= self.intake_epoch:
            what = f"epoch {event.epoch} after epoch {self.intake_epoch}"
            self._violations.add(Rule.INTAKE, what)
        self.intake_epoch = max(self.intake_epoch, event.epoch)

    def on_trajectory_stored(self, event: log_pb2.TrajectoryStored) -> None:
        """A record was stored."""
        self._answer(event.origin, log_pb2.ANSWER_UNSPECIFIED)

    def on_record_answered(self, event: log_pb2.RecordAnswered) -> None:
        """A record was not stored. Asked before the answer changes anything."""
        if event.answer == log_pb2.ANSWER_UNSPECIFIED:
            self._violations.add(Rule.ANSWER, f"{_name(event.origin)} without an answer")
        if event.answer == log_pb2.ANSWER_CONFLICT:
            self._add_conflict(event)
            return
        if event.answer == log_pb2.ANSWER_DUPLICATE:
            self.num_duplicates += 1
            key = self._samples.find(event.task_key)
            if key is None or self._samples.is_pending(key):
                what = f"{_name(event.origin)} is a duplicate, but {name(event.task_key)} has no"
                self._violations.add(Rule.ANSWER, f"{what} trajectory: an acked record is lost")
        self._answer(event.origin, event.answer)

    def _add_conflict(self, event: log_pb2.RecordAnswered) -> None:
        self.num_answered += 1
        self.num_conflicts += 1
        if self.num_conflicts <= MAX_CONFLICTS:
            self.conflicts.append(f"{_name(event.origin)} for {name(event.task_key)}")
        if event.origin.sequence >= self._incarnation(event.origin).next_sequence:
            what = f"{_name(event.origin)} conflicts with a record that was never answered"
            self._violations.add(Rule.ANSWER, what)

    def _answer(self, origin: log_pb2.RecordOrigin, answer: "log_pb2.Answer.ValueType") -> None:
        self.num_answered += 1
        incarnation = self._incarnation(origin)
        expected = incarnation.next_sequence
        if origin.sequence > expected:
            self.num_missing += origin.sequence - expected
            self._violations.add(Rule.GAP, f"{_name(origin)}, where {expected} was next")
        elif origin.sequence < expected and answer != log_pb2.ANSWER_DUPLICATE:
            self._violations.add(Rule.ANSWER, f"{_name(origin)} again; {expected} was next")
        incarnation.next_sequence = max(expected, origin.sequence + 1)

    def _incarnation(self, origin: log_pb2.RecordOrigin) -> _Incarnation:
        known = self._incarnations.get(origin.incarnation)
        if known is None:
            known = _Incarnation(actor_id=origin.actor_id, intake_epoch=self.intake_epoch)
            self._incarnations[origin.incarnation] = known
        if known.actor_id != origin.actor_id:
            what = f"incarnation {origin.incarnation} is of {known.actor_id!r} and"
            self._violations.add(Rule.INTAKE, f"{what} {origin.actor_id!r}")
        if known.intake_epoch != self.intake_epoch:
            what = f"{_name(origin)}: its intake's epoch was {known.intake_epoch}"
            self._violations.add(Rule.INTAKE, f"{what}; present is {self.intake_epoch}")
        return known


def _name(origin: log_pb2.RecordOrigin) -> str:
    return f"record {origin.sequence} of {origin.actor_id!r}, incarnation {origin.incarnation}"
