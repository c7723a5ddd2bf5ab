"""Records: from an actor's envelope to a result of its task key."""

import asyncio
import json
import logging
from pathlib import Path

from learner.intake.intake import Intake
from learner.intake.ledger import Result
from learner.intake.tasks import Task, TaskKey
from understudy.routes import Mixture, RouteArray, read_mixture
from understudy.trajectory import (
    Segment,
    Trajectory,
    TrajectoryError,
    check_digest,
    decode_payload,
)
from understudy.v1 import log_pb2, trajectory_pb2

_log = logging.getLogger(__name__)

THREAD_BYTES = 2**20
"""Payloads above this are decoded on a thread, so that other streams go on."""
_DATA = (trajectory_pb2.OUTCOME_COMPLETED, trajectory_pb2.OUTCOME_TRUNCATED)


def decode_key(record: trajectory_pb2.TrajectoryRecord) -> TaskKey:
    """The task key of a record."""
    return TaskKey(record.task_key.ordinal, record.task_key.sample_index)


def read_vocab_size(model: Path) -> int | None:
    """Number of token ids that the model's config.json states; None if it states none."""
    try:
        settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return int(settings["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Inspector:
    """Looks into records and hands results to the intake."""

    def __init__(self, intake: Intake, max_payload_bytes: int) -> None:
        self._intake = intake
        self._tasks = intake.config.learner.tasks
        self._max_payload_bytes = max_payload_bytes
        self._vocab_size = read_vocab_size(intake.config.model.path)
        model = intake.config.model
        self._mixture = read_mixture(model.path) if model.router_replay else None

    async def take(
        self,
        record: trajectory_pb2.TrajectoryRecord,
        payload: bytes,
        origin: log_pb2.RecordOrigin,
    ) -> bool:
        """Take one record and its payload; False if its task key needs no result any more.

        Raises:
            TrajectoryError: the record is rejected. Its sample was given back or dropped.
        """
        key = decode_key(record)
        ledger = self._intake.ledger
        if not ledger.knows(key):
            ledger.answer(origin, key, log_pb2.ANSWER_REJECTED, "UNKNOWN_TASK_KEY")
            raise TrajectoryError("UNKNOWN_TASK_KEY", f"task_key {key} was never leased")
        if ledger.has_result(key):
            ledger.answer(origin, key, log_pb2.ANSWER_DUPLICATE)
            return False
        try:
            trajectory = await self._decode(record, payload)
            self._check(key, record, trajectory)
        except TrajectoryError as error:
            _log.error("record of task key %s rejected: %s", tuple(key), error)
            await self._intake.fail(
                key, record.lease_id, error.reason, origin, log_pb2.ANSWER_REJECTED
            )
            raise
        if record.outcome not in _DATA:
            await self._intake.fail(key, record.lease_id, "failed", origin, log_pb2.ANSWER_FAILED)
            return True
        result = Result(
            key=key,
            origin=origin,
            record=record,
            payload=payload,
            summary=self._summarize(trajectory),
        )
        return await self._intake.deliver(result)

    async def _decode(self, record: trajectory_pb2.TrajectoryRecord, payload: bytes) -> Trajectory:
        size = len(payload)
        if size > self._max_payload_bytes:
            raise TrajectoryError(
                "TOO_LARGE", f"payload of {size} bytes is above {self._max_payload_bytes}"
            )
        if size > THREAD_BYTES:
            return await asyncio.to_thread(_decode_checked, record, payload)
        return _decode_checked(record, payload)

    def _check(
        self, key: TaskKey, record: trajectory_pb2.TrajectoryRecord, trajectory: Trajectory
    ) -> None:
        if trajectory.outcome != record.outcome:
            raise TrajectoryError(
                "BAD_PAYLOAD", f"outcome {trajectory.outcome}; the record's is {record.outcome}"
            )
        head = self._intake.state.admission.version
        versions = trajectory.versions
        if versions and not 1 <= min(versions) <= max(versions) <= head:
            raise TrajectoryError(
                "UNKNOWN_VERSION", f"versions {sorted(versions)}; published are 1 to {head}"
            )
        for segment in trajectory.segments:
            self._check_segment(segment)
        if record.outcome not in _DATA:  # a failed episode may not have got as far as its task
            return
        if self._intake.ledger.has_result(key):  # meanwhile: it is a duplicate
            return
        played = Task(trajectory.suite, trajectory.split, trajectory.task_ordinal)
        leased = self._intake.ledger.task(key)
        if played != leased:
            raise TrajectoryError(
                "BAD_PAYLOAD", f"task {tuple(played)}; the leased one is {tuple(leased)}"
            )
        evaluation = self._intake.state.evaluations.get(key.evaluation)
        if evaluation and versions and min(versions) < evaluation.version:
            raise TrajectoryError(
                "BAD_PAYLOAD", f"version {min(versions)}; evaluated is {evaluation.version}"
            )

    def _summarize(self, trajectory: Trajectory) -> log_pb2.EpisodeSummary:
        """What the ledger and the batches keep in reach."""
        versions = trajectory.versions
        return log_pb2.EpisodeSummary(
            task_id=trajectory.task_id,
            level=trajectory.level,
            reward=trajectory.reward,
            oldest_version=trajectory.oldest_version,
            oldest_step=self._intake.ledger.oldest_step(sorted(versions)),
            num_tokens=trajectory.num_tokens,
            num_sampled_tokens=trajectory.num_sampled_tokens,
            num_turns=len(trajectory.turns),
            truncated=trajectory.outcome == trajectory_pb2.OUTCOME_TRUNCATED,
            newest_version=max(versions, default=None),
            longest_segment=max((len(s.token_ids) for s in trajectory.trainable), default=0),
            longest_reply=max(
                (
                    turn.end - turn.start
                    for turn in trajectory.turns
                    if not trajectory.segments[turn.segment].frozen
                ),
                default=0,
            ),
        )

    def _check_segment(self, segment: Segment) -> None:
        """What the trainer could not take: ids that its model lacks, more tokens than leased.

        A frozen segment is not computed on, and may be of a model with other tokens.
        """
        length = len(segment.token_ids)
        if length > self._tasks.max_tokens:
            raise TrajectoryError(
                "BAD_PAYLOAD", f"segment of {length} tokens; max_tokens is {self._tasks.max_tokens}"
            )
        if segment.frozen or not length:
            return
        if self._vocab_size and segment.token_ids.max() >= self._vocab_size:
            raise TrajectoryError(
                "BAD_PAYLOAD", f"token id {segment.token_ids.max()}; there are {self._vocab_size}"
            )
        if self._mixture:
            _check_routes(segment.routes, self._mixture)


def _check_routes(routes: RouteArray | None, mixture: Mixture) -> None:
    if routes is None:
        raise TrajectoryError(
            "BAD_PAYLOAD", "a segment has no routes; set model.router_replay = true for all roles"
        )
    try:
        mixture.check(routes)
    except ValueError as error:
        raise TrajectoryError("BAD_PAYLOAD", f"routes: {error}") from None


def _decode_checked(record: trajectory_pb2.TrajectoryRecord, payload: bytes) -> Trajectory:
    check_digest(payload, record.payload_digest)
    return decode_payload(payload, record.encoding)
