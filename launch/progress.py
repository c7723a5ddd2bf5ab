"""What people see while a run goes on: one table on a terminal, one line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch.tail import Tail

_LINE_EVERY_SECONDS = 10.0
_LOOK_EVERY_SECONDS = 0.5
_RECENT_STEPS = 10


class Progress:
    """Names the stage and shows the newest figures; `poll` is called often and does little.

    Stages are timed: `seconds` has the wall time of each that has ended.
    """

    def __init__(self, stages: dict[str, float]) -> None:
        """Take the stages in order, with the seconds that each is expected to take."""
        self.seconds: dict[str, float] = {}
        self._expected = stages
        self._stage = ""
        self._stage_start = self._start = time.monotonic()
        self._looked = self._said = 0.0
        self._figures: dict[str, str] = {}
        self._heldout: dict[str, str] = {}
        self._share_done: float | None = None
        self._tail: Tail | None = None
        self._steps: list[dict[str, Any]] = []
        self._num_steps = 0
        self._console = Console(file=sys.stderr)
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    @contextlib.contextmanager
    def stage(self, name: str, follow: Path | None = None, num_steps: int = 0) -> Iterator[None]:
        """Time a stage and show the JSON lines that it writes to `follow`."""
        self._stage, self._stage_start = name, time.monotonic()
        self._tail = Tail(follow) if follow else None
        if self._tail:
            self._tail.new_lines()  # of a run that is taken up
        self._share_done, self._num_steps, self._steps = None, num_steps, []
        self._show(force=True)
        try:
            yield
        finally:
            self.poll(force=True)
            self.seconds[name] = round(time.monotonic() - self._stage_start, 2)

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._start

    def poll(self, force: bool = False) -> None:
        """Look for news at most twice a second."""
        now = time.monotonic()
        if not force and now - self._looked < _LOOK_EVERY_SECONDS:
            return
        self._looked = now
        for line in self._tail.new_lines() if self._tail else []:
            self._take(line)
        self._show(force)

    def _take(self, line: dict[str, Any]) -> None:
        if line.get("stage") == "supervised":
            self._share_done = line["step"] / line["steps"]
            self._figures = {
                "step": f"{line['step']}/{line['steps']}",
                "loss": f"{line['loss']:.3f}",
                "tokens/s": f"{line['tokens_per_s']:,}",
            }
        elif line.get("kind") == "step":
            self._steps.append(line)
            first = self._steps[0]["step"]  # not 0 in a run that was taken up
            self._share_done = (line["step"] + 1 - first) / max(self._num_steps - first, 1)
            figures = _step_figures(self._steps[-_RECENT_STEPS:], self._num_steps)
            self._figures = figures | self._heldout
        elif line.get("kind") == "evaluation" and line.get("heldout_accuracy") is not None:
            self._heldout = {"held out": f"{line['heldout_accuracy']:.3f} ({line['step']})"}
            self._figures |= self._heldout

    def _show(self, force: bool) -> None:
        now = time.monotonic()
        if self._live:
            self._live.update(self._table(), refresh=True)
        elif force or now - self._said >= _LINE_EVERY_SECONDS:
            self._said = now
            figures = "  ".join(f"{name} {value}" for name, value in self._figures.items())
            print(
                f"[{self.elapsed:5.0f} s] {self._stage:<16} {figures}  left ~{self._left():.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def _table(self) -> Table:
        table = Table(title="understudy", title_justify="left", expand=False)
        names = ["stage", "elapsed", "left", *self._figures]
        for name in names:
            table.add_column(name, justify="left" if name == "stage" else "right")
        for name, seconds in self.seconds.items():
            table.add_row(f"[dim]{name}[/dim]", f"[dim]{seconds:.0f} s[/dim]", "")
        elapsed = time.monotonic() - self._stage_start
        figures = self._figures.values()
        table.add_row(
            f"[bold]{self._stage}[/bold]", f"{elapsed:.0f} s", f"{self._left():.0f} s", *figures
        )
        return table

    def _left(self) -> float:
        """Seconds until the end, from this stage's progress and what later ones should take."""
        elapsed = time.monotonic() - self._stage_start
        if self._share_done:
            left = elapsed * (1 - self._share_done) / self._share_done
        else:
            left = max(self._expected.get(self._stage, 0.0) - elapsed, 0.0)
        names = list(self._expected)
        later = names[names.index(self._stage) + 1 :] if self._stage in names else []
        return left + sum(self._expected[name] for name in later)


def _step_figures(steps: list[dict[str, Any]], num_steps: int) -> dict[str, str]:
    last = steps[-1]
    seconds = max(last["time"] - steps[0]["time"], 1e-9)
    later = steps[1:]
    rates = {}
    if later:
        trajectories = sum(step["episodes"] for step in later)
        tokens = sum(step["episodes"] * step["tokens_mean"] for step in later)
        rates = {
            "trajectories/s": f"{trajectories / seconds:.0f}",
            "tokens/s": f"{tokens / seconds:,.0f}",
        }
    return {
        "step": f"{last['step'] + 1}/{num_steps}",
        "reward": f"{sum(step['reward_mean'] for step in steps) / len(steps):.3f}",
        **rates,
        "version": f"{last.get('version', 0)}",
        "staleness": f"{last.get('staleness_mean', 0.0):.2f}",
    }
