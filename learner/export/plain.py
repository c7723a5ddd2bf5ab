"""The plain format: a trajectory as it was trained, and its text if there is a tokenizer."""

from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from learner.export.replies import Reply, replies_of
from learner.export.source import Episode
from learner.export.tokenizer import Decode, Decoders
from understudy.trajectory import FloatArray, Segment, VersionSpan
from understudy.v1 import trajectory_pb2

Line = dict[str, Any]


def plain_line(episode: Episode, decoders: Decoders) -> Line:
    """An episode as one JSON object."""
    trajectory = episode.trajectory
    return {
        **facts(episode),
        "segments": [_segment(segment) for segment in trajectory.segments],
        "turns": [_turn(reply, decoders.of(reply.part)) for reply in replies_of(trajectory)],
    }


def facts(episode: Episode) -> Line:
    """All about an episode but its tokens."""
    trajectory = episode.trajectory
    stored = datetime.fromtimestamp(episode.time_us / 1e6, UTC)
    outcome = trajectory_pb2.Outcome.Name(trajectory.outcome)
    return {
        "run": episode.run_id,
        "task_key": {"ordinal": episode.ordinal, "sample_index": episode.sample_index},
        "task": {
            "suite": trajectory.suite,
            "split": trajectory.split,
            "ordinal": trajectory.task_ordinal,
            "id": trajectory.task_id,
            "level": trajectory.level,
        },
        "outcome": outcome.removeprefix("OUTCOME_").lower(),
        "detail": trajectory.detail,
        "reward": trajectory.reward,
        "state": episode.state,
        "reason": episode.reason,
        "step": episode.step,
        "evaluation": asdict(episode.evaluation) if episode.evaluation else None,
        "stored_at": stored.isoformat(timespec="microseconds"),
        "temperature": trajectory.temperature,
        "duration_seconds": trajectory.duration_seconds,
    }


def spans_of(spans: Iterable[VersionSpan]) -> list[dict[str, int]]:
    """Version spans, for JSON."""
    return [{"version": span.version, "start": span.start, "end": span.end} for span in spans]


def floats_of(values: FloatArray) -> list[float]:
    """Float32 values with as few digits as give the same value back."""
    return [float(str(value)) for value in values]


def _segment(segment: Segment) -> Line:
    return {
        "token_ids": segment.token_ids.tolist(),
        "loss_mask": segment.loss_mask.astype(int).tolist(),
        "logprobs": floats_of(segment.logprobs),
        "version_spans": spans_of(segment.version_spans),
        **({"part": segment.part} if segment.part else {}),
        **({"frozen": True} if segment.frozen else {}),
        **({"caller": asdict(segment.caller)} if segment.caller else {}),
        **({"routes": segment.routes.tolist()} if segment.routes is not None else {}),
    }


def _turn(reply: Reply, decode: Decode | None) -> Line:
    turn = reply.turn
    text = {"prompt": decode(reply.fresh), "reply": decode(reply.token_ids)} if decode else {}
    return {
        **({"part": reply.part} if reply.part else {}),
        "segment": turn.segment,
        "start": turn.start,
        "end": turn.end,
        "reward": turn.reward,
        "num_tool_calls": turn.num_tool_calls,
        "malformed_call": turn.malformed_call,
        "generate_seconds": turn.generate_seconds,
        "step_seconds": turn.step_seconds,
        **text,
    }
