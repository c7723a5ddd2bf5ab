"""Environment server: sessions and steps a second of a trivial environment, and what they cost.

The server is a process of its own, on loopback; this process is the client of all its sessions, and
each of them steps again as soon as it is answered. The same environment behind OpenEnv's own server
is measured in turn with ours, where it can be installed. Both run it in threads, as they do unless
told otherwise, and on their event loops.

    {"bench": "envserver", "peer": null or "openenv", "calls": "threads" or "loop", "sessions": 64,
     "sessions_per_s": ..., "steps_per_s": ..., "p50_ms": ..., "p99_ms": ...,
     "cpu_ms_per_step": ...}
    {"bench": "envserver", "peer": ..., "calls": ..., "idle_sessions": 5000, "rss_mb": ...,
     "kb_per_session": ...}

cpu_ms_per_step is the server's; rss_mb is what the idle sessions added.
"""

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.openenv_venv import OpenEnvMissingError, openenv_python
from benchmarks.rollout import free_address
from understudy.client import EnvironmentClient, Session
from understudy.config import Config, write_config
from understudy.process import prepare_process, run

TEXT = "What is said here is said again."
OPENENV_STEP = json.dumps({"type": "step", "data": {"text": TEXT}})
OPENENV_RESET = json.dumps({"type": "reset", "data": {"seed": 0}})
SUITES = {"threads": "ThreadedTrivialSuite", "loop": "TrivialSuite"}
WARM_SECONDS = 0.5
OPENERS = 64
"""Sessions that are opened at one time."""


class Player(ABC):
    """One session."""

    @abstractmethod
    async def open(self) -> None:
        """Begin, and take the first observation."""

    @abstractmethod
    async def step(self) -> None:
        """Say something, and wait for the answer."""

    @abstractmethod
    async def close(self) -> None:
        """End the session."""


class OurPlayer(Player):
    """A session of our server, by the client that actors have."""

    def __init__(self, client: EnvironmentClient) -> None:
        self._stack = AsyncExitStack()
        self._client = client
        self._session: Session | None = None

    async def open(self) -> None:
        self._session = await self._stack.enter_async_context(self._client.session())
        await self._session.reset("trivial", "train", 0)

    async def step(self) -> None:
        assert self._session
        await self._session.step([("act", {"text": TEXT})])

    async def close(self) -> None:
        await self._stack.aclose()


class OpenEnvPlayer(Player):
    """A session of OpenEnv's server, on a socket of its own."""

    def __init__(self, address: str) -> None:
        self._url = f"ws://{address}/ws"
        self._socket: ClientConnection | None = None

    async def open(self) -> None:
        self._socket = await connect(
            self._url, compression=None, ping_interval=None, open_timeout=60, proxy=None
        )
        await self._exchange(OPENENV_RESET)

    async def step(self) -> None:
        await self._exchange(OPENENV_STEP)

    async def close(self) -> None:
        if self._socket:
            await self._socket.close()

    async def _exchange(self, request: str) -> None:
        assert self._socket
        await self._socket.send(request)
        answer = json.loads(await self._socket.recv())
        assert answer["type"] == "observation", answer


class Server:
    """A running server: its process, and how to play on it."""

    def __init__(self, peer: str | None, calls: str, pid: int, address: str) -> None:
        self.peer = peer
        self.calls = calls
        self.process = psutil.Process(pid)
        self._address = address
        self._client: EnvironmentClient | None = None

    async def connect(self) -> None:
        """Wait until the server answers."""
        if not self.peer:
            self._client = EnvironmentClient.connect(self._address)
            await self._client.wait_ready()

    def player(self) -> Player:
        """A session, not yet open."""
        return OurPlayer(self._client) if self._client else OpenEnvPlayer(self._address)

    def cpu_seconds(self) -> float:
        """Processor time so far."""
        times = self.process.cpu_times()
        return times.user + times.system


