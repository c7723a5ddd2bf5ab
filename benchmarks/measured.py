"""A model's folder served as a run serves it, and measured by `understudy eval`.

For benchmarks that put the same policy before several suites: same tasks, same seeds, one engine.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rollout import free_address
from launch.roles import LocalRoles
from understudy.config import Config, load_config, write_config
from understudy.supervisor import Supervisor

DEMO = Path("configs/demo.toml")
Tables = Mapping[str, Mapping[str, Any]]
"""Suites as in `[envserver.suites.NAME]`."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One evaluation."""

    result: dict[str, Any]
    """What `understudy eval` wrote."""
    attempts: Sequence[dict[str, Any]]
    """Lines of the attempts' file, in order of tasks."""

    def figures(self, group: str = "all") -> dict[str, Any]:
        """pass@1 of a group of tasks, with its bootstrap interval."""
        (at,) = self.result["accuracy"][group]["pass_at_k"]
        low, high = at["ci95"]
        return {"pass@1": round(at["value"], 4), "ci95": [round(low, 4), round(high, 4)]}


class Measuring:
    """Servers that stand ready, with one policy."""

    def __init__(self, supervisor: Supervisor, roles: LocalRoles, config_file: Path) -> None:
        self._supervisor, self._roles, self._folder = supervisor, roles, config_file.parent
        self.config_file = config_file

    def evaluate(
        self,
        name: str,
        suite: str,
        num_tasks: int,
        temperature: float,
        settings: Sequence[str] = (),
    ) -> Measured:
        """One attempt at each of the first test tasks of a suite; `name` is unique."""
        out = self._folder / f"{name}.json"
        words = ["eval", "--out", str(out), "--suite", suite, "--num-tasks", str(num_tasks)]
        words += ["--temperature", str(temperature), *(f"--set={each}" for each in settings)]
        self._roles.start("eval", words)
        self._supervisor.wait("eval")
        lines = out.with_name(f"{name}.attempts.jsonl").read_text().splitlines()[1:]
        attempts = sorted(map(json.loads, lines), key=lambda attempt: attempt["task"])
        return Measured(result=json.loads(out.read_text()), attempts=attempts)


@contextmanager
def measuring(
    folder: Path, model: Path, suites: Tables, settings: Sequence[str] = ()
) -> Iterator[Measuring]:
    """Serve a model with the demo's configuration, and suites.

    Args:
        folder: of logs and results; what is there already is thrown away.
        model: a folder as `make demo` leaves it; it is only read.
        settings: `section.key=value`, beside those of addresses.
    """
    shutil.rmtree(folder, ignore_errors=True)
    config = _config(folder, model, suites, settings)
    with Supervisor(folder / "logs") as supervisor:
        config_file = write_config(config, folder)
        roles = LocalRoles(supervisor, config_file, config)
        roles.start_services()
        roles.wait_for_newest()
        yield Measuring(supervisor, roles, config_file)


def _config(folder: Path, model: Path, suites: Tables, settings: Sequence[str]) -> Config:
    learner, inference, envserver = (free_address() for _ in range(3))
    placed = [
        f"run.directory={folder.parent}",
        f"run.name={folder.name}",
        f"model.path={model}",
        f"network.learner={learner}",
        f'network.inference=["{inference}"]',
        f'network.envservers=["{envserver}"]',
        f"learner.listen={learner}",
        f"inference.listen={inference}",
        f"envserver.listen={envserver}",
        "learner.trainer_metrics_listen=127.0.0.1:0",
        "learner.ranks=1",
        *(f"{role}.metrics_listen=127.0.0.1:0" for role in ("learner", "inference", "envserver")),
    ]
    config = load_config(DEMO, [*placed, *settings])
    tables = {name: dict(table) for name, table in suites.items()}
    served = config.envserver.model_copy(update={"suites": tables})
    return config.model_copy(update={"envserver": served})
