"""The replies of a trajectory: which tokens the policy saw, and which it answered with."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from understudy.trajectory import (
    FloatArray,
    IntArray,
    PartCall,
    Segment,
    Trajectory,
    Turn,
    VersionSpan,
)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One turn in tokens. P tokens of prompt, of which F were not there at the last reply, and R
    tokens of reply."""

    turn: Turn
    part: str
    """The agent's part that replied; empty where it has none."""
    frozen: bool
    """The part does not learn."""
    caller: PartCall | None
    """Where the part was called; None of the part that begins."""
    prompt: IntArray
    """[P] all tokens of the segment before the reply."""
    fresh: IntArray
    """[F] the last of them: what followed the segment's reply before; all at its start."""
    token_ids: IntArray
    """[R] what was sampled."""
    logprobs: FloatArray
    """[R]"""
    version_spans: tuple[VersionSpan, ...]
    """Policy versions over the R tokens."""


def replies_of(trajectory: Trajectory) -> Iterator[Reply]:
    """The replies of all turns, in order."""
    positions = dict.fromkeys(range(len(trajectory.segments)), 0)
    for turn in trajectory.turns:
        segment = trajectory.segments[turn.segment]
        sampled = np.flatnonzero(segment.loss_mask)
        first = int(sampled[turn.start]) if turn.start < len(sampled) else len(segment.token_ids)
        end = first + turn.end - turn.start  # a reply is sampled in one piece
        yield Reply(
            turn=turn,
            part=segment.part,
            frozen=segment.frozen,
            caller=segment.caller,
            prompt=segment.token_ids[:first],
            fresh=segment.token_ids[positions[turn.segment] : first],
            token_ids=segment.token_ids[first:end],
            logprobs=segment.logprobs[turn.start : turn.end],
            version_spans=_cut_spans(segment, turn),
        )
        positions[turn.segment] = end


def _cut_spans(segment: Segment, turn: Turn) -> tuple[VersionSpan, ...]:
    """The spans of a turn, counted from its first token."""
    return tuple(
        VersionSpan(
            version=span.version,
            start=max(span.start, turn.start) - turn.start,
            end=min(span.end, turn.end) - turn.start,
        )
        for span in segment.version_spans
        if span.start < turn.end and span.end > turn.start
    )
