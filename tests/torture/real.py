"""`understudy run` with vLLM and two trainer ranks, hit hard every few minutes.

First a trainer rank is stopped for a while, which the intake must notice and which ends no process.
Then are killed in turn: the inference server, a trainer rank, everything at once. torchrun starts
a rank again; where `understudy run` ends, it is started again, as a cluster would do, and goes on
from the newest checkpoint. Each time there must follow steps that the run has not taken before, and
once everything is imported and the engine has started, the run must soon be at work. Trajectories a
second are compared with those of a calm stretch, and with what the starts alone leave of them.
"""

import contextlib
import itertools
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from learner.audit import audit_run
from learner.log.reader import LogReader
from tests.test_end_to_end import CONFIG, run_module
from tests.torture.campaign import Result, free_address
from tests.torture.target import ROOT
from tests.torture.timeline import RESUME_SECONDS, Kill, Timeline

KILL_EVERY_SECONDS = 180.0
START_SECONDS = 300.0
"""vLLM takes its time."""
CHECKPOINT_EVERY_STEPS = 3
ROLE, INFERENCE = "understudy.cli ", "understudy.cli inference"
TRAINER = "learner.trainer.main --stage"
LAUNCHER = "--nproc-per-node"
"""In torchrun's command line, which has the ranks' in it."""
STOP_SECONDS, NOTICE_SECONDS = 30.0, 11.0
"""How long a rank stands still; keepalive's 5 s and its timeout's 5 s, and the time to look."""
NOTICE = b"does not answer"


class Run:
    """One run's folder, and whichever process serves it now."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.path = folder / "e2e"
        self._config_file = self._prepare()
        self._process: subprocess.Popen[bytes] | None = None
        self.num_starts = 0

    def _prepare(self) -> Path:
        demonstrations = str(self.folder / "demonstrations.jsonl")
        run_module(
            *("envserver.suites.practice.demonstrate", "--num", "300", "--out", demonstrations)
        )
        model = str(self.folder / "model")
        run_module("learner.trainer.scratch", "--text", demonstrations, "--out", model)
        text = CONFIG.format(folder=self.folder, steps=1_000_000)
        # The test's own ports belong to the test.
        ports = {
            port: free_address() for port in sorted(set(re.findall(r"127\.0\.0\.1:\d+", text)))
        }
        for old, new in ports.items():
            text = text.replace(old, new)
        every = f"checkpoint_every_steps = {CHECKPOINT_EVERY_STEPS}"
        path = self.folder / "run.toml"
        path.write_text(text.replace("ranks = 2\n", f"ranks = 2\n{every}\n"))
        return path

    def start(self) -> None:
        """Start `understudy run`."""
        self.num_starts += 1
        with (self.folder / "run.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "understudy.cli", "run", "--config", str(self._config_file)],
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )

    def keep_running(self) -> None:
        """Start it again if it has ended."""
        if self._process is None or self._process.poll() is not None:
            self.start()

    def family(self) -> list[psutil.Process]:
        """The command and all its descendants."""
        if self._process is None or self._process.poll() is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def find(self, words: str) -> list[psutil.Process]:
        """Processes whose command line has the words; of torchrun's, the ranks only."""
        commands = ((process, _command(process)) for process in self.family())
        return [process for process, line in commands if words in line and LAUNCHER not in line]

    def kill(self, words: str, draw: random.Random) -> int:
        """kill -9 of one process whose command line has the words, or of all; returns how many."""
        family = self.family()
        if words:
            found = self.find(words)
            family = [draw.choice(found)] if found else []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return len(family)

    def newest_step(self) -> int:
        """Highest step that the log has completed; -1 before the first."""
        reader = LogReader(self.path / "log")
        entries = (entry for entry, _ in reader if entry.HasField("step_completed"))
        newest = max((entry.step_completed.step for entry in entries), default=-1)
        reader.close()
        return newest

    def stop(self) -> None:
        """Ctrl-C, and force for whoever is left."""
        family = self.family()
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def torture(seconds: float, seed: int, folder: Path, every: float = KILL_EVERY_SECONDS) -> Result:
    """Kill after kill for so many seconds; each kind at least once if the time allows."""
    begin = time.monotonic()
    result = Result(campaign="real", seed=seed)
    draw = random.Random(seed)
    run = Run(folder)
    recoveries: dict[str, float] = {}
    kills: list[Kill] = []
    noticed, calm, chaos, end = None, 0.0, 0.0, 0.0
    try:
        run.start()
        recoveries["start"] = _progress(run, result, "the start")
        noticed = _stand_still(run, result, draw)
        calm = time.time()
        _wait(lambda: False, run, every / 2)
        chaos = time.time()
        for name, words in _victims():
            if result.violations or time.monotonic() - begin + every > seconds:
                break
            at = time.monotonic()
            if not run.kill(words, draw):
                result.violations.append(f"{name}: nothing of the kind runs")
                break
            kills.append(Kill(name=name, at=time.time(), engine=words != TRAINER))
            recoveries[name] = max(recoveries.get(name, 0.0), _progress(run, result, name))
            _wait(lambda: False, run, max(at + every - time.monotonic(), 0))
        end = time.time()
    finally:
        run.stop()
    result.kills = len(kills)
    report = audit_run(run.path)
    if not report.passed:
        result.violations += [f"audit: {violation}" for violation in report.violations[:5]]
    result.figures = {"steps": report.steps_completed, "stored": report.verified_payloads}
    result.extra = {
        "noticed_seconds": noticed and round(noticed, 1),
        "progress_seconds": {name: round(took, 1) for name, took in recoveries.items()},
        "starts": run.num_starts,
        "trainer_epoch": report.trainer_epoch,
    }
    if kills:
        timeline = Timeline.read(run.path)
        _check_restarts(timeline, kills, result)
        result.extra |= timeline.goodput((calm, chaos, end), kills)
    result.seconds = time.monotonic() - begin
    if result.ok:
        shutil.rmtree(folder / "model", ignore_errors=True)
    return result


