"""The rules of a log, and where they are broken."""

import enum
from dataclasses import dataclass
from typing import NamedTuple

MAX_LISTED = 1000
"""Violations that are kept; later ones are counted only."""


class Rule(enum.StrEnum):
    """What must hold. One damaged entry may break several."""

    DAMAGE = "damage"
    """Every byte of the log belongs to a sound entry of a known event; no entry is missing."""
    SEGMENT = "segment"
    """Segments begin with their number and run, and end with a seal that fits."""
    ISSUE = "issue"
    """Groups are issued once each, with contiguous ordinals."""
    LEASE = "lease"
    """Only a waiting sample is leased, only a leased one returned; lease ids rise."""
    STORE = "store"
    """A sample that waits or is leased is stored, once."""
    DROP = "drop"
    """A sample that is in no batch is dropped, once, for a reason."""
    BATCH = "batch"
    """Batches are contiguous and hold whole groups of stored samples with their rewards."""
    TWICE = "twice"
    """No sample is in two batches, and no step is taken twice by one trainer."""
    STEP = "step"
    """Steps are completed in order, by the present trainer."""
    TRAINER = "trainer"
    """Trainer epochs rise; a trainer starts between the oldest checkpoint and the last step."""
    VERSION = "version"
    """Policy versions are contiguous from 1 and used once."""
    EVALUATION = "evaluation"
    """Evaluations are contiguous from 1, of the newest version then, and played by no older one."""
    CHECKPOINT = "checkpoint"
    """Checkpoints have completed steps behind them, and learned from the log's batches."""
    INTAKE = "intake"
    """Intake epochs rise; an incarnation ends with the intake that gave it."""
    GAP = "gap"
    """The records of an incarnation are answered from 0 on, none left out."""
    ANSWER = "answer"
    """A record is answered once, and as a duplicate only if its sample needs no trajectory."""
    DIGEST = "digest"
    """A stored payload has the SHA-256 that its record declared."""
    TRIM = "trim"
    """No payload is trimmed that a kept checkpoint may ask for."""


class Place(NamedTuple):
    """Where an entry stands."""

    entry: int
    """The entry's number, its index; -1 for bytes that are no entry."""
    segment: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A rule that does not hold."""

    rule: Rule
    what: str
    place: Place | None
    """None for what concerns no entry, a checkpoint's manifest for example."""

    def __str__(self) -> str:
        if self.place is None:
            return f"[{self.rule}] {self.what}"
        entry = f"entry {self.place.entry}, " if self.place.entry >= 0 else ""
        where = f"{entry}segment {self.place.segment}, offset {self.place.offset}"
        return f"{where}: [{self.rule}] {self.what}"


class Violations:
    """Takes what the accounts find, at the entry that is being looked at."""

    def __init__(self) -> None:
        self.place: Place | None = None
        """The entry that is being looked at."""
        self.listed: list[Violation] = []
        self.number = 0
        """All of them, those that are not listed included."""

    def add(self, rule: Rule, what: str) -> None:
        """A rule is broken."""
        self.number += 1
        if self.number <= MAX_LISTED:
            self.listed.append(Violation(rule=rule, what=what, place=self.place))
