"""The run's journal: the sole writer of `metrics.jsonl` and `samples.jsonl`.

Each line of metrics.jsonl is an object with `kind` ("step", "version", "replica" or "evaluation")
and `time` (Unix seconds); the other fields are the figures of that kind. A value that is not finite
is null.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from understudy.errors import ConfigError
from understudy.trajectory import Segment, Trajectory

_log = logging.getLogger(__name__)


class Journal:
    """Appends lines to a run's two journals; each line reaches the file at once."""

    def __init__(self, folder: Path) -> None:
        """Open the journals of a run's folder.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._metrics = _open(folder / "metrics.jsonl")
            self._samples = _open(folder / "samples.jsonl")
        except OSError as error:
            raise ConfigError(
                f"run.directory: {folder} cannot be written ({error.strerror}); choose another"
            ) from None

    def step(self, step: int, figures: Mapping[str, Any]) -> None:
        """A step was taken."""
        _write(self._metrics, {"kind": "step", "time": _now(), "step": step, **figures})

    def version(self, version: int, figures: Mapping[str, Any]) -> None:
        """A version was committed."""
        _write(self._metrics, {"kind": "version", "time": _now(), "version": version, **figures})

    def replica(self, replica_id: str, figures: Mapping[str, Any]) -> None:
        """A replica serves a version."""
        line = {"kind": "replica", "time": _now(), "replica_id": replica_id, **figures}
        _write(self._metrics, line)

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """An evaluation of a version that has so many steps behind it has ended."""
        _write(self._metrics, {"kind": "evaluation", "time": _now(), "step": step, **figures})

    def samples(self, step: int, version: int, trajectories: Sequence[Trajectory]) -> None:
        """Some episodes of a step's batch."""
        for trajectory in trajectories:
            line = {
                "step": step,
                "version": version,
                "task_id": trajectory.task_id,
                "level": trajectory.level,
                "reward": trajectory.reward,
                "num_turns": len(trajectory.turns),
                "segments": [_segment(segment) for segment in trajectory.segments],
            }
            if any(segment.part for segment in trajectory.segments):
                line["turns"] = [[turn.segment, turn.start, turn.end] for turn in trajectory.turns]
            _write(self._samples, line)

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._samples.close()


def _open(path: Path) -> IO[str]:
    """Open for appending; a line that a crash cut short stays a line of its own."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return path.open("a", encoding="ascii", buffering=1)


def _now() -> float:
    return round(time.time(), 3)


def _segment(segment: Segment) -> dict[str, Any]:
    line: dict[str, Any] = {
        "token_ids": segment.token_ids.tolist(),
        "loss_mask": segment.loss_mask.astype(int).tolist(),
    }
    if segment.part:
        line |= {"part": segment.part, "frozen": segment.frozen}
        line["caller"] = segment.caller and [segment.caller.turn, segment.caller.tool_call]
    return line


def _write(file: IO[str], line: Mapping[str, Any]) -> None:
    # JSON has no NaN, which a diverged run reports.
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }
    try:
        file.write(json.dumps(finite, allow_nan=False) + "\n")
    except OSError as error:  # a run does not end for a line that people read
        _log.error("%s: a line is lost: %s", file.name, error.strerror)
