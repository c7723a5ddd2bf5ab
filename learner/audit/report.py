"""What an audit found, for programs and for people."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from learner.audit.samples import STATES
from learner.audit.violations import Violation

_MAX_LINES = 50
"""Violations, and conflicts, that people are shown."""


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """An audit's result. Example: issued 16 = waiting 0 + leased 2 + ... + dropped 4."""

    run_id: str
    issued: int
    """Task keys ever issued."""
    states: Mapping[str, int]
    """Task keys by state."""
    dropped: Mapping[str, int]
    """Dropped task keys by reason."""
    trained_twice: int
    """Task keys in two batches, or of a step that one trainer took twice."""
    records: int
    """Records that were answered, stored ones included."""
    duplicates: int
    """Records of samples that needed no trajectory any more. No fault."""
    conflicts: int
    """Records whose origin another record had before. Kept in the log; no fault of it."""
    conflicting: tuple[str, ...]
    """The first of these records."""
    gaps: int
    """Sequence numbers of records that were never answered, though later ones were."""
    verified_payloads: int
    trimmed_payloads: int
    entries: int
    segments: int
    log_bytes: int
    """Without the torn tail."""
    torn_bytes: int
    """Of an unfinished write at the end. No fault: nothing there was acked."""
    quarantined_ranges: int
    quarantined_bytes: int
    missing_entries: int
    steps_assigned: int
    steps_completed: int
    groups: int
    """Groups of all batches."""
    uniform_groups: int
    """Those whose rewards are all equal."""
    versions: int
    evaluations: int
    intake_epoch: int
    trainer_epoch: int
    checkpoints: int
    """Checkpoints whose manifest agrees with the log."""
    ledger_digest: str
    """SHA-256 chain over all batches, in hexadecimal; empty without any."""
    num_violations: int
    violations: tuple[Violation, ...]
    """The first of them."""

    @property
    def balanced(self) -> bool:
        """Whether every issued task key is in one state, and every dropped one has a reason."""
        in_reasons = sum(self.dropped.values())
        return (self.issued, self.states["dropped"]) == (sum(self.states.values()), in_reasons)

    @property
    def passed(self) -> bool:
        """Whether the log balances and breaks no rule."""
        return self.balanced and not self.num_violations

    def as_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        violations = [
            {
                "rule": str(violation.rule),
                "what": violation.what,
                **(violation.place._asdict() if violation.place else {}),
            }
            for violation in self.violations
        ]
        verdict = {"passed": self.passed, "balanced": self.balanced}
        return {
            **verdict,
            **values,
            "states": {name: self.states.get(name, 0) for name in STATES},
            "violations": violations,
        }

    def __str__(self) -> str:
        lines = [
            f"run {self.run_id}: {'PASSED' if self.passed else 'FAILED'}",
            f"  {self._balance()}",
            f"  dropped: {_join(self.dropped)}",
            f"  records: {self.records} answered, {self.duplicates} duplicates, {self.conflicts} "
            f"conflicts, {self.gaps} sequence numbers left out",
            f"  payloads: {self.verified_payloads} verified, {self.trimmed_payloads} trimmed; "
            f"{self.trained_twice} task keys trained twice",
            f"  log: {self.entries} entries, {self.segments} segments, {self.log_bytes} bytes",
            f"  quarantined: {self.quarantined_bytes} bytes in {self.quarantined_ranges} ranges, "
            f"{self.missing_entries} entries missing; torn tail: {self.torn_bytes} bytes",
            f"  steps: {self.steps_assigned} assigned, {self.steps_completed} completed; "
            f"{self.versions} versions; {self.checkpoints} checkpoints agree",
            f"  batches: {self.groups} groups, {self.uniform_groups} of them uniform; "
            f"{self.evaluations} evaluations",
            f"  epochs: intake {self.intake_epoch}, trainer {self.trainer_epoch}",
            f"  ledger digest: {self.ledger_digest or '(no batch)'}",
            *_section("conflicts", self.conflicting, self.conflicts),
            *_section("violations", self.violations, self.num_violations),
        ]
        return "\n".join(lines)

    def _balance(self) -> str:
        terms = " + ".join(f"{name} {self.states.get(name, 0)}" for name in STATES)
        return f"issued {self.issued} {'=' if self.balanced else '!='} {terms}"


def _join(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items()) or "none"


def _section(title: str, items: tuple[object, ...], number: int) -> list[str]:
    """A titled list; nothing if it is empty."""
    if not number:
        return []
    shown = [f"    {item}" for item in items[:_MAX_LINES]]
    rest = number - len(shown)
    return [f"  {title}: {number}", *shown, *([f"    and {rest} more"] if rest else [])]
