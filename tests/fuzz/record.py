"""Records as an actor sends them, up to what the intake would do with them.

The ledger is a real one; only its log is kept in memory, and what would be stored is not, so that
every input meets the same state: version 2 published, four task keys leased.
"""

import contextlib
import hashlib
import logging
import random
from pathlib import Path
from types import SimpleNamespace

from google.protobuf.message import DecodeError

from learner.intake.ledger import Ledger, Result
from learner.intake.records import Inspector
from learner.intake.state import RunState
from learner.log.segments import Location
from tests.fuzz import payload_raw, payload_zstd
from tests.fuzz.mutation import mutate_as
from tests.fuzz.trajectories import RAW, SOUND, ZSTD, check
from understudy.config import ModelConfig, TasksConfig
from understudy.trajectory import TrajectoryError, decode_record
from understudy.v1 import common_pb2, log_pb2, trajectory_pb2

MAX_LEN = 2048
REASONS = {"BAD_DIGEST", "BAD_PAYLOAD", "TOO_LARGE", "UNKNOWN_TASK_KEY", "UNKNOWN_VERSION"}
"""Of a Nack, as the proto lists them; a conflict is found out before."""
_ORIGIN = log_pb2.RecordOrigin(actor_id="a", incarnation=1)
_mutate_envelope = mutate_as(trajectory_pb2.TrajectoryRecord)
logging.disable(logging.CRITICAL)


class _MemoryLog:
    """Takes entries, as a log would write them."""

    def append(self, entry: log_pb2.LogEntry, payload: bytes = b"") -> Location:
        entry.SerializeToString()
        return Location(1, 0, len(payload))


class _Intake:
    """Answers like the intake, and stores nothing."""

    def __init__(self) -> None:
        tasks = TasksConfig(group_size=2, groups_per_batch=2)
        self.state = RunState(tasks, steps=4)
        self.ledger = Ledger(_MemoryLog(), self.state)
        self.ledger.start_training(0, b"")
        self.ledger.publish(0, 1)
        self.ledger.publish(0, 1)
        self.ledger.lease("a", 4)
        model = ModelConfig(path=Path("/nowhere"))
        self.config = SimpleNamespace(learner=SimpleNamespace(tasks=tasks), model=model)

    async def fail(self, key: object, lease_id: int, reason: str, *rest: object) -> None:
        assert reason == "failed" or reason in REASONS

    async def deliver(self, result: Result) -> bool:
        check(decode_record(result.record))
        log_pb2.TrajectoryStored(
            task_key=result.record.task_key, origin=result.origin, summary=result.summary
        ).SerializeToString()
        return True


_intake = _Intake()
_inspector = Inspector(_intake, MAX_LEN)  # type: ignore[arg-type]


def seeds() -> list[bytes]:
    """A sound record of each trajectory, compressed and not."""
    payloads = [*((RAW, payload) for payload in payload_raw.seeds())]
    payloads += [(ZSTD, payload) for payload in payload_zstd.seeds()[: len(SOUND)]]
    return [
        trajectory_pb2.TrajectoryRecord(
            lease_id=1,
            task_key=common_pb2.TaskKey(ordinal=0, sample_index=0),
            outcome=trajectory_pb2.OUTCOME_COMPLETED,
            encoding=encoding,
            payload=payload,
            payload_digest=hashlib.sha256(payload).digest(),
        ).SerializeToString()
        for encoding, payload in payloads
    ]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change the payload under a right digest, or the envelope."""
    rng = random.Random(seed)
    if rng.random() < 0.6:
        with contextlib.suppress(DecodeError):
            record = trajectory_pb2.TrajectoryRecord.FromString(data)
            target = payload_zstd if record.encoding == ZSTD else payload_raw
            record.payload = target.mutate(record.payload, max_size, seed)
            record.payload_digest = hashlib.sha256(record.payload).digest()
            changed = record.SerializeToString()
            if len(changed) <= max_size:
                return changed
    return _mutate_envelope(data, max_size, seed)


def TestOneInput(data: bytes) -> None:
    """Take a record: it is delivered, has failed, or is rejected for a known reason."""
    try:
        record = trajectory_pb2.TrajectoryRecord.FromString(data)
    except DecodeError:
        return
    taken, reason = _take(record)
    assert taken or reason in REASONS
    assert _intake.state.balance().holds


def _take(record: trajectory_pb2.TrajectoryRecord) -> tuple[bool, str]:
    """Whether a record was taken, and why not. Nothing in it waits, so that no loop is needed."""
    step = _inspector.take(record, record.payload, _ORIGIN)
    try:
        step.send(None)
    except StopIteration as end:
        return bool(end.value), ""
    except TrajectoryError as error:
        return False, error.reason
    raise AssertionError("it waits")
