"""One box: a worker process in its isolation, asked over pipes.

Nothing that comes out of a box is unpickled, evaluated or trusted to be well-formed: a frame is
JSON with the id of the request, or the box ends.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from typing import Any

from envserver.sandbox import seccomp, share, usage
from envserver.sandbox.layout import Layout
from envserver.sandbox.limits import Limits, Outcome, Reply

START_SECONDS = 60.0
"""Time that a box may take to start; far above 0.1 s, for machines that are overloaded."""


class Box:
    """A worker that answers one call at a time until a limit, or `close`, ends it."""

    def __init__(self, limits: Limits) -> None:
        """Make an empty shell; `start` fills it."""
        self.limits = limits
        self.landlock = 0
        """Version of Landlock that holds inside, or 0."""
        self._process: subprocess.Popen[bytes] | None = None
        self._fds: list[int] = []
        """Where output and replies are read, and requests written."""
        self._output = bytearray()
        self._frames = bytearray()
        self._reply: asyncio.Future[dict[str, Any]] | None = None
        self._ended: Outcome | None = None
        self._num_calls = 0
        self._signal = os.kill
        self._cpu_seconds: float | None = None
        """CPU time at the first look after the newest call's start."""

    @classmethod
    async def start(cls, layout: Layout, limits: Limits, nice: int = share.EQUAL) -> "Box":
        """Start a worker and wait until it is ready. Raises OSError, with what it said, if not.

        Args:
            layout: how.
            limits: that it has.
            nice: its share of the CPUs until it is ready; an equal one then.

        If cancelled, it waits all the same and ends the box then: a bwrap that is killed while it
        starts leaves a process behind that waits for it for ever.
        """
        starting = asyncio.create_task(cls._start_ready(layout, limits, nice))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                await (await starting).close()
            raise

    @classmethod
    async def _start_ready(cls, layout: Layout, limits: Limits, nice: int) -> "Box":
        box = cls(limits)
        try:
            box._start(layout)
            share.set_share(box.pid, nice)
            async with asyncio.timeout(START_SECONDS):
                ready = await box._frame()
        except (OSError, EOFError) as error:  # a TimeoutError is an OSError
            await box.close()
            said = box._output.decode(errors="replace").strip()
            raise OSError(f"a box did not start: {said or repr(error)}") from None
        share.set_share(box.pid, share.EQUAL)
        box._output.clear()
        box.landlock = int(ready["value"])
        return box

    @property
    def alive(self) -> bool:
        """Whether it can take calls."""
        return self._ended is None

    @property
    def outcome(self) -> Outcome:
        """What ended it; OK while it lives."""
        return self._ended or Outcome.OK

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self._reply is not None

    @property
    def pid(self) -> int:
        """The process, on the host, that all of the box descends from."""
        assert self._process
        return self._process.pid

    async def call(self, op: str, **arguments: object) -> Reply:
        """Let the worker do one thing. Limits end the box and are told by the reply's outcome."""
        self._num_calls += 1
        self._cpu_seconds = None
        frame: dict[str, Any] = {}
        try:
            async with asyncio.timeout(self.limits.call_seconds):
                frame = await self._ask({"id": self._num_calls, "op": op, **arguments})
        except TimeoutError:
            self.end(Outcome.TIME)
        except (EOFError, ConnectionError):
            self.end(Outcome.ERROR)
        except asyncio.CancelledError:  # nobody is left to take the reply
            self.end(Outcome.ERROR)
            raise
        self._read_output()
        outcome = self._ended or _outcome(frame)
        if outcome not in (Outcome.OK, Outcome.ERROR):
            self.end(outcome)
        output = self._output.decode(errors="replace")
        self._output.clear()
        value = frame.get("value") if outcome is Outcome.OK else None
        return Reply(outcome=outcome, output=output, value=value, ended=not self.alive)

    def end(self, outcome: Outcome) -> None:
        """Kill all of the box for a reason, which is the outcome of the call that is under way."""
        if self._ended is None:
            self._ended = outcome
            self._kill()
        if self._reply and not self._reply.done():
            self._reply.set_exception(EOFError())

    def check(self) -> None:
        """End the box if all its processes together use more than they may."""
        used = usage.measure(self.pid)
        if self._cpu_seconds is None:
            self._cpu_seconds = used.cpu_seconds
        spent = used.cpu_seconds - self._cpu_seconds
        if used.tasks >= self.limits.processes:
            self.end(Outcome.PROCESSES)
        elif spent > self.limits.call_seconds:
            self.end(Outcome.TIME)
        elif used.files > self.limits.files:
            self.end(Outcome.DISK)
        elif used.resident_bytes > self.limits.memory_bytes < usage.private_bytes(used.pids):
            self.end(Outcome.MEMORY)

    async def close(self) -> None:
        """Kill all of the box and free what the host holds of it."""
        self.end(Outcome.ERROR)
        loop = asyncio.get_running_loop()
        for fd in self._fds:
            loop.remove_reader(fd)
            os.close(fd)
        self._fds.clear()
        if self._process:
            await asyncio.to_thread(self._process.wait)

    def _start(self, layout: Layout) -> None:
        isolated = layout.kind != "none"
        self._signal = os.kill if isolated else os.killpg
        output, output_end = os.pipe()
        replies, replies_end = os.pipe()
        requests_end, requests = os.pipe()
        self._fds = [output, replies, requests]
        passed = [replies_end]
        if isolated and seccomp.is_available():
            passed.append(_memory_file(seccomp.program()))
        try:
            command = layout.command(self.limits, replies_end, (*passed, None)[1])
            # Not the event loop's way: uvloop's forks, which stops a large server for 10 ms, where
            # this takes less than one (vfork).
            self._process = subprocess.Popen(
                command,
                stdin=requests_end,
                stdout=output_end,
                stderr=output_end,
                pass_fds=passed,
                env={"PATH": os.environ.get("PATH", os.defpath)},
                start_new_session=True,
            )
        finally:
            for fd in (output_end, requests_end, *passed):
                os.close(fd)
        for fd in self._fds:
            os.set_blocking(fd, False)
        loop = asyncio.get_running_loop()
        loop.add_reader(output, self._read_output)
        loop.add_reader(replies, self._read_replies)

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._ended or self._frames:  # a reply that nobody asked for
            raise EOFError
        data = json.dumps(request).encode()
        await self._write(len(data).to_bytes(4, "big") + data)
        return await self._frame()

    async def _write(self, data: bytes) -> None:
        loop, rest = asyncio.get_running_loop(), memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._fds[2], rest) :]
            except BlockingIOError:
                writable = asyncio.Event()
                loop.add_writer(self._fds[2], writable.set)
                try:
                    await writable.wait()
                finally:
                    loop.remove_writer(self._fds[2])

    async def _frame(self) -> dict[str, Any]:
        self._reply = asyncio.get_running_loop().create_future()
        try:
            self._parse()
            frame = await self._reply
        finally:
            self._reply = None
        if frame.get("id") != self._num_calls:
            raise EOFError
        return frame

    def _read_replies(self) -> None:
        data = _read(self._fds[1])
        if data == b"":
            asyncio.get_running_loop().remove_reader(self._fds[1])
            self.end(Outcome.ERROR)
        elif len(self._frames) > self.limits.output_bytes:
            self._frames.clear()
            self.end(Outcome.OUTPUT)
        elif data:
            self._frames += data
            self._parse()

    def _parse(self) -> None:
        """Hand over a frame if one is whole and awaited. What is no frame ends the box."""
        size = int.from_bytes(self._frames[:4], "big")
        if not self._reply or self._reply.done() or len(self._frames) < 4 + max(size, 1):
            return
        data = bytes(self._frames[4 : 4 + size])
        del self._frames[: 4 + size]
        try:
            frame = json.loads(data, parse_constant=_refuse)
        except (ValueError, RecursionError):
            frame = None
        if isinstance(frame, dict):
            self._reply.set_result(frame)
        else:
            self.end(Outcome.ERROR)

    def _read_output(self) -> None:
        while self._fds and (data := _read(self._fds[0])) is not None:
            if not data:
                asyncio.get_running_loop().remove_reader(self._fds[0])
                return
            self._output += data
            if len(self._output) > self.limits.output_bytes:
                del self._output[self.limits.output_bytes :]
                self.end(Outcome.OUTPUT)
                return

    def _kill(self) -> None:
        if self._process and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._signal(self._process.pid, signal.SIGKILL)


def _outcome(frame: dict[str, Any]) -> Outcome:
    try:
        return Outcome(frame.get("outcome", ""))
    except ValueError:
        return Outcome.ERROR


def _read(fd: int) -> bytes | None:
    """What a pipe holds, b"" at its end, None if nothing is there now."""
    try:
        return os.read(fd, 2**16)
    except BlockingIOError:
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not plain JSON")


def _memory_file(data: bytes) -> int:
    fd = os.memfd_create("seccomp", 0)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
