"""Sound trajectories to start from, and what every decoded one must be."""

import dataclasses
import math

import numpy as np

from understudy.trajectory import (
    Segment,
    Trajectory,
    Turn,
    VersionSpan,
    decode_payload,
    encode_trajectory,
)
from understudy.v1 import common_pb2, trajectory_pb2

ZSTD, RAW = common_pb2.ENCODING_ZSTD, common_pb2.ENCODING_RAW


def make_trajectory(
    num_segments: int = 2, versions: tuple[int, ...] = (1, 2), part: str = "", frozen: bool = False
) -> Trajectory:
    """A turn a segment, of 12 tokens with 6 sampled ones."""
    edges = np.linspace(0, 6, len(versions) + 1).astype(int).tolist()
    segment = Segment(
        token_ids=np.arange(12, dtype=np.int32),
        loss_mask=np.arange(12) >= 6,
        logprobs=np.full(6, -0.5, np.float32),
        version_spans=tuple(
            VersionSpan(version=version, start=start, end=end)
            for version, start, end in zip(versions, edges, edges[1:], strict=False)
        ),
        part=part,
        frozen=frozen,
        routes=np.zeros((11, 2, 2), np.uint8) if part else None,
    )
    turns = tuple(
        Turn(
            segment=index,
            start=0,
            end=6,
            reward=0.5,
            num_tool_calls=1,
            malformed_call=False,
            generate_seconds=0.5,
            step_seconds=0.25,
        )
        for index in range(num_segments)
    )
    return Trajectory(
        suite="practice",
        split="train",
        task_ordinal=0,
        task_id="task-0",
        level=1,
        outcome=trajectory_pb2.OUTCOME_COMPLETED,
        detail="",
        segments=(segment,) * num_segments,
        turns=turns,
        reward=1.0,
        temperature=1.0,
        duration_seconds=1.0,
    )


SOUND = (
    make_trajectory(1, (1,)),
    make_trajectory(),
    make_trajectory(0),
    make_trajectory(part="searcher-2", frozen=True),
)


def check(trajectory: Trajectory) -> None:
    """What the trainer relies on. Written from the proto's comments, not from the decoder."""
    for segment in trajectory.segments:
        num_tokens, num_sampled = len(segment.token_ids), int(segment.loss_mask.sum())
        assert len(segment.loss_mask) == num_tokens
        assert not num_tokens or not segment.loss_mask[0]
        assert len(segment.logprobs) == num_sampled
        assert not num_tokens or segment.token_ids.min() >= 0
        assert all(-math.inf < value <= 0 for value in segment.logprobs.tolist())
        covered = [i for span in segment.version_spans for i in (span.start, span.end)]
        assert covered == sorted(covered)
        assert sum(span.end - span.start for span in segment.version_spans) == num_sampled
        versions = [span.version for span in segment.version_spans]
        assert versions == sorted(versions)
        assert len(segment.part) <= 64
        if segment.routes is not None:
            rows, *shape = segment.routes.shape
            assert rows == max(num_tokens - 1, 0)
            assert all(1 <= number <= 1024 for number in shape)
        plain = segment.part.replace("_", "a").replace("-", "a")
        assert not plain or (plain.isascii() and plain.isalnum())
    for turn in trajectory.turns:
        segment = trajectory.segments[turn.segment]
        assert 0 <= turn.start <= turn.end <= len(segment.logprobs)
        assert math.isfinite(turn.reward)
    assert math.isfinite(trajectory.reward)
    assert 0 <= trajectory.temperature <= 10
    _check_round_trip(trajectory)


def _check_round_trip(trajectory: Trajectory) -> None:
    """Encoded and decoded again it is the same, times apart, which are stored in whole ns."""
    turns = tuple(
        dataclasses.replace(turn, generate_seconds=0.0, step_seconds=0.0)
        for turn in trajectory.turns
    )
    plain = dataclasses.replace(trajectory, turns=turns, duration_seconds=0.0)
    again = decode_payload(encode_trajectory(plain), ZSTD)
    assert dataclasses.replace(again, segments=()) == dataclasses.replace(plain, segments=())
    for left, right in zip(again.segments, plain.segments, strict=True):
        np.testing.assert_array_equal(left.token_ids, right.token_ids)
        np.testing.assert_array_equal(left.loss_mask, right.loss_mask)
        np.testing.assert_array_equal(left.logprobs, right.logprobs)
        assert left.version_spans == right.version_spans
        assert (left.part, left.frozen) == (right.part, right.frozen)
        assert (left.routes is None) == (right.routes is None)
        if right.routes is not None:
            np.testing.assert_array_equal(left.routes, right.routes)
