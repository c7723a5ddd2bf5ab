"""`understudy demo`: from nothing to a trained agent on one machine, measured.

demonstrations -> small Qwen3 from scratch -> supervised warm-up   (kept; a second run skips it)
-> four roles -> measure base -> reinforce -> measure trained -> result.json, report.html
"""

import fcntl
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.progress import Progress
from launch.report import format_table, write_report
from launch.result import Evaluations, collect_result
from launch.roles import LocalRoles
from understudy.config import Config, load_config, write_config
from understudy.errors import ConfigError
from understudy.supervisor import Supervisor, interrupted_code

_log = logging.getLogger(__name__)

TASKS_PER_EVALUATION = 600
"""Test tasks, a third of them on each level."""
EXPECTED_SECONDS = {
    "demonstrations": 12.0,
    "model": 10.0,
    "warmup": 130.0,
    "start": 40.0,
    "evaluate base": 25.0,
    "reinforce": 330.0,
    "evaluate trained": 25.0,
    "report": 4.0,
}
"""What the stages take on two cores; only for the time left that is shown."""
RESERVE_SECONDS = sum(
    EXPECTED_SECONDS[stage] for stage in ("start", "evaluate base", "evaluate trained", "report")
)

RESULTS = ("metrics.jsonl", "samples.jsonl", "eval-*", "result.json", "report.html")
RUN_FOLDERS = ("log", "checkpoints", "model", "replay")
"""What a demo of the same name has left: files by pattern, and folders. It begins anew."""


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """One file of demonstrations."""

    num: int
    mix: str
    """Weights of levels 1, 2 and 3."""
    carelessness: float = 0.0
    """Chance of an error at each decision of the demonstrator."""


DEMONSTRATIONS = {
    "level1": Demonstrations(num=3000, mix="1:0:0"),
    "easy": Demonstrations(num=3000, mix="2:2:1"),
    "hard": Demonstrations(num=5000, mix="1:1:2"),
    "careless": Demonstrations(num=2500, mix="1:1:1", carelessness=0.34),
}
"""By the names of [learner.supervised.phases]' files."""


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """What the command line asks for."""

    seed: int
    minutes: float
    control: bool
    name: str
    config_file: Path
    overrides: tuple[str, ...] = ()


def run_demo_plan(plan: DemoPlan) -> int:
    """Run the demo to its end, or to Ctrl-C, which leaves what was done. Returns the exit code."""
    demo = Demo(plan)
    code = 0
    try:
        with Supervisor(demo.run_path / "logs") as supervisor, demo.progress:
            demo.run(supervisor)
    except KeyboardInterrupt as interrupt:
        _log.warning("interrupted; what was done is in %s", demo.run_path)
        code = interrupted_code(interrupt)
    result = collect_result(
        demo.run_path, demo.evaluations, demo.progress, demo.config, interrupted=bool(code)
    )
    print(format_table(result))
    print(f"report: {write_report(demo.run_path)}")
    return code


