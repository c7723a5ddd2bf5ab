"""The account of batches: which samples each step learns from, once."""

import hashlib

import numpy as np

from learner.audit.samples import ASSIGNED, DROPPED, STATES, STORED, Samples
from learner.audit.violations import Rule, Violations
from understudy.v1 import log_pb2

_Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
_NONE: _Floats = np.zeros(0, np.float32)

UNIFORM = "uniform_group"
"""Reason under which the samples of a group without any difference in reward are dropped."""


class Batches:
    """Closed batches by step."""

    def __init__(self, samples: Samples, violations: Violations) -> None:
        self.next_step = 0
        """The step whose batch comes next."""
        self.digests: dict[int, bytes] = {0: b""}
        """By step: SHA-256 over all batches before it, each chained to those before."""
        self.num_groups = 0
        """Groups of all batches."""
        self.num_uniform = 0
        """Those whose rewards are all equal."""
        self.num_twice = 0
        """Task keys that came into a second batch."""
        self._ordinals: dict[int, tuple[int, ...]] = {}
        self._samples = samples
        self._violations = violations

    def keys(self, step: int) -> list[int]:
        """Keys of all samples of a step's groups, those that were dropped included."""
        ordinals = self._ordinals.get(step, ())
        return [key for ordinal in ordinals for key in self._samples.group(ordinal)]

    def move(self, step: int, source: int, target: int) -> int:
        """Move those samples of a batch that are in one state to another; returns how many."""
        keys = [key for key in self.keys(step) if self._samples.states[key] == source]
        for key in keys:
            self._samples.states[key] = target
        return len(keys)

    def on_batch_assigned(self, event: log_pb2.BatchAssigned) -> None:
        """The batch of a step is closed."""
        if event.step != self.next_step:
            self._add(f"step {event.step}, where {self.next_step} was next")
        fresh = [group for group in event.groups if self._take(event, group)]
        self.num_groups += len(fresh)
        self.num_uniform += sum(group.uniform for group in fresh)
        self._check_rewards(fresh)
        if event.step < self.next_step:
            return
        self._ordinals[event.step] = tuple(group.ordinal for group in fresh)
        before = self.digests.get(event.step, b"")  # not there: a batch is missing
        written = event.SerializeToString(deterministic=True)
        self.digests[event.step + 1] = hashlib.sha256(before + written).digest()
        self.next_step = event.step + 1

    def _take(self, event: log_pb2.BatchAssigned, group: log_pb2.AssignedGroup) -> bool:
        """Assign or drop the samples of a group; False if it must not be in this batch."""
        samples, step = self._samples, event.step
        if group.ordinal >= samples.num_groups:
            self._add(f"group {group.ordinal} was never issued")
            return False
        other = samples.step_of(group.ordinal)
        if other is not None:
            self.num_twice += len(group.sample_indices)
            what = f"group {group.ordinal} is in the batches of steps {other} and {step}"
            self._violations.add(Rule.TWICE, what)
            return False
        samples.steps[group.ordinal] = step
        self._check_members(group)
        self._check_uniform(group)
        for key in samples.group(group.ordinal):
            if samples.states[key] != STORED:
                continue
            if group.uniform and not event.keeps_uniform:
                samples.drop(key, UNIFORM)
            else:
                samples.states[key] = ASSIGNED
        return True

    def _check_members(self, group: log_pb2.AssignedGroup) -> None:
        """The samples are exactly those that are stored; all others of the group were dropped."""
        keys = self._samples.group(group.ordinal)
        states = [self._samples.states[key] for key in keys]
        stored = [index for index, state in enumerate(states) if state == STORED]
        if list(group.sample_indices) != stored or not stored:
            listed = list(group.sample_indices)
            self._add(f"group {group.ordinal} has samples {listed}; stored are {stored}")
        for index, state in enumerate(states):
            if state not in (STORED, DROPPED):
                self._add(f"group {group.ordinal}: sample {index} is {STATES[state]}")

    def _check_uniform(self, group: log_pb2.AssignedGroup) -> None:
        if len(group.rewards) != 4 * len(group.sample_indices):
            number = len(group.sample_indices)
            self._add(f"group {group.ordinal}: {len(group.rewards)} B of rewards, {number} samples")
            return
        rewards = _floats(group.rewards)
        if group.uniform != bool((rewards == rewards[:1]).all()):
            said = "uniform" if group.uniform else "not uniform"
            self._add(f"group {group.ordinal} is said to be {said}: {rewards.tolist()}")

    def _check_rewards(self, groups: list[log_pb2.AssignedGroup]) -> None:
        """The rewards of a batch are those that its samples were stored with, less what was taken
        off for their length. The control experiment permutes them within the batch."""
        whole = [group for group in groups if self._is_whole(group)]
        given = np.sort(_floats(b"".join(group.rewards for group in whole)))
        stored = np.sort(np.concatenate([_NONE, *(self._expected(group) for group in whole)]))
        if not np.array_equal(given, stored):
            self._add("its rewards are not those that its samples were stored with")

    def _is_whole(self, group: log_pb2.AssignedGroup) -> bool:
        """Whether a group has a reward, and perhaps a penalty, for each of its samples."""
        size = 4 * len(group.sample_indices)
        keys = self._samples.group(group.ordinal)
        if len(group.penalties) not in (0, size):
            what = f"{len(group.penalties)} B of penalties, {len(group.sample_indices)} samples"
            self._add(f"group {group.ordinal}: {what}")
            return False
        if (_floats(group.penalties) < 0).any():
            self._add(f"group {group.ordinal}: a penalty is below 0")
            return False
        inside = all(index < len(keys) for index in group.sample_indices)
        return inside and len(group.rewards) == size

    def _expected(self, group: log_pb2.AssignedGroup) -> _Floats:
        keys = self._samples.group(group.ordinal)
        indices = group.sample_indices
        stored = np.array([self._samples.rewards[keys[index]] for index in indices], np.float32)
        return stored - _floats(group.penalties) if group.penalties else stored

    def _add(self, what: str) -> None:
        self._violations.add(Rule.BATCH, what)


def _floats(values: bytes) -> _Floats:
    return np.frombuffer(values, "<f4")
