"""A small log that holds every event, entry by entry, for tests to change and to write."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from log_helpers import LIMITS, open_log
from understudy.v1 import common_pb2, log_pb2
from understudy.v1.log_pb2 import LogEntry

UNIFORM = ([1.0, 1.0], True)
MIXED = ([0.0, 1.0], False)


def key(ordinal: int, index: int) -> common_pb2.TaskKey:
    return common_pb2.TaskKey(ordinal=ordinal, sample_index=index)


def lease(ordinal: int, index: int, lease_id: int) -> LogEntry:
    leased = log_pb2.SampleLeased(task_key=key(ordinal, index), lease_id=lease_id, actor_id="a")
    return LogEntry(sample_leased=leased)


def give_back(ordinal: int, index: int) -> LogEntry:
    returned = log_pb2.SampleReturned(task_key=key(ordinal, index), reason="expired")
    return LogEntry(sample_returned=returned)


def drop(ordinal: int, index: int, reason: str = "stale") -> LogEntry:
    return LogEntry(
        sample_dropped=log_pb2.SampleDropped(task_key=key(ordinal, index), reason=reason)
    )


def origin(sequence: int, incarnation: int = 1, actor: str = "a") -> log_pb2.RecordOrigin:
    return log_pb2.RecordOrigin(actor_id=actor, incarnation=incarnation, sequence=sequence)


def payload(ordinal: int, index: int) -> bytes:
    return b"%d,%d;" % (ordinal, index) * 300


def store(ordinal: int, index: int, reward: float, version: int = 1, **where: Any) -> LogEntry:
    stored = log_pb2.TrajectoryStored(
        task_key=key(ordinal, index),
        origin=origin(**where),
        payload_digest=hashlib.sha256(payload(ordinal, index)).digest(),
        summary=log_pb2.EpisodeSummary(reward=reward, oldest_version=version),
    )
    return LogEntry(trajectory_stored=stored)


def answer(ordinal: int, index: int, kind: int, **where: Any) -> LogEntry:
    answered = log_pb2.RecordAnswered(
        task_key=key(ordinal, index), origin=origin(**where), answer=kind
    )
    return LogEntry(record_answered=answered)


def assign(
    step: int, head: int, keeps_uniform: bool = False, **groups: tuple[list[float], bool]
) -> LogEntry:
    assigned = [
        log_pb2.AssignedGroup(
            ordinal=int(name.removeprefix("g")),
            sample_indices=range(len(rewards)),
            rewards=np.array(rewards, "<f4").tobytes(),
            uniform=uniform,
        )
        for name, (rewards, uniform) in groups.items()
    ]
    return LogEntry(
        batch_assigned=log_pb2.BatchAssigned(
            step=step, head_version=head, groups=assigned, keeps_uniform=keeps_uniform
        )
    )


def evaluate(number: int, version: int, step: int, num_tasks: int = 2) -> LogEntry:
    issued = log_pb2.EvaluationIssued(
        number=number, version=version, step=step, split="test", num_tasks=num_tasks
    )
    return LogEntry(evaluation_issued=issued)


def intake(epoch: int) -> LogEntry:
    return LogEntry(intake_started=log_pb2.IntakeStarted(epoch=epoch))


def trainer(epoch: int, step: int) -> LogEntry:
    return LogEntry(trainer_started=log_pb2.TrainerStarted(epoch=epoch, step=step))


def version(number: int, step: int, epoch: int = 1) -> LogEntry:
    published = log_pb2.VersionPublished(version=number, step=step, epoch=epoch)
    return LogEntry(version_published=published)


def issue(ordinal: int) -> LogEntry:
    return LogEntry(group_issued=log_pb2.GroupIssued(ordinal=ordinal, num_samples=2))


def complete(step: int, epoch: int = 1) -> LogEntry:
    return LogEntry(step_completed=log_pb2.StepCompleted(step=step, epoch=epoch))


def checkpoint(step: int, oldest: int, epoch: int = 1) -> LogEntry:
    saved = log_pb2.CheckpointSaved(step=step, epoch=epoch, oldest_kept_step=oldest)
    return LogEntry(checkpoint_saved=saved)


HELDOUT = 2**32
"""First ordinal of the first evaluation."""
DUPLICATE, STALE = log_pb2.ANSWER_DUPLICATE, log_pb2.ANSWER_STALE
FAILED, CONFLICT = log_pb2.ANSWER_FAILED, log_pb2.ANSWER_CONFLICT


def healthy() -> dict[str, LogEntry]:
    """Two intakes and two trainers: every event, expiry, duplicates, a conflict, a step back, an
    evaluation that outlives an intake."""
    return {
        "intake1": intake(1),
        "trainer1": trainer(1, 0),
        "version1": version(1, 0),
        "issue0": issue(0),
        "issue1": issue(1),
        "lease00": lease(0, 0, 1),
        "lease01": lease(0, 1, 2),
        "return01": give_back(0, 1),
        "store00": store(0, 0, 0.0, sequence=0),
        "store01": store(0, 1, 1.0, sequence=1),
        "duplicate01": answer(0, 1, DUPLICATE, sequence=2),
        "conflict": answer(0, 1, CONFLICT, sequence=0),
        "failed10": answer(1, 0, FAILED, sequence=3),
        "store10": store(1, 0, 1.0, sequence=4),
        "store11": store(1, 1, 1.0, sequence=0, incarnation=2, actor="b"),
        "assign0": assign(0, 1, g0=MIXED, g1=UNIFORM),
        "version2": version(2, 1),
        "complete0": complete(0),
        "checkpoint1": checkpoint(1, 0),
        "evaluate1": evaluate(1, 2, 1),
        "issue2": issue(2),
        "lease20": lease(2, 0, 3),
        "leaseE0": lease(HELDOUT, 0, 4),
        "intake2": intake(2),
        "lease21": lease(2, 1, 2**32 + 1),
        "storeE0": store(HELDOUT, 0, 1.0, version=2, sequence=0, incarnation=2**32 + 2, actor="b"),
        "dropE1": drop(HELDOUT + 1, 0, "abandoned"),
        "store20": store(2, 0, 0.0, sequence=0, incarnation=2**32 + 1),
        "store21": store(2, 1, 1.0, sequence=1, incarnation=2**32 + 1),
        "assign1": assign(1, 2, g2=MIXED),
        "version3": version(3, 2),
        "complete1": complete(1),
        "trainer2": trainer(2, 1),
        "version4": version(4, 1, epoch=2),
        "complete1again": complete(1, epoch=2),
        "checkpoint2": checkpoint(2, 1, epoch=2),
        "issue3": issue(3),
        "stale30": answer(3, 0, STALE, sequence=2, incarnation=2**32 + 1),
        "drop30": drop(3, 0),
        "drop31": drop(3, 1, "short_group"),
        "issue4": issue(4),
        "lease40": lease(4, 0, 2**32 + 2),
    }


async def write(run: Path, entries: Sequence[LogEntry], **limits: int) -> Path:
    """A run whose log holds these entries; stored trajectories get the payload of their key."""
    log = await open_log(run / "log", replace(LIMITS, **limits))
    for entry in entries:
        task_key = entry.trajectory_stored.task_key
        stored = entry.HasField("trajectory_stored") and not entry.trimmed_bytes
        log.append(entry, payload(task_key.ordinal, task_key.sample_index) if stored else b"")
    await log.close()
    return run
