"""SIGSTOP of each role for a while: others notice, and go on afterwards without a restart.

A stopped process keeps its connections open and answers nothing, as one that hangs, swaps or lost
its network does. The trainer is the harness itself here, and is not stopped.
"""

import asyncio
import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.torture.campaign import Result
from tests.torture.players import be_impatient
from tests.torture.system import System

NOTICE_SECONDS = 10.0
"""Time within which somebody must have noticed: keepalive's 4.5 s and its timeout's 5 s."""
_ALARMS = ("warning", "error", "critical")
_RETRIES = "understudy_generate_retries_total"


def torture(seconds: float, folder: Path, roles: tuple[str, ...] = ()) -> Iterator[Result]:
    """Stop one role after the other; a result each."""
    be_impatient()
    chosen = roles or ("actor-0", "envserver-0", "inference", "intake")
    return iter(asyncio.run(_torture(seconds, folder / "stops", chosen)))


async def _torture(seconds: float, folder: Path, roles: tuple[str, ...]) -> list[Result]:
    system = System(folder, seed=0)
    results = []
    async with system.running():
        for role in roles:
            results.append(await _stop(system, role, seconds))
            await asyncio.sleep(4)  # old alarms must not pass for new ones
    found, figures = system.check()
    for result in results:
        result.violations, result.figures = found, figures
    return results


async def _stop(system: System, role: str, seconds: float) -> Result:
    result = Result(campaign=f"stop {role}", seed=0)
    pids = {name: process.pid for name, process in system.processes.items()}
    watch = _Watch(system, role)
    await watch.begin()
    begin, steps = time.monotonic(), system.history.figures["steps"]
    system.processes[role].send(signal.SIGSTOP)
    noticed = None
    while (passed := time.monotonic() - begin) < seconds:
        if noticed is None and await watch.alarm():
            noticed = passed
        await asyncio.sleep(0.1)
    meanwhile = system.history.figures["steps"] - steps
    system.processes[role].send(signal.SIGCONT)
    recovered = await system.progress(f"the stop of {role}")
    system.check_others()
    for name, process in system.processes.items():
        if process.pid != pids[name]:
            system.history.violation(f"{name} was started again")
    if seconds > NOTICE_SECONDS and (noticed or seconds) > NOTICE_SECONDS:
        system.history.violation(f"nobody noticed within {NOTICE_SECONDS:.0f} s that {role} stood")
    result.seconds = time.monotonic() - begin
    result.extra = {
        "stopped_seconds": seconds,
        "noticed_seconds": noticed and round(noticed, 1),
        "noticed_by": watch.evidence,
        "steps_meanwhile": meanwhile,
        "recovered_seconds": round(recovered, 1),
    }
    return result


class _Watch:
    """Looks for what the other roles say: alarms in their logs; of inference, whose absence actors
    do not log, retries in their metrics. Retries for other reasons happen at any time."""

    def __init__(self, system: System, role: str) -> None:
        self._logs = {n: system.log(n) for n in system.processes if n != role}
        self._scrapes = system.scrapes if role == "inference" else {}
        self._sizes = {name: path.stat().st_size for name, path in self._logs.items()}
        self._retries: dict[str, float] = {}
        self.evidence = ""
        """What was noticed first."""

    async def begin(self) -> None:
        """Remember what there is already."""
        self._retries = {name: await _retries(at) for name, at in self._scrapes.items()}

    async def alarm(self) -> str:
        """The first alarm since; empty if there is none."""
        for name, path in self._logs.items():
            with path.open("rb") as log:
                log.seek(self._sizes[name])
                lines = log.read().splitlines()
            for line in lines:
                if any(f'"level": "{level}"'.encode() in line for level in _ALARMS):
                    message = json.loads(line)["message"] if line.endswith(b"}") else "?"
                    self.evidence = f"{name}: {message}"[:120]
                    return self.evidence
        for name, address in self._scrapes.items():
            if await _retries(address) > self._retries[name]:
                self.evidence = f"{name}: {_RETRIES}"
        return self.evidence


async def _retries(address: str) -> float:
    try:
        text = await asyncio.to_thread(_scrape, address)
    except (urllib.error.URLError, TimeoutError):
        return 0.0
    lines = [line for line in text.splitlines() if line.startswith(_RETRIES)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def _scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=2) as answer:
        text: str = answer.read().decode()
        return text
