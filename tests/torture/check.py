"""Holds a run's log to what its clients were told.

Goes through the log's entries with none of the intake's own code for state. `audit_run` is asked
too: it knows the rules of the accounts, this knows what was promised.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from learner.audit import audit_run
from learner.log.reader import LogReader
from learner.log.segments import Location
from tests.torture.history import History, Key
from understudy.v1 import common_pb2, log_pb2


@dataclass(kw_only=True)
class Account:
    """What the log says, entry by entry."""

    violations: list[str] = field(default_factory=list)
    stored: dict[Key, log_pb2.TrajectoryStored] = field(default_factory=dict)
    locations: dict[Key, Location] = field(default_factory=dict)
    trimmed: set[Key] = field(default_factory=set)
    answers: Counter[Key] = field(default_factory=Counter)
    """Records that were answered without being stored."""
    dropped: dict[Key, str] = field(default_factory=dict)
    leases: dict[int, tuple[Key, str]] = field(default_factory=dict)
    batches: dict[int, log_pb2.BatchAssigned] = field(default_factory=dict)
    step_of: dict[Key, int] = field(default_factory=dict)
    completed: set[tuple[int, int]] = field(default_factory=set)
    trainers: list[tuple[int, int]] = field(default_factory=list)
    versions: list[tuple[int, int, int]] = field(default_factory=list)
    checkpoints: set[tuple[int, int, int]] = field(default_factory=set)
    epochs: list[int] = field(default_factory=list)
    oldest_kept_step: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    num_entries: int = 0

    def take(self, entry: log_pb2.LogEntry, location: Location) -> None:
        """The next entry."""
        kind = entry.WhichOneof("event") or ""
        if entry.index != self.num_entries:
            self.violations.append(f"entry {entry.index} stands where {self.num_entries} belongs")
        self.num_entries = entry.index + 1
        self.kinds[kind] += 1
        if kind == "trajectory_stored":
            self._take_stored(entry, location)
        elif handler := getattr(self, f"_on_{kind}", None):
            handler(getattr(entry, kind))

    def _take_stored(self, entry: log_pb2.LogEntry, location: Location) -> None:
        event = entry.trajectory_stored
        key = _key(event.task_key)
        if key in self.stored:
            self.violations.append(f"{key} was stored twice")
        if key in self.dropped:
            self.violations.append(f"{key} was stored after it was dropped")
        self.stored[key] = event
        self.locations[key] = location
        if entry.trimmed_bytes:
            self.trimmed.add(key)

    def _on_record_answered(self, event: log_pb2.RecordAnswered) -> None:
        self.answers[_key(event.task_key)] += 1

    def _on_sample_dropped(self, event: log_pb2.SampleDropped) -> None:
        self.dropped[_key(event.task_key)] = event.reason

    def _on_sample_leased(self, event: log_pb2.SampleLeased) -> None:
        if event.lease_id in self.leases:
            self.violations.append(f"lease id {event.lease_id} is in the log twice")
        self.leases[event.lease_id] = _key(event.task_key), event.actor_id

    def _on_batch_assigned(self, event: log_pb2.BatchAssigned) -> None:
        if event.step != len(self.batches):
            self.violations.append(f"batch {event.step} stands where {len(self.batches)} belongs")
        self.batches[event.step] = event
        for key in _members(event):
            if key in self.step_of:
                self.violations.append(f"{key} is in batches {self.step_of[key]} and {event.step}")
            self.step_of[key] = event.step

    def _on_step_completed(self, event: log_pb2.StepCompleted) -> None:
        self.completed.add((event.step, event.epoch))

    def _on_trainer_started(self, event: log_pb2.TrainerStarted) -> None:
        if self.trainers and event.epoch <= self.trainers[-1][0]:
            self.violations.append(f"trainer's epoch {event.epoch} after {self.trainers[-1][0]}")
        self.trainers.append((event.epoch, event.step))

    def _on_version_published(self, event: log_pb2.VersionPublished) -> None:
        if event.version != len(self.versions) + 1:
            self.violations.append(f"version {event.version} is number {len(self.versions) + 1}")
        self.versions.append((event.version, event.step, event.epoch))

    def _on_checkpoint_saved(self, event: log_pb2.CheckpointSaved) -> None:
        self.checkpoints.add((event.step, event.oldest_kept_step, event.epoch))
        self.oldest_kept_step = max(self.oldest_kept_step, event.oldest_kept_step)

    def _on_intake_started(self, event: log_pb2.IntakeStarted) -> None:
        if self.epochs and event.epoch <= self.epochs[-1]:
            self.violations.append(f"intake's epoch {event.epoch} after {self.epochs[-1]}")
        self.epochs.append(event.epoch)


def check(history: History, run: Path) -> tuple[list[str], Counter[str]]:
    """Everything that contradicts the history, or the rules; and what the log has, in numbers."""
    reader = LogReader(run / "log")
    account = Account()
    for entry, location in reader:
        account.take(entry, location)
    found = [*history.violations, *account.violations]
    if reader.findings.bad_ranges or reader.findings.num_missing:
        found.append(f"the log is damaged: {reader.findings}")
    found += _check_acked(history, account)
    found += _check_payloads(account, reader)
    found += _check_batches(history, account)
    found += _check_promises(history, account)
    reader.close()
    report = audit_run(run)
    if not report.passed:
        found.append(f"audit: {report.num_violations} violations: {report.violations[:3]}")
    return found, account.kinds


def _check_acked(history: History, account: Account) -> list[str]:
    """Each acked record's trajectory is stored, or the record was answered in another way."""
    found = []
    others: Counter[Key] = Counter()
    for played in history.acked:
        stored = account.stored.get(played.key)
        if stored is None or stored.payload_digest != played.digest:
            others[played.key] += 1
    for key, number in others.items():
        if account.answers[key] < number:
            state = account.dropped.get(key, "stored" if key in account.stored else "not stored")
            found.append(
                f"acked and lost: {number} records of {key}, {account.answers[key]} answered "
                f"otherwise; the key is {state}"
            )
    for key, stored in account.stored.items():
        if history.knows_payloads and stored.payload_digest not in history.played[key]:
            found.append(f"{key} has a trajectory that nobody sent")
    return found


