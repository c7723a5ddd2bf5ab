"""A campaign: players at work, crash after crash of the intake, and the check at the end."""

import asyncio
import contextlib
import itertools
import json
import random
import signal
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.torture.check import check
from tests.torture.disks import PlainDisk
from tests.torture.history import History
from tests.torture.players import VOCAB_SIZE, Actor, Ghost, World, be_impatient
from tests.torture.target import RoleProcess
from tests.torture.trainer import Trainer
from understudy.config import Config, write_config

RUN = "run"
NUM_ACTORS = 4
FAILPOINTS = {
    "log.after_append": 300,
    "log.after_write": 60,
    "log.after_fdatasync": 60,
    "log.at_roll": 3,
    "log.after_create": 3,
    "intake.before_ack": 30,
}
"""Failpoints of the intake, and the highest hit at which a process is to die there."""
MOST_KILLS_A_RUN = 50
"""A start reads the whole log: past that, campaigns go on with a new run."""
STUCK_SECONDS = 20.0
"""Without any ack for so long after a start, something is stuck."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a campaign does."""

    name: str
    seed: int = 0
    kills: int = 10
    mean_seconds: float = 0.3
    """Mean time from the first ack, or from a start, to the crash."""
    failpoints: Sequence[str] = ()
    """Where the intake dies instead, one start after the other: "name:count"."""
    bug: str = ""
    retention: str = "all"
    segment_bytes: int = 2**17
    sync_seconds: float = 0.0
    """What each fdatasync takes longer than here: a slow disk."""
    disk: Callable[[Path], PlainDisk] = PlainDisk


