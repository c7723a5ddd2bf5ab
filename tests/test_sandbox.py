"""A box keeps state, ends at its limits with a reason, and takes nobody with it."""

import asyncio
import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from envserver.sandbox import Box, Layout, Outcome, Pool, Workspace, share
from sandbox_helpers import LIMITS, needs_bwrap, open_pool, open_workspace
from understudy import metrics

pytestmark = needs_bwrap


async def run(workspace: Workspace, code: str) -> tuple[str, str]:
    """Outcome and output of a call."""
    reply = await workspace.call("python", code=code)
    return reply.outcome.value, reply.output


async def test_state_and_files_are_kept_and_the_last_value_is_shown() -> None:
    async with open_workspace({"note.txt": b"hello"}) as workspace:
        assert await run(workspace, "x = 20\nprint(open('note.txt').read())") == ("ok", "hello\n")
        assert await run(workspace, "def f(): return x + 1\nf()") == ("ok", "21\n")
        outcome, output = await run(workspace, "open('out.txt', 'w').write('a')\n1 / 0")
        assert outcome == "error"
        assert output.startswith('Traceback (most recent call last):\n  File "<call 3>", line 2')
        assert output.endswith("ZeroDivisionError: division by zero\n")
        assert await run(workspace, "open('out.txt').read()") == ("ok", "'a'\n")
        assert (await run(workspace, "def f(:"))[0] == "error"


THREADS = """
import threading, time
while True: threading.Thread(target=time.sleep, args=(60,)).start()
"""


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("import sys; sys.exit(3)", "error"),
        ("import os; os._exit(3)", "error"),
        ("import ctypes; ctypes.string_at(0)", "error"),
        ("import os; os.kill(os.getpid(), 9)", "error"),
        ("class E(Exception):\n  def __str__(self): raise self\nraise E", "error"),
        (THREADS, "processes"),
        ("import os; os.close(1); os.close(2)\nwhile True: os.fork()", "processes"),
    ],
)
async def test_the_next_call_works_whatever_the_code_did(code: str, outcome: str) -> None:
    async with open_workspace() as workspace:
        reply = await workspace.call("python", code=code)
        assert reply.outcome == outcome
        again = await workspace.call("python", code="6 * 7")
        assert again.outcome == "ok" or again.ended
        assert await run(workspace, "print(6 * 7)") == ("ok", "42\n")


async def test_forked_children_do_not_answer_for_their_parent() -> None:
    async with open_workspace() as workspace:
        code = "import os\nif os.fork() == 0: raise SystemExit\nos.wait()\n'parent'"
        outcome, output = await run(workspace, code)
        assert (outcome, output.splitlines()[-1]) == ("ok", "'parent'")
        assert await run(workspace, "1") == ("ok", "1\n")


FORGED = [
    json.dumps({"id": 2, "outcome": "ok", "value": "forged"}).encode(),
    b"[]",
    b"\xff",
    b"[" * 100_000,
    b"1" * 10_000,
    b'{"id": NaN}',
    b"",
]


@pytest.mark.parametrize("frame", FORGED, ids=lambda frame: str(frame[:12]))
async def test_a_forged_frame_ends_its_box_and_is_no_reply(frame: bytes) -> None:
    data = len(frame).to_bytes(4, "big") + frame
    # A pipe keeps the number that it has in the process that opened the box: any may be the one.
    code = (
        f"import os\nfor fd in range(3, {2**16}):\n  try: os.write(fd, {data!r})\n"
        "  except OSError: pass"
    )
    async with open_workspace() as workspace:
        first = await workspace.call("python", code=code)
        assert first.value is None
        second = await workspace.call("python", code="1")
        assert "forged" not in (first.value, second.value)
        assert first.ended or second.ended
        assert await run(workspace, "1") == ("ok", "1\n")


async def test_a_reply_larger_than_allowed_ends_the_box() -> None:
    async with open_workspace() as workspace:
        code = "def f(): return 'x' * 2**22"
        reply = await workspace.call("functions", code=code, function="f", arguments=[[]])
        assert (reply.outcome, reply.ended, reply.value) == (Outcome.OUTPUT, True, None)


