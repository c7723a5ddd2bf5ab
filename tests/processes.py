"""Real role processes for tests: started, read line by line, always ended."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

ANY_PORT = (
    *("--set", "envserver.listen=127.0.0.1:0", "--set", "envserver.metrics_listen=127.0.0.1:0"),
    *("--set", "inference.listen=127.0.0.1:0", "--set", "inference.metrics_listen=127.0.0.1:0"),
    *("--set", "learner.listen=127.0.0.1:0", "--set", "learner.metrics_listen=127.0.0.1:0"),
    *("--set", "actor.metrics_listen=127.0.0.1:0"),
)


@contextlib.contextmanager
def started(*command: str, cwd: Path = ROOT) -> Iterator[subprocess.Popen[str]]:
    """A process with its output readable; killed on leaving if it still runs."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def understudy(*words: str) -> tuple[str, ...]:
    """Command line of the `understudy` command."""
    return (sys.executable, "-m", "understudy.cli", *words)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """The first line with the text; fails when the process ends before."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        if text in line:
            return line
        lines.append(line)
    raise AssertionError(f"{text!r} is not in the output:\n{''.join(lines)}")


def finish(process: subprocess.Popen[str], seconds: float = 60) -> str:
    """Wait for a process's end and return the rest of its output."""
    return process.communicate(timeout=seconds)[0]
