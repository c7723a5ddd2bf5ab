"""A command in a folder of its own: bounded in time and output, with nothing left of its group."""

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAX_ANSWER_BYTES = 2**16
MAX_ERROR_BYTES = 2**12
_CHUNK_BYTES = 2**16
_PASSED_ON = ("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TERM", "TZ", "USER")
"""What the command gets of the server's environment: no credentials are among these."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int | None
    """Exit code, negative for a signal; None if it ran out of time."""
    output: str
    """The end of its standard output."""
    errors: str
    """The end of its standard error."""


async def run_command(
    command: Sequence[str],
    folder: Path,
    task: Path,
    variables: Mapping[str, str],
    timeout_seconds: float,
) -> Ended:
    """Run a command with a file as its standard input, until it ends or its time is up.

    Its process group is killed when it ends, when its time is up, and when the caller is cancelled.

    Raises:
        OSError: it cannot be started.
    """
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    with task.open("rb") as stdin:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=folder,
            env={**environment, **variables},
            start_new_session=True,
        )
    assert process.stdout
    assert process.stderr
    tails = bytearray(), bytearray()
    readers = [
        asyncio.create_task(_keep_end(process.stdout, tails[0], MAX_ANSWER_BYTES)),
        asyncio.create_task(_keep_end(process.stderr, tails[1], MAX_ERROR_BYTES)),
    ]
    code: int | None = None
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                code = await _exit_code(process)
    finally:
        with suppress(ProcessLookupError):  # what it started may have outlived it
            os.killpg(process.pid, signal.SIGKILL)
        # One that left the group may hold the pipes open for ever.
        await asyncio.wait(readers, timeout=1.0)
        for reader in readers:
            reader.cancel()
        process._transport.close()  # type: ignore[attr-defined]  # nothing public closes our ends
    output, errors = (tail.decode("utf-8", "replace") for tail in tails)
    return Ended(code=code, output=output, errors=errors)


async def _exit_code(process: asyncio.subprocess.Process) -> int:
    """Not process.wait(), which also waits for pipes that a grandchild holds."""
    while process.returncode is None:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0.01)
    return process.returncode


async def _keep_end(stream: asyncio.StreamReader, tail: bytearray, limit: int) -> None:
    while chunk := await stream.read(_CHUNK_BYTES):
        tail += chunk
        del tail[:-limit]