async def test_a_limit_ends_one_box_and_its_neighbour_goes_on() -> None:
    limits = replace(LIMITS, call_seconds=3.0)
    async with open_pool(limits) as pool:
        loud, calm = Workspace(pool), Workspace(pool)
        await calm.call("python", code="x = 1")
        loop = asyncio.create_task(loud.call("python", code="x = 2\nwhile True: pass"))
        while not loop.done():
            assert (await calm.call("python", code="x")).output == "1\n"
            await asyncio.sleep(0.05)
        assert (loop.result().outcome, loop.result().ended) == (Outcome.TIME, True)
        assert "NameError" in (await loud.call("python", code="x")).output
        assert (await calm.call("python", code="x")).output == "1\n"


async def test_cpu_that_a_daemon_burns_between_calls_ends_its_box() -> None:
    burn = "import os\nif os.fork() == 0:\n  while True: pass"
    async with open_pool(replace(LIMITS, call_seconds=2.0)) as pool:
        workspace = Workspace(pool)
        assert (await workspace.call("python", code=burn)).outcome == "ok"
        box = workspace._box
        assert box
        for _ in range(1200):
            if not box.alive:
                break
            await asyncio.sleep(0.05)
        assert box.outcome == Outcome.TIME
        told = (await workspace.call("python", code="6 * 7")).output
        assert told.startswith("Before this call: Stopped: the call took longer than 2 seconds.")
        assert told.endswith("\n42\n")


async def test_a_box_is_never_used_twice_and_the_pool_fills_up_again() -> None:
    pool = Pool(Layout.find(), LIMITS, 2)
    await pool.start()
    first, second = Workspace(pool), Workspace(pool)
    await first.call("python", code="open('left', 'w').write('x')")
    await first.close()
    for workspace in (first, second):
        assert (await workspace.call("python", code="import os; os.listdir()")).output == "[]\n"
    for _ in range(600):
        if metrics.SANDBOX_FREE_BOXES._value.get() == 2:
            break
        await asyncio.sleep(0.05)
    assert metrics.SANDBOX_FREE_BOXES._value.get() == 2
    await pool.close()
    assert metrics.SANDBOX_FREE_BOXES._value.get() == 0


def started(marker: int) -> list[str]:
    """Processes with a number in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(marker) in (process / "cmdline").read_text():
                found.append(process.name)
    return found


async def test_a_box_that_is_given_up_while_it_starts_leaves_no_process() -> None:
    limits = replace(LIMITS, disk_bytes=2**25 + os.getpid() * 4096)
    for number in range(12):
        starting = asyncio.create_task(Box.start(Layout.find(), limits))
        await asyncio.sleep(0.003 * number)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await starting).close()
    for _ in range(200):
        if not (left := started(limits.disk_bytes)):
            break
        await asyncio.sleep(0.05)
    assert left == []


async def test_a_call_that_is_cancelled_leaves_no_reply_to_the_next() -> None:
    async with open_workspace() as workspace:
        await workspace.call("python", code="1")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await workspace.call("python", code="import time; time.sleep(0.5)\n'late'")
        await asyncio.sleep(1.0)
        outcomes = [await run(workspace, "2") for _ in range(2)]
        assert "'late'\n" not in [output for _, output in outcomes]
        assert outcomes[-1] == ("ok", "2\n")


def autogroup(pid: int | str) -> list[str]:
    """Words about a process's autogroup; none for one of a session without, as init's."""
    return Path(f"/proc/{pid}/autogroup").read_text().split()


def cpu_share(pid: int | str) -> tuple[str, int]:
    """Name of a process's autogroup, and its nice value."""
    name, _, nice = autogroup(pid)
    return name, int(nice)


def children() -> list[str]:
    """Processes that this one has started."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


AUTOGROUPS = Path("/proc/sys/kernel/sched_autogroup_enabled")
needs_shares = pytest.mark.skipif(
    os.geteuid() != 0 or not AUTOGROUPS.exists() or AUTOGROUPS.read_text().strip() != "1",
    reason="only root sets shares, where the kernel has autogroups",
)


@needs_shares
async def test_a_box_starts_on_a_small_share_of_the_cpus_and_then_has_its_own() -> None:
    ours = autogroup("self")
    starting = asyncio.create_task(Box.start(Layout.find(), LIMITS, share.SMALL))
    seen = set()
    while not starting.done():
        for pid in children():
            with contextlib.suppress(OSError, ValueError):  # it has ended
                seen.add(cpu_share(pid))
        await asyncio.sleep(0.001)
    box = await starting
    name, nice = cpu_share(box.pid)
    assert nice == share.EQUAL
    assert (name, share.SMALL) in seen
    assert (await box.call("python", code="import os; os.fork()")).outcome is Outcome.OK
    await box.close()
    assert autogroup("self") == ours
    assert name not in ours
