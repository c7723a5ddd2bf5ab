"""`understudy track RUN`: a run's figures for TensorBoard or Weights & Biases.

    metrics.jsonl --lines of steps and evaluations--> one scalar a figure --> event files, or W&B

Reads what the intake writes, beside the run or after it: no role knows of it, none waits for it.
"""

import contextlib
import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.tail import Tail
from understudy.errors import ConfigError

POLL_SECONDS = 2.0
_NO_FIGURES = ("step", "time", "version")

Log = Callable[[int, Mapping[str, float]], None]
"""Takes the figures of one step."""


def track(run_path: Path, destination: str, follow: bool) -> int:
    """Copy all figures that are there, and with `follow` those that come; returns how many lines.

    Raises:
        ConfigError: there is no such run, or the destination's package is not installed.
    """
    metrics = run_path / "metrics.jsonl"
    if not metrics.exists():
        raise ConfigError(f"{metrics} does not exist; name the folder of a run, e.g. runs/demo")
    tail, num_lines = Tail(metrics), 0
    with DESTINATIONS[destination](run_path) as log:
        while True:
            for line in tail.new_lines():
                if figures := scalars(line):
                    log(line["step"], figures)
                    num_lines += 1
            if not follow:
                return num_lines
            time.sleep(POLL_SECONDS)


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Figures of a line by the name that they are shown under; none of lines of other kinds."""
    prefix = {"step": "train", "evaluation": "heldout"}.get(line.get("kind", ""))
    if prefix is None:
        return {}
    return {
        f"{prefix}/{name.removeprefix('heldout_')}": float(value)
        for name, value in line.items()
        if name not in _NO_FIGURES and type(value) in (int, float)
    }


@contextlib.contextmanager
def _tensorboard(run_path: Path) -> Iterator[Log]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise _missing("tensorboard", "tensorboardX") from None
    writer = SummaryWriter(str(run_path / "tensorboard"))

    def log(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    with contextlib.closing(writer):
        yield log


@contextlib.contextmanager
def _wandb(run_path: Path) -> Iterator[Log]:
    try:
        import wandb
    except ImportError:
        raise _missing("wandb", "wandb") from None
    path = run_path.resolve()
    identity = hashlib.sha256(f"{socket.gethostname()}:{path}".encode()).hexdigest()[:16]
    with wandb.init(
        project="understudy", name=path.name, id=identity, resume="allow", dir=run_path
    ) as run:
        # A run that goes on from a checkpoint takes steps again: W&B's own count only rises.
        run.define_metric("*", step_metric="step")
        yield lambda step, figures: run.log({"step": step, **figures})


def _missing(extra: str, package: str) -> ConfigError:
    return ConfigError(f"{package} is not installed; pip install 'understudy[{extra}]'")


DESTINATIONS: Mapping[str, Callable[[Path], contextlib.AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
