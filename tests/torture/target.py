"""A role as a process that dies and is started again, on the same folder and port."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0
_SERVING = b"is serving"
# Not by preexec_fn: Python would fork then, with all that gRPC does at a fork of its threads.
_DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()


class RoleProcess:
    """Starts a role, or a stand-in for it, and ends it by force.

    Args:
        module: what is run.
        arguments: its command line.
        log: file that its output is appended to.
    """

    def __init__(self, module: str, arguments: Sequence[str], log: Path) -> None:
        self._command = [*_DIE_WITH_PARENT, sys.executable, "-m", module, *arguments]
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._serving = asyncio.Event()
        self._ended = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self.tail: list[bytes] = []
        """The last lines of its output."""

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code; None while it runs."""
        return self._process.returncode if self._process else None

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self._process is not None and not self._ended.is_set()

    async def start(self, failpoint: str = "") -> float | None:
        """Start it; returns the seconds until it served, None if it ended before."""
        self._serving, self._ended = asyncio.Event(), asyncio.Event()
        begin = time.monotonic()
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "UNDERSTUDY_FAILPOINT": failpoint},
        )
        self._watch = asyncio.create_task(self._read(self._process))
        waits = [asyncio.create_task(event.wait()) for event in (self._serving, self._ended)]
        async with asyncio.timeout(START_SECONDS):
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        return time.monotonic() - begin if self._serving.is_set() else None

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        with self._log.open("ab", buffering=0) as log:
            async for line in process.stderr:
                log.write(line)
                self.tail = [*self.tail[-20:], line]
                if _SERVING in line:
                    self._serving.set()
        await process.wait()
        self._ended.set()

    async def ended(self, seconds: float) -> bool:
        """Wait for its end; False if it did not come in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        return self._ended.is_set()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """kill -9, and wait for the end."""
        self.send(signal.SIGKILL)
        if self._watch:
            await self._watch

    async def hold(self) -> None:
        """SIGSTOP, and wait until no thread runs: a system call that is under way ends first."""
        self.send(signal.SIGSTOP)
        await asyncio.to_thread(_wait_until_held, Path(f"/proc/{self.pid}/task"))


def _wait_until_held(tasks: Path) -> None:
    while any(_state(task) != "T" for task in tasks.iterdir()):
        time.sleep(0.001)


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # the thread ended meanwhile
        return "T"
