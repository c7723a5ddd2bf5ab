"""The trajectory codec: exact round trip, and a reason for everything that breaks the format."""

import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from understudy.trajectory import (
    PartCall,
    Segment,
    Trajectory,
    TrajectoryError,
    Turn,
    VersionSpan,
    decode_payload,
    decode_record,
    encode_trajectory,
)
from understudy.v1 import common_pb2, trajectory_pb2

ZSTD = common_pb2.ENCODING_ZSTD


def make_trajectory(num_tokens: int = 6, num_sampled: int = 3) -> Trajectory:
    """A one-segment trajectory whose last tokens were sampled under version 4."""
    mask = np.arange(num_tokens) >= num_tokens - num_sampled
    spans = (VersionSpan(version=4, start=0, end=num_sampled),) if num_sampled else ()
    segment = Segment(
        token_ids=np.arange(num_tokens, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.full(num_sampled, -0.5, np.float32),
        version_spans=spans,
    )
    turn = Turn(
        segment=0,
        start=0,
        end=num_sampled,
        reward=1.0,
        num_tool_calls=0,
        malformed_call=False,
        generate_seconds=0.25,
        step_seconds=0.5,
    )
    return Trajectory(
        suite="practice",
        split="train",
        task_ordinal=7,
        task_id="practice-train-7",
        level=2,
        outcome=trajectory_pb2.OUTCOME_COMPLETED,
        detail="",
        segments=(segment,),
        turns=(turn,),
        reward=1.0,
        temperature=1.0,
        duration_seconds=1.5,
    )


def make_record(trajectory: Trajectory, **fields: object) -> trajectory_pb2.TrajectoryRecord:
    """A record of a trajectory with a right digest."""
    payload = encode_trajectory(trajectory)
    return trajectory_pb2.TrajectoryRecord(
        outcome=trajectory.outcome,
        encoding=ZSTD,
        payload=payload,
        payload_digest=hashlib.sha256(payload).digest(),
        **fields,  # type: ignore[arg-type]
    )


@given(
    st.integers(1, 40),
    st.integers(0, 40),
    st.from_regex(r"[A-Za-z0-9_-]{0,64}", fullmatch=True),
    st.booleans(),
    st.builds(PartCall, turn=st.just(0), tool_call=st.integers(0, 9)) | st.none(),
    st.booleans(),
)
def test_round_trip_is_exact(
    num_prompt: int,
    num_sampled: int,
    part: str,
    frozen: bool,
    caller: PartCall | None,
    has_routes: bool,
) -> None:
    trajectory = make_trajectory(num_prompt + num_sampled, num_sampled)
    (begins,), (turn,) = trajectory.segments, trajectory.turns
    shape = num_prompt + num_sampled - 1, 2, 3
    routes = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape) if has_routes else None
    segment = dataclasses.replace(begins, part=part, frozen=frozen, caller=caller, routes=routes)
    if caller:  # which a turn of another part made
        later = dataclasses.replace(turn, segment=1)
        trajectory = dataclasses.replace(
            trajectory,
            segments=(dataclasses.replace(begins, frozen=True), segment),
            turns=(turn, later),
        )
    else:
        trajectory = dataclasses.replace(trajectory, segments=(segment,))
    decoded = decode_record(make_record(trajectory))
    for name in ("token_ids", "loss_mask", "logprobs", *["routes"] * has_routes):
        left, right = getattr(decoded.segments[-1], name), getattr(segment, name)
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype
    assert has_routes or decoded.segments[-1].routes is None
    for name in ("version_spans", "part", "frozen", "caller"):
        assert getattr(decoded.segments[-1], name) == getattr(segment, name)
    assert decoded.num_sampled_tokens == (0 if frozen else num_sampled)
    assert decoded.oldest_version == (None if frozen or not num_sampled else 4)
    assert dataclasses.replace(decoded, segments=()) == dataclasses.replace(trajectory, segments=())


