"""When a run stored, stepped and started again, read from its log and its roles' afterwards."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from learner.log.reader import LogReader

RESUME_SECONDS = 10.0
"""The most that going on may take beyond imports and the engine's start."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill, and which start it made necessary."""

    name: str
    at: float
    """Unix seconds."""
    engine: bool
    """Whether the inference server has to start again; the trainer always has to."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Unix seconds of what happened, in order."""

    stored: Sequence[float]
    """Trajectories."""
    steps: Sequence[float]
    """The trainer's, completed."""
    trainers: Sequence[float]
    """Trainers that had imported what they need and registered."""
    engines: Sequence[float]
    """Inference servers that began to serve."""

    @classmethod
    def read(cls, run_path: Path) -> "Timeline":
        """Take a run's folder, while it runs or afterwards."""
        times: dict[str, list[float]] = {
            kind: [] for kind in ("trajectory_stored", "step_completed", "trainer_started")
        }
        reader = LogReader(run_path / "log")
        for entry, _ in reader:
            if (kind := entry.WhichOneof("event")) in times:
                times[kind].append(entry.time_us / 1e6)
        reader.close()
        return cls(
            stored=times["trajectory_stored"],
            steps=times["step_completed"],
            trainers=times["trainer_started"],
            engines=_serving_times(run_path / "logs" / "inference.log"),
        )

    def stored_per_second(self, start: float, end: float) -> float:
        """Trajectories a second within a stretch."""
        return sum(start <= at < end for at in self.stored) / (end - start)

    def restart(self, kill: Kill) -> tuple[float, float]:
        """Seconds from a kill until imports and the engine's start were done, and from then until
        the run had stored a trajectory and completed a step; infinite where it never did."""
        starts = (self.trainers, self.engines) if kill.engine else (self.trainers,)
        up = max(_first(times, kill.at) for times in starts)
        going_on = max(_first(times, up) for times in (self.stored, self.steps))
        return up - kill.at, going_on - up

    def goodput(self, marks: tuple[float, float, float], kills: Sequence[Kill]) -> dict[str, float]:
        """Trajectories under kills as a share of those in calm, beside what starts allow.

        Args:
            marks: begin of the calm stretch, its end, and the end of the kills.
            kills: those between the last two marks.
        """
        calm, chaos = (self.stored_per_second(*pair) for pair in itertools.pairwise(marks))
        starting = sum(self.restart(kill)[0] for kill in kills)
        return {
            "calm_per_s": round(calm, 2),
            "chaos_per_s": round(chaos, 2),
            "goodput": round(chaos / calm, 3) if calm else 0.0,
            "goodput_bound": round(1 - starting / (marks[2] - marks[1]), 3),
        }


def _first(times: Sequence[float], start: float) -> float:
    return next((at for at in times if at >= start), float("inf"))


def _serving_times(log: Path) -> list[float]:
    """Of a role's output, whose lines are JSON but for what libraries print."""
    lines = (line for line in log.read_text().splitlines() if line.startswith('{"time"'))
    records = map(json.loads, lines)
    return [record["time"] for record in records if record["message"].endswith(" is serving")]
