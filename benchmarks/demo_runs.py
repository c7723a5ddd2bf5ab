"""Short runs of the demo's agent, for benchmarks that compare how it learns."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BASE = Path("runs/demo-warmup-0/base")
"""The model that `make demo` warms up."""
_SERVERS = ("learner", "inference", "envserver")


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a run wrote to metrics.jsonl."""

    steps: Sequence[dict[str, Any]]
    evaluations: Sequence[dict[str, Any]]
    began: float
    """When its first version was there, in seconds since 1970."""

    @property
    def heldout(self) -> list[list[float]]:
        """[step, accuracy] of each evaluation."""
        return [[line["step"], round(line["heldout_accuracy"], 4)] for line in self.evaluations]

    @property
    def heldout_seconds(self) -> list[float]:
        """Seconds from the first version to each evaluation's end."""
        return [round(line["time"] - self.began, 1) for line in self.evaluations]


def play(folder: Path, settings: Iterable[str], port: int) -> Played:
    """Run the demo's configuration from its warmed-up model.

    Args:
        folder: of the run; what is there already is thrown away.
        settings: `section.key=value`, beside those of addresses.
        port: first of three ports.

    Raises:
        RuntimeError: the run failed; the message ends with what it said last.
    """
    shutil.rmtree(folder, ignore_errors=True)
    addresses = {role: f"127.0.0.1:{port + index}" for index, role in enumerate(_SERVERS)}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "understudy.cli", "run", "--config", "configs/demo.toml"),
            *(f"--set={setting}" for setting in (*_placed(folder, addresses), *settings)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{folder} ended with {done.returncode}: {done.stderr[-2000:]}")
    lines = list(read_lines(folder / "metrics.jsonl"))
    return Played(
        steps=[line for line in lines if line["kind"] == "step"],
        evaluations=[line for line in lines if line["kind"] == "evaluation"],
        began=lines[0]["time"],
    )


def _placed(folder: Path, addresses: dict[str, str]) -> Iterator[str]:
    yield f"run.directory={folder.parent}"
    yield f"run.name={folder.name}"
    yield f"model.path={BASE}"
    yield f"network.learner={addresses['learner']}"
    yield f'network.inference=["{addresses["inference"]}"]'
    yield f'network.envservers=["{addresses["envserver"]}"]'
    for role, address in addresses.items():
        yield f"{role}.listen={address}"
    for role in (*_SERVERS, "actor"):
        yield f"{role}.metrics_listen=127.0.0.1:0"
    yield "learner.trainer_metrics_listen=127.0.0.1:0"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file; none where it is not there."""
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())
