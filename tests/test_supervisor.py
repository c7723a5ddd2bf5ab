"""Supervisors: whatever happens, nothing stays behind, and what went wrong is said."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from conftest import serving
from processes import started
from understudy.config import NetworkConfig
from understudy.errors import PeerUnreachableError
from understudy.supervisor import ProcessEndedError, Supervisor

NOWHERE = "127.0.0.1:9"
SLEEP = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('ready', flush=True); time.sleep(600)"
)
PARENT = """
import subprocess, sys, time
for new_session in (False, True):
    child = subprocess.Popen([sys.executable, "-c", {code!r}], start_new_session=new_session)
    print("child", child.pid, flush=True)
{end}
"""
"""Starts two children, the second in a session of its own as torchrun does."""


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def pids_in(log: Path) -> list[int]:
    """Process ids that a parent has printed."""
    if not log.exists():
        return []
    return [int(line.split()[1]) for line in log.read_text().splitlines() if "child" in line]


@contextmanager
def all_killed(pids: list[int]) -> Iterator[None]:
    """Nothing outlives a failed test."""
    try:
        yield
    finally:
        for pid in filter(lives, pids):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("end", ["time.sleep(600)", "sys.exit()", "sys.exit(3)"])
def test_descendants_end_with_the_block_even_if_their_parent_went_first(
    tmp_path: Path, end: str
) -> None:
    log = tmp_path / "parent.log"
    with Supervisor(tmp_path, grace=0.5) as supervisor:
        supervisor.start("parent", python(PARENT.format(code=SLEEP, end=end)))
        wait_for(lambda: len(pids_in(log)) == 2)
        pids = [supervisor.pid("parent"), *pids_in(log)]
        if "exit" in end:
            wait_for(lambda: not lives(pids[0]))
        assert all(map(lives, pids[1:]))
    with all_killed(pids):
        wait_for(lambda: not any(map(lives, pids)))


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    with Supervisor(tmp_path, grace=0.3) as supervisor:
        supervisor.start("stubborn", python(STUBBORN))
        wait_for(lambda: "ready" in (tmp_path / "stubborn.log").read_text())
        pid = supervisor.pid("stubborn")
    assert not lives(pid)


def test_stopping_one_child_leaves_the_others(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        supervisor.start("one", python(SLEEP))
        supervisor.start("other", python(SLEEP))
        one, other = supervisor.pid("one"), supervisor.pid("other")
        supervisor.stop("one")
        assert not lives(one)
        assert lives(other)
        supervisor.check()  # a child that was stopped is no failure
    assert not lives(other)


def test_an_error_ends_the_wait_with_the_end_of_the_log(tmp_path: Path) -> None:
    noise = "import sys\nfor i in range(100): print('line', i)\nsys.exit('out of luck')"
    with Supervisor(tmp_path) as supervisor:
        supervisor.start("lasting", python(SLEEP))
        supervisor.start("failing", python(noise))
        with pytest.raises(ProcessEndedError) as caught:
            supervisor.wait("lasting")
    said = str(caught.value)
    assert said.startswith(f"failing ended with code 1; the end of {tmp_path}/failing.log:")
    assert "line 99" in said
    assert "out of luck" in said
    assert "line 50" not in said


def test_a_good_end_ends_the_wait(tmp_path: Path) -> None:
    polls: list[int] = []
    with Supervisor(tmp_path) as supervisor:
        supervisor.start("short", python("import time; time.sleep(0.3)"))
        supervisor.wait("short", lambda: polls.append(1))
        supervisor.check()
    assert polls


def test_output_goes_to_the_log_or_to_a_file_of_its_own(tmp_path: Path) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    with Supervisor(tmp_path / "logs") as supervisor:
        supervisor.start("both", python(code))
        supervisor.start("split", python(code), stdout=tmp_path / "lines")
        for name in ("both", "split"):
            supervisor.wait(name)
    assert sorted((tmp_path / "logs" / "both.log").read_text().split()) == ["err", "out"]
    assert (tmp_path / "logs" / "split.log").read_text() == "err\n"
    assert (tmp_path / "lines").read_text() == "out\n"


@pytest.mark.parametrize(
    ("code", "said"), [("raise SystemExit(4)", "ended with code 4"), ("", "ended with code 0")]
)
def test_a_server_that_ends_instead_of_serving_is_named(
    tmp_path: Path, code: str, said: str
) -> None:
    with Supervisor(tmp_path) as supervisor:
        supervisor.start("server", python(code))
        with pytest.raises(ProcessEndedError, match=f"server {said}"):
            supervisor.wait_serving("server", NOWHERE, NetworkConfig(), timeout=30)


def test_a_server_that_never_serves_is_named_with_its_log(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        supervisor.start("server", python(SLEEP))
        with pytest.raises(PeerUnreachableError, match=r"was not serving after 0 s; see .*\.log"):
            supervisor.wait_serving("server", NOWHERE, NetworkConfig(), timeout=0.3)


async def test_a_serving_peer_ends_the_wait(tmp_path: Path) -> None:
    async with serving() as address:
        with Supervisor(tmp_path) as supervisor:
            supervisor.start("server", python(SLEEP))
            await asyncio.to_thread(
                supervisor.wait_serving, "server", address, NetworkConfig(), timeout=60
            )


SUPERVISED = """
import sys; sys.path[:0] = {path!r}
from pathlib import Path
from understudy.supervisor import *
try:
    with Supervisor(Path({logs!r}), grace={grace}) as supervisor:
        supervisor.start("child", [sys.executable, "-S", "-c", {code!r}])
        print("pid", supervisor.pid("child"), flush=True)
        supervisor.wait("child")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "interrupted"), (signal.SIGKILL, "")],
)
def test_children_end_with_their_supervisor_however_it_ends(
    tmp_path: Path, number: signal.Signals, said: str
) -> None:
    script = SUPERVISED.format(path=sys.path, logs=str(tmp_path), grace=4, code=SLEEP)
    with started(*python(script)) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline().split()[1])
        with all_killed([pid]):
            assert lives(pid)
            supervisor.send_signal(number)
            assert said in supervisor.communicate(timeout=30)[0]
            wait_for(lambda: not lives(pid))


def test_a_second_ctrl_c_ends_the_grace(tmp_path: Path) -> None:
    script = SUPERVISED.format(path=sys.path, logs=str(tmp_path), grace=300, code=STUBBORN)
    with started(*python(script)) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline().split()[1])
        with all_killed([pid]):
            wait_for(lambda: "ready" in (tmp_path / "child.log").read_text())
            supervisor.send_signal(signal.SIGINT)
            time.sleep(0.5)
            supervisor.send_signal(signal.SIGINT)
            supervisor.communicate(timeout=30)
            assert not lives(pid)
