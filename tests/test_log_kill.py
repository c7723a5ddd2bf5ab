"""kill -9 of a process that writes a log: whatever it said was durable is there."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from log_helpers import numbers, payload, read

CHILD = ROOT / "tests" / "log_child.py"


def start(folder: Path, first: int, failpoint: str = "") -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "UNDERSTUDY_FAILPOINT": failpoint}
    command = [sys.executable, str(CHILD), str(folder), str(first)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def last_durable(output: str) -> int:
    """The last number that a child printed, in a line that it ended; -1 if there is none."""
    lines = [line for line in output.splitlines(keepends=True) if line.endswith("\n")]
    return max((int(line) for line in lines if line != "open\n"), default=-1)


def check(folder: Path, first: int, durable: int) -> int:
    """Everything up to `durable` is there, in order and whole; returns the next number."""
    entries, findings = read(folder)
    found = [number for number in numbers(entries) if number >= first]
    assert found == list(range(first, first + len(found)))
    assert first + len(found) > durable
    assert (findings.bad_ranges, findings.num_missing) == ([], 0)
    for entry, location in entries:
        if entry.HasField("trajectory_stored"):
            size = len(payload(entry.trajectory_stored.origin.sequence))
            assert location.num_bytes > size
    return first + len(found)


@pytest.mark.parametrize(
    "failpoint",
    [
        *("log.after_append:1", "log.after_append:40", "log.after_write:1", "log.after_write:30"),
        *("log.after_fdatasync:1", "log.after_fdatasync:30", "log.at_roll:1", "log.at_roll:5"),
        *("log.after_create:1", "log.after_create:5"),
    ],
)
def test_what_was_flushed_before_a_failpoint_is_there(tmp_path: Path, failpoint: str) -> None:
    child = start(tmp_path, 0, failpoint)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    first = check(tmp_path, 0, last_durable(output))
    # The next process goes on from there.
    output, _ = start(tmp_path, first, "log.at_roll:3").communicate(timeout=60)
    assert last_durable(output) > first
    check(tmp_path, 0, last_durable(output))


def test_what_was_flushed_before_any_kill_is_there(tmp_path: Path) -> None:
    first = 0
    for _ in range(int(os.environ.get("UNDERSTUDY_KILLS", "10"))):
        child = start(tmp_path, first)
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        time.sleep(random.uniform(0, 0.05))
        child.kill()
        output, _ = child.communicate(timeout=60)
        first = check(tmp_path, first, last_durable(output))
    assert check(tmp_path, 0, -1) == first
