"""Starts processes, watches them, and ends all of them whatever happens.

Placement and restart on clusters belong to Slurm, Kubernetes or Ray; this serves one machine.
"""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from understudy.config import NetworkConfig
from understudy.errors import PeerUnreachableError, UnderstudyError
from understudy.rpc import open_sync_channel
from understudy.v1 import control_pb2, control_pb2_grpc

_log = logging.getLogger(__name__)
# By util-linux, not by preexec_fn: with that Python forks, which gRPC's threads do not survive.
_DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM", "--") if shutil.which("setpriv") else ()
_POLL_SECONDS = 0.1
_TAIL_LINES = 12
_COOKIE = "UNDERSTUDY_SUPERVISOR"
"""Environment variable by which descendants are known, also those whose parents have ended."""


class ProcessEndedError(UnderstudyError):
    """A process ended that should still run."""


class Supervisor:
    """Child processes with one log file each.

    with Supervisor(run_path / "logs") as supervisor:
        supervisor.start("intake", [...])
        supervisor.wait("trainer")

    Leaving the block ends every child and all its descendants: SIGTERM, `grace` seconds, SIGKILL.
    Children also get SIGTERM when this process dies without leaving it, where there is setpriv.
    """

    def __init__(self, logs: Path, grace: float = 4.0) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._grace = grace
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._cookie = uuid.uuid4().hex
        self._handler: Any = signal.SIG_DFL

    def __enter__(self) -> Self:
        self._handler = signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.stop(*self._children)
        finally:
            signal.signal(signal.SIGTERM, self._handler)

    def start(self, name: str, command: Sequence[str], stdout: Path | None = None) -> None:
        """Start a process; its output goes to `<logs>/<name>.log`, or stdout to a file of its own.

        The process runs in a session of its own, so that Ctrl-C reaches only this one.
        """
        with (self._logs / f"{name}.log").open("ab") as log:
            output = stdout.open("wb") if stdout else log
            self._children[name] = subprocess.Popen(
                [*_DIE_WITH_PARENT, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env={**os.environ, _COOKIE: f"{self._cookie}-{name}"},
                start_new_session=True,
            )
            if stdout:
                output.close()

    def pid(self, name: str) -> int:
        """Process id of a child."""
        return self._children[name].pid

    def check(self) -> None:
        """Raise ProcessEndedError, with the end of its log, if any child ended with an error."""
        for name, child in self._children.items():
            if child.poll() not in (None, 0):
                raise ProcessEndedError(self._explain(name, child.returncode))

    def wait(self, name: str, each_poll: Callable[[], None] = lambda: None) -> None:
        """Wait until a child ends well, calling `each_poll` meanwhile.

        Raises:
            ProcessEndedError: this or any other child ended with an error.
        """
        while self._children[name].poll() is None:
            self.check()
            each_poll()
            time.sleep(_POLL_SECONDS)
        self.check()

    def wait_serving(
        self,
        name: str,
        address: str,
        network: NetworkConfig,
        timeout: float,
        each_poll: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait until a child's server says SERVING.

        Raises:
            ProcessEndedError: a child ended instead.
            PeerUnreachableError: after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with open_sync_channel(address, network) as channel:
            while not _is_serving(channel):
                self.check()
                if self._children[name].poll() is not None:
                    raise ProcessEndedError(self._explain(name, self._children[name].returncode))
                if time.monotonic() > deadline:
                    raise PeerUnreachableError(
                        f"{name} at {address} was not serving after {timeout:.0f} s; see "
                        f"{self._logs / name}.log"
                    )
                each_poll()
                time.sleep(_POLL_SECONDS)

    def wait_figure(
        self,
        name: str,
        address: str,
        network: NetworkConfig,
        figure: str,
        each_poll: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait until a child's server says that one of its figures is 0, or the child has ended.

        Raises:
            ProcessEndedError: a child ended with an error.
        """
        with open_sync_channel(address, network) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            while self._children[name].poll() is None:
                self.check()
                with contextlib.suppress(grpc.RpcError):  # it may be starting again, or ending
                    status = stub.GetStatus(control_pb2.GetStatusRequest(), timeout=10)
                    if not status.figures[figure]:
                        return
                each_poll()
                time.sleep(_POLL_SECONDS)
        self.check()

    def stop(self, *names: str) -> None:
        """End children and all their descendants: SIGTERM, grace, SIGKILL.

        A second Ctrl-C or SIGTERM ends the grace.
        """
        children = [self._children[name] for name in names]
        family = self._family(names)
        try:
            for child in children:
                child.terminate()
            psutil.wait_procs(family, timeout=self._grace)
        finally:
            for process in family | self._family(names):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        _log.warning("killing %d, which did not end in time", process.pid)
                        process.kill()
            for name, child in zip(names, children, strict=True):
                child.wait()
                self._children.pop(name, None)

    def _family(self, names: Sequence[str]) -> set[psutil.Process]:
        """Children and their descendants, whatever sessions and parents these have by now.

        They are known by their parents and by the cookie: a parent may have ended, and a process
        that sets its title overwrites the environment that others see.
        """
        cookies = {f"{self._cookie}-{name}" for name in names}
        pids = {self._children[name].pid for name in names}
        family = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid in pids or process.environ().get(_COOKIE) in cookies:
                    family |= {process, *process.children(recursive=True)}
        return family

    def _explain(self, name: str, code: int) -> str:
        log = self._logs / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        tail = "\n  ".join(lines)
        return f"{name} ended with code {code}; the end of {log}:\n  {tail}"


def _is_serving(channel: grpc.Channel) -> bool:
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=2
        )
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def interrupted_code(interrupt: KeyboardInterrupt) -> int:
    """Exit code of a command that a signal ended: 143 after SIGTERM, 130 after Ctrl-C."""
    number: int = interrupt.args[0] if interrupt.args else signal.SIGINT
    return 128 + number