def main() -> None:
    """Run every case and print its line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, nargs="*", default=[1, 64, 512])
    parser.add_argument("--idle", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=3.0, help="measured time a case")
    arguments = parser.parse_args()
    prepare_process("benchmark")
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as folder:
        run(_measure_all(Path(folder), arguments))


async def _measure_all(folder: Path, arguments: argparse.Namespace) -> int:
    with ExitStack() as stack:
        servers = []
        for calls in ("threads", "loop"):
            servers += [stack.enter_context(_ours(folder, calls))]
            servers += stack.enter_context(_openenv(folder, calls))
        for server in servers:
            await server.connect()
        for server in servers:  # first: what a server once held, it need not ask for again
            _print(await measure_idle(server, arguments.idle))
        for sessions in arguments.sessions:
            for server in servers:
                _print(await measure(server, sessions, arguments.seconds))
    return 0


async def measure(server: Server, sessions: int, seconds: float) -> dict[str, object]:
    """One case: open all sessions, then let all of them step for a while."""
    start = time.perf_counter()
    players = await _open(server, sessions)
    opening = time.perf_counter() - start
    await _play(players, WARM_SECONDS)
    cpu, start = server.cpu_seconds(), time.perf_counter()
    latencies = await _play(players, seconds)
    wall, cpu = time.perf_counter() - start, server.cpu_seconds() - cpu
    await asyncio.gather(*(player.close() for player in players))
    p50, p99 = np.percentile(latencies, [50, 99])
    return {
        "bench": "envserver",
        "peer": server.peer,
        "calls": server.calls,
        "sessions": sessions,
        "sessions_per_s": round(sessions / opening, 1),
        "steps_per_s": round(len(latencies) / wall),
        "p50_ms": round(1000 * p50, 2),
        "p99_ms": round(1000 * p99, 2),
        "cpu_ms_per_step": round(1000 * cpu / len(latencies), 3),
    }


async def measure_idle(server: Server, sessions: int) -> dict[str, object]:
    """What sessions that were only opened hold in memory."""
    before = server.process.memory_info().rss
    players = await _open(server, sessions)
    added = server.process.memory_info().rss - before
    await asyncio.gather(*(player.close() for player in players))
    return {
        "bench": "envserver",
        "peer": server.peer,
        "calls": server.calls,
        "idle_sessions": sessions,
        "rss_mb": round(added / 2**20, 1),
        "kb_per_session": round(added / 2**10 / sessions, 1),
    }


async def _open(server: Server, sessions: int) -> list[Player]:
    players = [server.player() for _ in range(sessions)]
    waiting = iter(players)

    async def open_some() -> None:
        for player in waiting:
            await player.open()

    await asyncio.gather(*(open_some() for _ in range(min(OPENERS, sessions))))
    return players


async def _play(players: list[Player], seconds: float) -> list[float]:
    """Step on all sessions until the time is over; returns each step's seconds."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def play(player: Player) -> None:
        start = time.perf_counter()
        while start < end:
            await player.step()
            now = time.perf_counter()
            latencies.append(now - start)
            start = now

    await asyncio.gather(*(play(player) for player in players))
    return latencies


@contextmanager
def _ours(folder: Path, calls: str) -> Iterator[Server]:
    address = free_address()
    values = {
        "run": {"name": "bench", "directory": folder},
        "model": {"path": folder},
        "envserver": {
            "listen": address,
            "metrics_listen": "127.0.0.1:0",
            "suites": [f"benchmarks.trivial_suite:{SUITES[calls]}"],
            "max_sessions": 10_000,
        },
    }
    config = write_config(Config.model_validate(values), folder / calls)
    command = [sys.executable, "-m", "understudy.cli", "envserver", "--config", str(config)]
    with _running(command, folder / "ours.log") as pid:
        yield Server(None, calls, pid, address)


@contextmanager
def _openenv(folder: Path, calls: str) -> Iterator[list[Server]]:
    try:
        python = openenv_python()
    except OpenEnvMissingError as error:
        print(f"OpenEnv's server is left out: {error}", file=sys.stderr)
        yield []
        return
    address = free_address()
    host, _, port = address.partition(":")
    script = Path(__file__).with_name("trivial_openenv.py")
    with _running([str(python), str(script), calls, host, port], folder / "openenv.log") as pid:
        _wait_for(f"http://{address}/health")
        yield [Server("openenv", calls, pid, address)]


@contextmanager
def _running(command: list[str], log: Path) -> Iterator[int]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _print(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
