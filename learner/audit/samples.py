"""The account of samples: every task key that was issued, in one state.

    WAITING <-> LEASED -> STORED -> ASSIGNED <-> TRAINED
       |           |         |         |
       +-----------+---------+---------+-> DROPPED
                   +-> EVALUATED, of an evaluation's

Arrays only, about 10 bytes a task key, so that runs of any length can be audited.
"""

from array import array

from learner.audit.violations import Rule, Violations
from understudy.v1 import common_pb2, log_pb2

WAITING, LEASED, STORED, ASSIGNED, TRAINED, EVALUATED, DROPPED = range(7)
STATES = ("waiting", "leased", "stored", "assigned", "trained", "evaluated", "dropped")
"""Names of the states, by their numbers; in the order of the balance."""

EVALUATION_ORDINALS = 2**32
"""Evaluation n has the ordinals from n times this on."""
_NO_BATCH = -1


class Samples:
    """All task keys. A key's number is its place in the order of issue."""

    def __init__(self, violations: Violations) -> None:
        self.states = bytearray()
        self.rewards = array("f")
        """By key; as the environment gave them, 0 before a trajectory is stored."""
        self.steps = array("q")
        """By group: step of the batch that it is in, else -1."""
        self.reasons = [""]
        self._first_keys = array("Q")
        """By group."""
        self._sizes = array("I")
        """By group: number of samples."""
        self._evaluations: dict[int, range] = {}
        """Keys of evaluations, by number."""
        self._reasons = array("I")
        self._violations = violations
        self._last_lease = 0

    @property
    def num_groups(self) -> int:
        """Groups that were issued."""
        return len(self.steps)

    def group(self, ordinal: int) -> range:
        """Keys of a group that was issued."""
        first = self._first_keys[ordinal]
        return range(first, first + self._sizes[ordinal])

    def find(self, task_key: common_pb2.TaskKey) -> int | None:
        """The key of a sample; None if it was never issued."""
        if number := evaluation_of(task_key):
            index = task_key.ordinal % EVALUATION_ORDINALS
            keys = self._evaluations.get(number, range(0))
            return keys[index] if index < len(keys) and not task_key.sample_index else None
        if task_key.ordinal >= self.num_groups:
            return None
        keys = self.group(task_key.ordinal)
        return keys[task_key.sample_index] if task_key.sample_index < len(keys) else None

    def is_pending(self, key: int) -> bool:
        """Whether a sample still needs a trajectory."""
        return self.states[key] in (WAITING, LEASED)

    def step_of(self, ordinal: int) -> int | None:
        """Step of the batch that an issued group is in; evaluations are in none."""
        step = self.steps[ordinal] if ordinal < EVALUATION_ORDINALS else _NO_BATCH
        return None if step == _NO_BATCH else step

    def reason_of(self, key: int) -> str:
        """Why a sample was dropped; empty unless it was."""
        return self.reasons[self._reasons[key]]

    def count(self) -> dict[str, int]:
        """Task keys by the name of their state."""
        return {name: self.states.count(state) for state, name in enumerate(STATES)}

    def count_dropped(self) -> dict[str, int]:
        """Dropped task keys by reason, most frequent first."""
        numbers = [0] * len(self.reasons)
        for index in self._reasons:
            numbers[index] += 1
        counted = zip(self.reasons[1:], numbers[1:], strict=True)
        return dict(sorted(counted, key=lambda item: -item[1]))

    def drop(self, key: int, reason: str) -> None:
        """A sample is given up."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.states[key] = DROPPED
        self._reasons[key] = self.reasons.index(reason)

    # Events.

    def on_group_issued(self, event: log_pb2.GroupIssued) -> None:
        """New samples wait."""
        if event.ordinal != self.num_groups:
            self._violations.add(
                Rule.ISSUE, f"group {event.ordinal}, where {self.num_groups} was next"
            )
            if event.ordinal < self.num_groups:
                return
        self._issue(event.ordinal - self.num_groups, event.num_samples)

    def _issue(self, num_skipped: int, num_samples: int) -> None:
        """Groups that were skipped have no samples."""
        self.steps.extend([_NO_BATCH] * (num_skipped + 1))
        self._first_keys.extend([len(self.states)] * (num_skipped + 1))
        self._sizes.extend([0] * num_skipped + [num_samples])
        self._add_keys(num_samples)

    def on_evaluation_issued(self, event: log_pb2.EvaluationIssued) -> None:
        """New samples of an evaluation wait."""
        if event.number not in self._evaluations:
            self._evaluations[event.number] = self._add_keys(event.num_tasks)

    def _add_keys(self, number: int) -> range:
        first = len(self.states)
        self.states.extend(bytes([WAITING]) * number)
        self.rewards.extend([0.0] * number)
        self._reasons.extend([0] * number)
        return range(first, first + number)

    def on_sample_leased(self, event: log_pb2.SampleLeased) -> None:
        """A waiting sample goes to an actor."""
        if event.lease_id <= self._last_lease:
            self._violations.add(
                Rule.LEASE, f"lease {event.lease_id} after lease {self._last_lease}"
            )
        self._last_lease = max(self._last_lease, event.lease_id)
        self._move(event.task_key, (WAITING,), LEASED, Rule.LEASE)

    def on_sample_returned(self, event: log_pb2.SampleReturned) -> None:
        """A leased sample waits again."""
        self._move(event.task_key, (LEASED,), WAITING, Rule.LEASE)

    def on_trajectory_stored(self, event: log_pb2.TrajectoryStored) -> None:
        """A sample has its trajectory."""
        target = EVALUATED if evaluation_of(event.task_key) else STORED
        key = self._move(event.task_key, (WAITING, LEASED), target, Rule.STORE)
        if key is not None:
            self.rewards[key] = event.summary.reward

    def on_sample_dropped(self, event: log_pb2.SampleDropped) -> None:
        """A sample is given up."""
        if not event.reason:
            self._violations.add(Rule.DROP, f"{name(event.task_key)} without a reason")
        key = self._move(event.task_key, (WAITING, LEASED, STORED), DROPPED, Rule.DROP)
        if key is not None:
            self.drop(key, event.reason)

    def _move(
        self, task_key: common_pb2.TaskKey, sources: tuple[int, ...], target: int, rule: Rule
    ) -> int | None:
        """Move a sample to a state and return its key; None if it must not go there."""
        key = self.find(task_key)
        if key is None:
            self._violations.add(rule, f"{name(task_key)} was never issued")
            return None
        state = self.states[key]
        if state not in sources:
            self._violations.add(
                rule, f"{name(task_key)} becomes {STATES[target]}, but is {STATES[state]}"
            )
            return None
        self.states[key] = target
        return key


def evaluation_of(task_key: common_pb2.TaskKey) -> int:
    """Number of the evaluation that a task key is of; 0 if it is trained on."""
    return task_key.ordinal // EVALUATION_ORDINALS


def name(task_key: common_pb2.TaskKey) -> str:
    """A task key for people."""
    return f"task key ({task_key.ordinal}, {task_key.sample_index})"