def test_a_flipped_byte_is_refused_or_changes_nothing() -> None:
    record = make_record(make_trajectory())
    original = decode_record(record)
    payload = bytearray(record.payload)
    num_refused = 0
    for index in range(len(payload)):
        payload[index] ^= 0x10
        try:
            segment = decode_payload(bytes(payload), ZSTD).segments[0]
            np.testing.assert_array_equal(segment.token_ids, original.segments[0].token_ids)
        except TrajectoryError:
            num_refused += 1
        payload[index] ^= 0x10
    assert num_refused >= len(payload) - 4  # a few bits of a frame carry nothing
    record.payload = record.payload + b"x"
    with pytest.raises(TrajectoryError, match="BAD_DIGEST"):
        decode_record(record)


def test_a_bomb_is_refused_by_what_it_declares_or_hides() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(2**20))
    with pytest.raises(TrajectoryError, match="TOO_LARGE"):
        decode_payload(bomb, ZSTD, max_decoded_bytes=2**16)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**20))
    with pytest.raises(TrajectoryError, match="TOO_LARGE"):
        decode_payload(silent, ZSTD)
    two_frames = encode_trajectory(make_trajectory()) * 2
    with pytest.raises(TrajectoryError, match="BAD_PAYLOAD"):
        decode_payload(two_frames, ZSTD)


def _broken(change: str) -> trajectory_pb2.Trajectory:
    payload = zstandard.ZstdDecompressor().decompress(encode_trajectory(make_trajectory()))
    message = trajectory_pb2.Trajectory.FromString(payload)
    segment = message.segments[0]
    changes = {
        "token_ids": lambda: setattr(segment, "token_ids", segment.token_ids[:-1]),
        "negative id": lambda: setattr(segment, "token_ids", b"\xff" * 24),
        "mask length": lambda: setattr(segment, "loss_mask", b"\x01" * 5),
        "mask first": lambda: setattr(segment, "loss_mask", b"\x01\x01\x01\x00\x00\x00"),
        "mask value": lambda: setattr(segment, "loss_mask", b"\x02" * 6),
        "logprobs length": lambda: setattr(segment, "logprobs", segment.logprobs[:-4]),
        "positive logprob": lambda: setattr(segment, "logprobs", np.float32([1, 1, 1]).tobytes()),
        "nan logprob": lambda: setattr(segment, "logprobs", np.float32([np.nan] * 3).tobytes()),
        "spans short": lambda: setattr(segment.version_spans[0], "end", 2),
        "spans empty": lambda: segment.version_spans.pop(),
        "turn segment": lambda: setattr(message.turns[0], "segment", 1),
        "turn range": lambda: setattr(message.turns[0], "end", 4),
        "turn reward": lambda: setattr(message.turns[0], "reward", float("inf")),
        "reward": lambda: setattr(message, "reward", float("nan")),
        "outcome": lambda: setattr(message, "outcome", 0),
        "part long": lambda: setattr(segment, "part", "p" * 65),
        "part characters": lambda: setattr(segment, "part", "a b"),
        "part line end": lambda: setattr(segment, "part", "a\n"),
        "part letters": lambda: setattr(segment, "part", "\u00e9"),
        "called by itself": lambda: setattr(segment.caller, "tool_call", 1),
        "routes of others": lambda: setattr(segment.routes, "experts", b"\x01" * 6),
    }
    changes[change]()
    return message


@pytest.mark.parametrize(
    "change",
    [
        *("token_ids", "negative id", "mask length", "mask first", "mask value", "logprobs length"),
        *("positive logprob", "nan logprob", "spans short", "spans empty", "turn segment"),
        *("turn range", "turn reward", "reward", "outcome"),
        *("part long", "part characters", "part line end", "part letters"),
        "called by itself",
        "routes of others",
    ],
)
def test_each_broken_rule_is_refused(change: str) -> None:
    with pytest.raises(TrajectoryError, match="BAD_PAYLOAD"):
        decode_payload(_broken(change).SerializeToString(), common_pb2.ENCODING_RAW)


def test_threads_encode_and_decode_at_the_same_time() -> None:
    # Two threads in one zstd context would end the process.
    trajectories = [make_trajectory(200_000, 100_000 + index) for index in range(4)]

    def round_trip(trajectory: Trajectory) -> bool:
        return all(
            decode_payload(encode_trajectory(trajectory), ZSTD).num_sampled_tokens
            == trajectory.num_sampled_tokens
            for _ in range(20)
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(round_trip, trajectories))
