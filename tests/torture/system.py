"""All roles of a run on the scripted engine, killed one after the other.

    actor-0, actor-1 --> envserver-0, envserver-1, inference (scripted) --> intake <-- trainer

All but the trainer are real processes; the trainer is the harness's player, without torch. What is
killed is started again at once, as a cluster would do, and nothing else is.
"""

import asyncio
import contextlib
import itertools
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from benchmarks.rollout import REPLIES, _write_bundle
from learner.log.reader import LogReader
from tests.torture.campaign import RUN, Result, free_address
from tests.torture.check import check
from tests.torture.history import History
from tests.torture.players import World, be_impatient
from tests.torture.target import RoleProcess
from tests.torture.trainer import Trainer
from understudy.config import Config, write_config
from understudy.config.base import apply_overrides

NUM_ACTORS = NUM_ENVSERVERS = 2
CONCURRENCY = 16
LEASE_SECONDS = 2.0
SUITE = "tests.torture.suite:CoinSuite"
PROGRESS_SECONDS = 20.0
"""A kill, or a stop that ended, must be followed by two steps within this."""
GOODPUT_SHARE = 0.8


class System:
    """A run's processes and its trainer.

    Args:
        folder: where everything goes.
        seed: of the trainer's whims.
        settings: `section.key=value` of the configuration, where it is to be another.
    """

    def __init__(self, folder: Path, seed: int, settings: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._settings = settings
        self.envservers = [free_address() for _ in range(NUM_ENVSERVERS)]
        self.scrapes: dict[str, str] = {}
        self.config = self._make_config()
        self.config_file = write_config(self.config, folder)
        self.history = History.create(folder / "history.jsonl")
        self.history.knows_payloads = False
        self.world = World(config=self.config, history=self.history, random=random.Random(seed))
        self.processes = self._make_processes()

    def _make_config(self) -> Config:
        _write_bundle(self.folder / "model")
        listen, inference = free_address(), free_address()
        nowhere = "127.0.0.1:0"
        values = {
            "run": {"name": RUN, "directory": str(self.folder)},
            "model": {"path": str(self.folder / "model"), "tools": "signatures"},
            "network": {
                "learner": listen,
                "inference": [inference],
                "envservers": self.envservers,
            },
            "envserver": {
                "metrics_listen": nowhere,
                "suites": ["tests.torture.suite:CoinSuite"],
            },
            "inference": {
                "listen": inference,
                "metrics_listen": nowhere,
                "engine": "scripted",
                "scripted": {"latency_seconds": 0.05, "replies": REPLIES},
            },
            "actor": {"metrics_listen": nowhere, "concurrency": CONCURRENCY},
            "learner": {
                "listen": listen,
                "metrics_listen": nowhere,
                "log": {"segment_bytes": 2**20},
                "tasks": {
                    "suite": "coin",
                    "group_size": 4,
                    "groups_per_batch": 8,
                    "lease_seconds": LEASE_SECONDS,
                },
                "train": {"steps": 1_000_000},
            },
        }
        return Config.model_validate(apply_overrides(values, self._settings))

    def _make_processes(self) -> dict[str, RoleProcess]:
        processes = {"intake": self._process("intake", "learner", "--part", "intake")}
        processes["inference"] = self._process("inference", "inference")
        for number, address in enumerate(self.envservers):
            name = f"envserver-{number}"
            listen = ("--set", f"envserver.listen={address}")
            processes[name] = self._process(name, "envserver", *listen)
        for number in range(NUM_ACTORS):
            name = f"actor-{number}"
            self.scrapes[name] = free_address()
            scrape = ("--set", f"actor.metrics_listen={self.scrapes[name]}")
            processes[name] = self._process(name, "actor", *scrape)
        return processes

    def _process(self, name: str, *words: str) -> RoleProcess:
        arguments = [*words, "--config", str(self.config_file)]
        return RoleProcess("understudy.cli", arguments, self.log(name))

    def log(self, name: str) -> Path:
        """File of a role's output."""
        return self.folder / f"{name}.log"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start everything, and have it at work; end it all on leaving."""
        trainer: asyncio.Task[None] | None = None
        try:
            await self.start("intake")
            trainer = asyncio.create_task(Trainer(self.world, restart_share=0.0).run())
            others = [name for name in self.processes if name != "intake"]
            await asyncio.gather(*(self.start(name) for name in others))
            await self.progress("the start", 60)
            yield
        finally:
            if trainer:
                trainer.cancel()
                [outcome] = await asyncio.gather(trainer, return_exceptions=True)
                if isinstance(outcome, Exception):
                    self.history.violation(f"the trainer failed: {outcome!r}")
            for process in self.processes.values():
                process.send(signal.SIGCONT)
                process.send(signal.SIGTERM)
            for process in self.processes.values():
                await process.ended(15)
                await process.kill()
            self.history.close()

    async def start(self, name: str) -> float:
        """Start a role; returns the seconds until it served."""
        seconds = await self.processes[name].start()
        if seconds is None:
            last = b" | ".join(self.processes[name].tail[-3:]).decode(errors="replace")
            self.history.violation(f"{name} did not start: {last}")
        return seconds or 0.0

    async def progress(self, after: str, seconds: float = PROGRESS_SECONDS) -> float:
        """Wait for two steps more; returns the seconds that they took. A step may have been ready
        before whatever it was that happened."""
        begin, steps = time.monotonic(), self.history.figures["steps"]
        while self.history.figures["steps"] < steps + 2:
            if self.history.violations:
                break
            if time.monotonic() - begin > seconds:
                self.history.violation(f"no progress within {seconds:.0f} s after {after}")
            await asyncio.sleep(0.05)
        return time.monotonic() - begin

    def check_others(self, *except_for: str) -> None:
        """No role ended that was not killed."""
        for name, process in self.processes.items():
            if name not in except_for and not process.running:
                last = b" | ".join(process.tail[-3:]).decode(errors="replace")
                self.history.violation(f"{name} ended with {process.returncode}: {last}")

    def check(self) -> tuple[list[str], dict[str, int]]:
        """What is wrong with the run, now that it has ended; and its figures."""
        found, kinds = check(self.history, self.folder / RUN)
        return found, {**self.history.figures, "stored": kinds["trajectory_stored"]}

    def stored_times(self) -> list[float]:
        """When trajectories were stored, in Unix seconds."""
        reader = LogReader(self.folder / RUN / "log")
        times = [entry.time_us / 1e6 for entry, _ in reader if entry.HasField("trajectory_stored")]
        reader.close()
        return times


def torture(
    seconds: float, seed: int, folder: Path, every: float = 10.0, assert_goodput: bool = True
) -> Result:
    """A calm stretch, then a kill every so many seconds."""
    be_impatient()
    return asyncio.run(_torture(seconds, seed, folder, every, assert_goodput))


async def _torture(
    seconds: float, seed: int, folder: Path, every: float, assert_goodput: bool
) -> Result:
    begin = time.monotonic()
    system = System(folder, seed)
    result = Result(campaign="system", seed=seed)
    calm_seconds = min(max(seconds / 6, 8), 60)
    recoveries: dict[str, list[float]] = {}
    async with system.running():
        await asyncio.sleep(3)
        marks = [time.time()]
        await asyncio.sleep(calm_seconds)
        marks.append(time.time())
        for name in _victims(random.Random(seed)):
            if time.time() - marks[1] + every > seconds or system.history.violations:
                break
            await _kill(system, result, name, recoveries, every)
        marks.append(time.time())
    result.violations, result.figures = system.check()
    times = system.stored_times()
    calm, chaos = (
        sum(start <= at < end for at in times) / (end - start)
        for start, end in itertools.pairwise(marks)
    )
    result.extra = {
        "calm_per_s": round(calm, 1),
        "chaos_per_s": round(chaos, 1),
        "goodput": round(chaos / calm, 3) if calm else 0.0,
        "progress_seconds": {
            name: round(max(values), 1) for name, values in sorted(recoveries.items())
        },
    }
    if assert_goodput and chaos < GOODPUT_SHARE * calm:
        result.violations.append(f"goodput {chaos / calm:.2f} is below {GOODPUT_SHARE}")
    result.seconds = time.monotonic() - begin
    return result


async def _kill(
    system: System, result: Result, name: str, recoveries: dict[str, list[float]], every: float
) -> None:
    at = time.monotonic()
    system.check_others()
    await system.processes[name].kill()
    result.kills += 1
    system.history.write("killed", name=name)
    result.restart_seconds.append(await system.start(name))
    took = await system.progress(f"the kill of {name}")
    recoveries.setdefault(name, []).append(took)
    system.check_others()
    await asyncio.sleep(max(at + every - time.monotonic(), 0))


def _victims(draw: random.Random) -> Iterator[str]:
    """One of each kind, in any order, over and over."""
    kinds = {
        "actor": [f"actor-{n}" for n in range(NUM_ACTORS)],
        "envserver": [f"envserver-{n}" for n in range(NUM_ENVSERVERS)],
        "intake": ["intake"],
    }

    while True:
        order = list(kinds)
        draw.shuffle(order)
        yield from (draw.choice(kinds[kind]) for kind in order)