def _stand_still(run: Run, result: Result, draw: random.Random) -> float | None:
    """Stop a trainer rank for a while: seconds until the intake said so, if it did."""
    roles, ranks = run.find(ROLE), run.find(TRAINER)
    if not ranks:
        result.violations.append("no trainer rank runs that could be stopped")
        return None
    log = run.path / "logs" / "intake.log"
    size, begin, noticed = log.stat().st_size, time.monotonic(), None
    chosen = draw.choice(ranks)
    chosen.send_signal(signal.SIGSTOP)
    try:
        while (passed := time.monotonic() - begin) < STOP_SECONDS:
            if noticed is None and NOTICE in log.read_bytes()[size:]:
                noticed = passed
            time.sleep(0.1)
    finally:
        chosen.send_signal(signal.SIGCONT)
    if noticed is None or noticed > NOTICE_SECONDS:
        result.violations.append(f"a rank's stop was noticed after {noticed} s by the intake")
    _progress(run, result, "the stop of a rank")
    if (roles, ranks) != (run.find(ROLE), run.find(TRAINER)):
        result.violations.append("a role or a rank was started again as a rank stood still")
    return noticed


def _check_restarts(timeline: Timeline, kills: Sequence[Kill], result: Result) -> None:
    """Note how long each restart took, and how long the run then took to be at work."""
    restarts: dict[str, list[float]] = {}
    resumes: dict[str, list[float]] = {}
    for kill in kills:
        restart, resume = timeline.restart(kill)
        restarts.setdefault(kill.name, []).append(round(restart, 1))
        resumes.setdefault(kill.name, []).append(round(resume, 1))
        if resume > RESUME_SECONDS:
            result.violations.append(f"{kill.name}: at work {resume:.1f} s after everything ran")
    result.extra |= {"restart_seconds": restarts, "resume_seconds": resumes}


def _victims() -> Iterator[tuple[str, str]]:
    kinds = (("inference", INFERENCE), ("trainer rank", TRAINER), ("everything", ""))
    return itertools.cycle(kinds)


def _progress(run: Run, result: Result, after: str) -> float:
    """Seconds until the run has two steps that it did not have before."""
    begin, newest = time.monotonic(), run.newest_step()
    if not _wait(lambda: run.newest_step() >= newest + 2, run, START_SECONDS):
        result.violations.append(f"no new steps within {START_SECONDS:.0f} s after {after}")
    return time.monotonic() - begin


def _wait(condition: Callable[[], bool], run: Run, seconds: float) -> bool:
    """Wait, with the run kept running; whether the condition came to hold."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        run.keep_running()
        time.sleep(1)
    return met


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