def _check_payloads(account: Account, reader: LogReader) -> list[str]:
    """What a trainer may still ask for is there, and is what was sent."""
    found = []
    for key, event in account.stored.items():
        step = account.step_of.get(key)
        if key in account.trimmed:
            if step is None and key not in account.dropped:
                found.append(f"the payload of {key} is gone, and it is in no batch yet")
            elif step is not None and step >= account.oldest_kept_step:
                found.append(
                    f"the payload of {key} is gone; step {step} may be asked for from "
                    f"{account.oldest_kept_step} on"
                )
            continue
        _, payload = reader.read(account.locations[key])
        if hashlib.sha256(payload).digest() != event.payload_digest:
            found.append(f"the payload of {key} is not the one that was digested")
    return found


def _check_batches(history: History, account: Account) -> list[str]:
    """The ranks' shares of a step are what the log assigned to it, each once."""
    found = []
    shares: dict[int, list[tuple[Key, bytes]]] = defaultdict(list)
    ranks: Counter[int] = Counter()
    for share in history.shares.values():
        shares[share.step] += share.trajectories
        ranks[share.step] += 1
        if share.step not in account.batches:
            found.append(f"step {share.step} was handed out, and the log has no such batch")
    for step, event in account.batches.items():
        expected = {
            (key, account.stored[key].payload_digest)
            for key in _members(event, with_uniform=False)
            if key in account.stored
        }
        got = shares[step]
        if len(got) != len(set(got)) or not set(got) <= expected:
            found.append(f"step {step}: the ranks got other trajectories than the log has")
        header = history.headers.get(step)
        if header and ranks[step] == header.world_size and set(got) != expected:
            found.append(f"step {step}: the ranks did not get all of its trajectories")
    return found


def _check_promises(history: History, account: Account) -> list[str]:
    """Whatever else was answered is in the log."""
    found = []
    for lease_id, held in history.leases.items():  # of the harness's own actors
        if account.leases.get(lease_id) != held:
            found.append(f"lease {lease_id} of {held} is {account.leases.get(lease_id)} in the log")
    told: dict[str, tuple[Iterable[Any], Iterable[Any]]] = {
        "trainer": (history.trainers, account.trainers),
        "version": (history.versions, account.versions),
        "completed step": (history.completed, account.completed),
        "checkpoint": (history.checkpoints, account.checkpoints),
    }
    for name, (promised, kept) in told.items():
        if lost := set(promised) - set(kept):
            found.append(f"answered and lost: {name} {sorted(lost)[:3]}")
    return found


def _members(event: log_pb2.BatchAssigned, with_uniform: bool = True) -> list[Key]:
    return [
        Key(group.ordinal, index)
        for group in event.groups
        if with_uniform or event.keeps_uniform or not group.uniform
        for index in group.sample_indices
    ]


def _key(message: common_pb2.TaskKey) -> Key:
    return Key(message.ordinal, message.sample_index)