@dataclass(kw_only=True)
class Result:
    """What became of a campaign."""

    campaign: str
    seed: int
    kills: int = 0
    kills_at_work: int = 0
    """Kills after at least one ack since the start."""
    seconds: float = 0.0
    restart_seconds: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """What only some cases measure."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.violations

    def line(self) -> str:
        """One JSON object."""
        starts = self.restart_seconds or [0.0]
        return json.dumps(
            {
                **asdict(self),
                "seconds": round(self.seconds, 1),
                "restart_seconds": {
                    "mean": round(statistics.mean(starts), 3),
                    "max": round(max(starts), 3),
                },
                "ok": self.ok,
            }
        )

    def summary(self) -> str:
        """One line for people."""
        figures = self.figures
        verdict = "ok" if self.ok else f"{len(self.violations)} VIOLATIONS: {self.violations[0]}"
        stored = figures.get("acked") or figures.get("stored", 0)
        return (
            f"{self.campaign}: {self.kills} crashes ({self.kills_at_work} at work) in "
            f"{self.seconds:.0f} s; {stored} records acked, "
            f"{figures.get('steps', 0)} steps, {figures.get('trainers', 0)} trainers; "
            f"{json.dumps(self.extra) + '; ' if self.extra else ''}{verdict}"
        )


def run_campaign(plan: Plan, folder: Path) -> Result:
    """Run a campaign in a folder of its own, which stays there for whoever wants to look."""
    be_impatient()
    return asyncio.run(Campaign(plan, folder).run())


def split_kills(kills: int, **fields: Any) -> Iterator[Plan]:
    """Plans that add up to so many kills; retention and sizes of segments vary."""
    seed = fields.pop("seed", 0)
    for number in itertools.count():
        if kills <= 0:
            return
        share = min(kills, MOST_KILLS_A_RUN)
        kills -= share
        yield Plan(
            seed=seed + number,
            kills=share,
            retention=("all", "checkpoint")[number % 2],
            segment_bytes=(2**17, 2**15, 2**20)[number % 3],
            **fields,
        )


class Campaign:
    """One run, from its first start to the check.

    Args:
        plan: what to do.
        folder: where the run, its logs and the history go.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.plan = plan
        self.folder = folder
        self.result = Result(campaign=plan.name, seed=plan.seed)
        self.disk = plan.disk(folder)
        self.random = random.Random(plan.seed)
        self.config = make_config(plan, folder, self.disk.folder)
        self.history = History.create(folder / "history.jsonl")
        self.world = World(config=self.config, history=self.history, random=self.random)
        self.intake = self._intake(write_config(self.config, folder))

    def _intake(self, config_file: Path) -> RoleProcess:
        module, arguments = "learner.intake", ["--config", str(config_file)]
        changed = [*self.disk.arguments, *(("--bug", self.plan.bug) if self.plan.bug else ())]
        if self.plan.sync_seconds:
            changed += ["--sync-seconds", str(self.plan.sync_seconds)]
        if changed:
            module, arguments = "tests.torture.buggy_intake", [*changed, *arguments]
        return RoleProcess(module, arguments, self.folder / "intake.log")

    async def run(self) -> Result:
        """Do all of it."""
        begin = time.monotonic()
        await self.disk.open()
        try:
            async with self._playing():
                if self.plan.failpoints:
                    await self._die_at_failpoints()
                else:
                    await self._die_at_random()
                await self._end()
            await self._check()
        finally:
            await self.intake.kill()
            await self.disk.close()
            self.history.close()
        self.result.seconds = time.monotonic() - begin
        return self.result

    @contextlib.asynccontextmanager
    async def _playing(self) -> AsyncIterator[None]:
        """Have all players at it; one that fails has said why in the history, or is a mistake."""
        actors = [Actor(self.world, f"actor-{number}") for number in range(NUM_ACTORS)]
        runs = [actor.run() for actor in actors]
        runs += [Ghost(self.world).run(), Trainer(self.world).run()]
        tasks = [asyncio.create_task(run) for run in runs]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    self.history.violation(f"a player failed: {outcome!r}")

    async def _die_at_random(self) -> None:
        for _ in range(self.plan.kills):
            if not await self._start() or self.history.violations:
                return
            # Most crashes are to hit work, some the start.
            if self.random.random() < 0.8 and not await self._progress() and self.intake.running:
                return
            await self._choose_moment()
            if not self.intake.running:
                self._violate_end()
                return
            self._count_kill()
            await self.disk.crash(self.intake)

    async def _choose_moment(self) -> None:
        """Let a random time pass; then, for every other crash, the next ack decides."""
        await asyncio.sleep(self.random.expovariate(1 / self.plan.mean_seconds))
        if self.random.random() < 0.5 and self.world.acked.is_set():
            self.world.acked.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self.world.acked.wait()
            self.world.acked.set()

    async def _die_at_failpoints(self) -> None:
        for failpoint in self.plan.failpoints:
            await self._start(failpoint)
            if not await self.intake.ended(STUCK_SECONDS):
                self.history.violation(f"{failpoint} was never hit")
                return
            if self.intake.returncode != -signal.SIGKILL:
                self._violate_end()
                return
            self._count_kill()

    async def _end(self) -> None:
        """A last start must serve and take records; then the intake is told to end."""
        if self.history.violations or not await self._start() or not await self._progress():
            return
        step = self.history.figures["steps"]
        if not await self._wait(lambda: self.history.figures["steps"] > step):
            self.history.violation("the trainer took no step after the last start")
        self.intake.send(signal.SIGTERM)
        if not await self.intake.ended(30) or self.intake.returncode:
            self._violate_end()

    async def _start(self, failpoint: str = "") -> bool:
        self.world.acked.clear()
        seconds = await self.intake.start(failpoint)
        self.history.write("start", seconds=seconds, failpoint=failpoint)
        if seconds is not None:
            self.result.restart_seconds.append(seconds)
            return True
        if self.plan.bug and not self.result.restart_seconds:
            # A bug that could not be seeded must not pass for one that was found.
            last = b"".join(self.intake.tail).decode(errors="replace")
            raise RuntimeError(f"the intake with {self.plan.bug} did not start: {last}")
        if not failpoint:
            self._violate_end()
        return False

    async def _progress(self) -> bool:
        acked = self.world.acked
        if await self._wait(acked.is_set) or self.history.violations or not self.intake.running:
            return acked.is_set()
        self.history.violation(f"no record was acked within {STUCK_SECONDS:.0f} s of a start")
        return False

    async def _wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until something holds; False if nothing comes of it."""
        deadline = time.monotonic() + STUCK_SECONDS
        while not condition() and not self.history.violations and self.intake.running:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.005)
        return condition()

    def _count_kill(self) -> None:
        self.history.write("kill", acked=len(self.history.acked))
        self.result.kills += 1
        self.result.kills_at_work += self.world.acked.is_set()

    def _violate_end(self) -> None:
        last = b" | ".join(self.intake.tail[-3:]).decode(errors="replace")[-1500:]
        self.history.violation(f"the intake ended with {self.intake.returncode}: {last}")

    async def _check(self) -> None:
        run = self.disk.folder / RUN
        found, kinds = await asyncio.to_thread(check, self.history, run)
        self.result.violations = found
        self.result.figures = {**self.history.figures, "stored": kinds["trajectory_stored"]}
        (self.folder / "violations.txt").write_text("".join(f"{text}\n" for text in found))


def free_address() -> str:
    """An address for a server that is killed and started again. Its port is none that the kernel
    gives to connections, which would take it while the server is down."""
    for port in random.sample(range(16_384, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return f"127.0.0.1:{port}"
    raise AssertionError("no free port from 16384 to 32000")


def make_config(plan: Plan, folder: Path, runs: Path) -> Config:
    """A run of four groups of four a batch, whose leases expire soon."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    return Config.model_validate(
        {
            "run": {"name": RUN, "directory": runs, "seed": plan.seed},
            "model": {"path": model},
            "learner": {
                "listen": free_address(),
                "metrics_listen": "127.0.0.1:0",
                "log": {"segment_bytes": plan.segment_bytes, "retention": plan.retention},
                "tasks": {
                    "group_size": 4,
                    "groups_per_batch": 4,
                    "max_staleness": 1,
                    "max_tokens": 2000,
                    "lease_seconds": 1.0,
                },
                "train": {"steps": 1_000_000},
            },
        }
    )