class Demo:
    """One run of the demo."""

    def __init__(self, plan: DemoPlan) -> None:
        config = load_config(plan.config_file, plan.overrides)
        self.plan = plan
        self.run_path = config.run.directory / plan.name
        self.warmup_path = config.run.directory / f"demo-warmup-{plan.seed}"
        self.config = _resolve(config, plan, self.warmup_path)
        self.progress = Progress(EXPECTED_SECONDS)
        self.evaluations = Evaluations()
        _clear(self.run_path)

    def run(self, supervisor: Supervisor) -> None:
        """All stages in order."""
        self._warm_up(supervisor)
        left = self.plan.minutes * 60 - self.progress.elapsed - RESERVE_SECONDS
        config_file = write_config(_limit_time(self.config, left), self.run_path)
        roles = LocalRoles(supervisor, config_file, self.config)
        with self.progress.stage("start"):
            roles.start_services(self.progress.poll)
        self._evaluate(supervisor, roles, "base")
        train = self.config.learner.train
        with self.progress.stage("reinforce", self.run_path / "metrics.jsonl", train.steps):
            roles.train(self.progress.poll)
        self._evaluate(supervisor, roles, "trained")

    def _warm_up(self, supervisor: Supervisor) -> None:
        """Make the base model, unless an earlier run has."""
        if (self.warmup_path / "base" / "config.json").exists():
            return
        self.warmup_path.mkdir(parents=True, exist_ok=True)
        with self.progress.stage("demonstrations"):
            for name, part in DEMONSTRATIONS.items():
                self._demonstrate(supervisor, name, part)
        with self.progress.stage("model"):
            self._run(
                supervisor,
                "model",
                [
                    *("learner.trainer.scratch", "--out", f"{self.warmup_path}/scratch"),
                    *("--text", f"{self.warmup_path}/hard.jsonl", "--seed", str(self.plan.seed)),
                ],
            )
        scratch = self.config.model.model_copy(update={"path": self.warmup_path / "scratch"})
        learner = self.config.learner.model_copy(update={"trainer_cpus": ()})
        config_file = write_config(
            self.config.model_copy(update={"model": scratch, "learner": learner}),
            self.warmup_path,
        )
        lines = self.run_path / "warmup.jsonl"
        with self.progress.stage("warmup", lines):
            self._run(
                supervisor,
                "warmup",
                [
                    *("understudy.cli", "learner", "--part", "trainer", "--stage", "supervised"),
                    *("--config", str(config_file), "--out", f"{self.warmup_path}/base"),
                ],
                lines,
            )

    def _demonstrate(self, supervisor: Supervisor, name: str, part: Demonstrations) -> None:
        self._run(
            supervisor,
            "demonstrations",
            [
                *("envserver.suites.practice.demonstrate", "--num", str(part.num)),
                *("--out", f"{self.warmup_path}/{name}.jsonl", "--seed", str(self.plan.seed)),
                *("--mix", part.mix, "--carelessness", str(part.carelessness)),
            ],
        )

    def _evaluate(self, supervisor: Supervisor, roles: LocalRoles, policy: str) -> None:
        """Play the same held-out tasks with the same seeds, sampled and greedy."""
        with self.progress.stage(f"evaluate {policy}"):
            version = roles.wait_for_newest(self.progress.poll)
            for name, temperature in ((policy, 1.0), (f"{policy}_greedy", 0.0)):
                out = self.run_path / f"eval-{name}.json"
                roles.start(
                    "eval",
                    [
                        *("eval", "--out", str(out), "--temperature", str(temperature)),
                        *("--num-tasks", str(TASKS_PER_EVALUATION), "--seed", str(self.plan.seed)),
                    ],
                )
                supervisor.wait("eval", self.progress.poll)
                self.evaluations.read(name, out, version)

    def _run(
        self, supervisor: Supervisor, name: str, words: list[str], stdout: Path | None = None
    ) -> None:
        supervisor.start(name, [sys.executable, "-m", *words], stdout)
        supervisor.wait(name, self.progress.poll)


def _clear(run_path: Path) -> None:
    """Remove what a demo of the same name has left.

    Raises:
        ConfigError: it still runs, or what is there is no demo.
    """
    lock = run_path / "log" / "lock"
    if lock.exists():
        if not (run_path / "result.json").exists():
            raise ConfigError(
                f"--name {run_path.name}: {run_path} holds a run that is no finished demo; choose "
                "another name, or delete the folder"
            )
        with lock.open() as file:  # as the intake holds it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"--name {run_path.name}: this demo is running") from None
    for pattern in RESULTS:
        for stale in run_path.glob(pattern):
            stale.unlink()
    for name in RUN_FOLDERS:
        shutil.rmtree(run_path / name, ignore_errors=True)


def _resolve(config: Config, plan: DemoPlan, warmup_path: Path) -> Config:
    """The config of this run: its name, seed, model and demonstration files."""
    learner = config.learner
    phases = tuple(
        phase.model_copy(update={"data": warmup_path / phase.data.name} if phase.data else {})
        for phase in learner.supervised.phases
    )
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": plan.name, "seed": plan.seed}),
            "model": config.model.model_copy(update={"path": warmup_path / "base"}),
            "learner": learner.model_copy(
                update={
                    "supervised": learner.supervised.model_copy(update={"phases": phases}),
                    "tasks": learner.tasks.model_copy(update={"shuffle_rewards": plan.control}),
                }
            ),
        }
    )


def _limit_time(config: Config, seconds: float) -> Config:
    train = config.learner.train.model_copy(update={"max_seconds": max(seconds, 1.0)})
    learner = config.learner.model_copy(update={"train": train})
    return config.model_copy(update={"learner": learner})
