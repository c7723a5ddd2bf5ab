"""Task keys: their states, their groups, and the balance over them."""

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from learner.log.segments import Location
from understudy.v1.log_pb2 import EpisodeSummary


class State(enum.Enum):
    """Where a task key is.

    A key is issued into WAITING. DROPPED and EVALUATED are ends, and TRAINED becomes one once a
    checkpoint has it behind itself: a trainer that starts from an older one takes it back to
    ASSIGNED. Keys of evaluations go from LEASED to EVALUATED, and are in no other state of these.
    """

    WAITING = "waiting"
    LEASED = "leased"
    STORED = "stored"
    ASSIGNED = "assigned"
    TRAINED = "trained"
    EVALUATED = "evaluated"
    DROPPED = "dropped"


EVALUATION_ORDINALS = 2**32
"""Evaluation n, counted from 1, has the ordinals from n times this on: what is trained on, and in
which order, does not depend on evaluations."""


class TaskKey(NamedTuple):
    """One sample of one task, for example the third of the run's ninth task: (8, 2)."""

    ordinal: int
    sample_index: int

    @property
    def evaluation(self) -> int:
        """Number of the evaluation that the task is of; 0 if it is trained on."""
        return self.ordinal // EVALUATION_ORDINALS


class Task(NamedTuple):
    """A task of a suite, for example ("practice", "train", 8)."""

    suite: str
    split: str
    ordinal: int


@dataclass(kw_only=True, slots=True, eq=False)
class Sample:
    """One task key and its state."""

    key: TaskKey
    state: State = State.WAITING
    num_failures: int = 0
    lease_id: int = 0
    """Lease that it is played under; 0 if it is not LEASED."""
    reason: str = ""
    """Why it was dropped."""
    packed_summary: bytes | None = None
    """Its trajectory in numbers; set from STORED on, and where it is EVALUATED. Packed, since a
    part of a message keeps all of it in memory: 0.4 KB a sample rather than 1.6."""
    location: Location | None = None
    """Where the log has its trajectory; set from STORED on, and where it is EVALUATED."""

    @property
    def summary(self) -> EpisodeSummary | None:
        """Its trajectory in numbers, read anew each time."""
        packed = self.packed_summary
        return None if packed is None else EpisodeSummary.FromString(packed)

    @property
    def pending(self) -> bool:
        """It still needs a trajectory."""
        return self.state in (State.WAITING, State.LEASED)


@dataclass(kw_only=True, slots=True, eq=False)
class Group:
    """The samples of one task."""

    ordinal: int
    samples: list[Sample] = field(default_factory=list)
    task_ordinal: int | None = None
    """Ordinal of its task in the split; None if the log is too old to say."""

    def in_state(self, *states: State) -> list[Sample]:
        """Samples in one of the states, by sample index."""
        return [sample for sample in self.samples if sample.state in states]

    @property
    def complete(self) -> bool:
        """Every sample has ended, and at least two have a trajectory."""
        pending = any(sample.pending for sample in self.samples)
        return not pending and len(self.in_state(State.STORED)) >= 2

    @property
    def reward_mean(self) -> float:
        """Mean reward of the samples that are stored, as the environment gave it; 0 without any."""
        summaries = [sample.summary for sample in self.in_state(State.STORED)]
        rewards = [summary.reward for summary in summaries if summary]
        return sum(rewards) / max(len(rewards), 1)

    @property
    def ended(self) -> bool:
        """No sample is needed any more."""
        return len(self.in_state(State.DROPPED)) == len(self.samples)

    @property
    def hopeless(self) -> bool:
        """Fewer than two samples can still have a trajectory: nothing to compare."""
        return len(self.in_state(State.WAITING, State.LEASED, State.STORED)) < 2


@dataclass(frozen=True, kw_only=True)
class Balance:
    """The accounts: every task key that was issued is in exactly one state."""

    issued: int
    """Task keys ever issued, counted at issue and not from the states."""
    states: Mapping[State, int]
    dropped: Mapping[str, int]
    """Dropped task keys by reason."""

    @property
    def holds(self) -> bool:
        """issued = waiting + leased + stored + assigned + trained + evaluated + dropped{reason}."""
        in_reasons = sum(self.dropped.values())
        return (self.issued, self.states[State.DROPPED]) == (sum(self.states.values()), in_reasons)

    def figures(self) -> dict[str, int]:
        """All figures by name."""
        return {"issued": self.issued, **{state.value: self.states[state] for state in State}}


Counts = Counter[tuple[State, str]]
"""Task keys by state and, if they were dropped, reason."""


def balance_of(issued: int, counts: Counts) -> Balance:
    """The accounts as counted by state and reason."""
    states = dict.fromkeys(State, 0)
    dropped: Counter[str] = Counter()
    for (state, reason), number in counts.items():
        states[state] += number
        if state is State.DROPPED and number:
            dropped[reason] += number
    return Balance(issued=issued, states=states, dropped=dropped)
