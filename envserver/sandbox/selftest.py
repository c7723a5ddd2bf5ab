"""Tries to get out of a box and to outgrow it, at the server's start: no probe may succeed.

inside/probes.py tries what can be tried from inside. What is told apart on the host only is tried
here: limits, signals, and processes that outlive their box.
"""

import asyncio
import logging
import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from envserver.sandbox import seccomp, usage
from envserver.sandbox.box import Box
from envserver.sandbox.layout import Layout
from envserver.sandbox.limits import MIB, Limits, Outcome, Reply
from envserver.sandbox.pool import Pool
from understudy.config import SandboxConfig
from understudy.errors import ConfigError

LIMITS = Limits(call_seconds=30.0, memory_bytes=256 * MIB, processes=32)
"""Smaller than any that a configuration can ask for, so that the self-test harms nobody."""
SECRET = "UNDERSTUDY_SELF_TEST"
DAEMON = "import os, time\nfor _ in range(2):\n  if os.fork() == 0: time.sleep(600)"
ATTEMPTS: Mapping[str, tuple[str, frozenset[Outcome]]] = {
    "fork bomb": (
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        frozenset({Outcome.PROCESSES}),
    ),
    "2 GiB allocation": ("bytearray(2**31)", frozenset({Outcome.MEMORY})),
    "memory of many processes": (
        "import os, time\nfor _ in range(2): os.fork()\nkept = b'x' * (96 * 2**20)\ntime.sleep(60)",
        frozenset({Outcome.MEMORY}),
    ),
    "100 MB file": (
        "with open('big', 'wb') as file:\n  for _ in range(100): file.write(b'x' * 10**6)",
        frozenset({Outcome.ERROR}),
    ),
    "a million files": (
        "for n in range(10**6): open(str(n), 'w').close()",
        frozenset({Outcome.DISK}),
    ),
    "endless loop": ("while True: pass", frozenset({Outcome.TIME})),
    "1 GB of output": ("for _ in range(1000): print('x' * 10**6)", frozenset({Outcome.OUTPUT})),
}
"""Attempt -> code, and the outcomes that mean it was stopped."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the self-test found."""

    layers: str
    """What holds boxes, e.g. `layout root, seccomp, Landlock 7, limits by rlimits and watch`."""
    results: Mapping[str, str]
    """Every probe by name, with what it reached; an empty string if it was held."""

    @property
    def reached(self) -> dict[str, str]:
        """The probes that were not held; empty if the sandbox is sound."""
        return {name: what for name, what in self.results.items() if what}


async def open_sandbox(config: SandboxConfig) -> Pool:
    """A pool of boxes that have passed the self-test.

    Raises:
        ConfigError: if a probe gets out and envserver.sandbox.unsafe is not set.
    """
    try:
        layout = Layout.find(unsafe=config.unsafe)
        report = await self_test(layout)
    except (OSError, RuntimeError) as error:
        report = Report(layers="none", results={"start": str(error)})
        layout = Layout(kind="none")
    _log.info("sandbox: %s; %d probes", report.layers, len(report.results))
    if report.reached:
        _refuse(config, report)
    pool = Pool(layout, Limits.of(config), config.warm_boxes)
    await pool.start()
    return pool


def _refuse(config: SandboxConfig, report: Report) -> None:
    found = "; ".join(f"{name}: {what}" for name, what in report.reached.items())
    if not config.unsafe:
        raise ConfigError(
            f"the sandbox does not hold ({found}), and a suite of envserver.suites needs it; see "
            "docs/sandbox.md, or set envserver.sandbox.unsafe if nothing here is worth protecting"
        )
    _log.warning(
        "envserver.sandbox.unsafe: what models write runs with NO SANDBOX THAT HOLDS: %s", found
    )


async def self_test(layout: Layout) -> Report:
    """Run every probe. Raises OSError if no box starts at all."""
    if layout.kind == "none":
        return Report(layers="none", results={"layout": "there is no sandbox"})
    results, landlock = await _probe_inside(layout)
    for name in ATTEMPTS:
        results[name] = await attempt(layout, name)
    results["a daemon that outlives the kill"] = await _outlive(layout)
    layers = [f"layout {layout.kind}", f"Landlock {landlock or 'missing'}"]
    layers += ["seccomp" if seccomp.is_available() else "seccomp missing"]
    return Report(layers=", ".join([*layers, "limits by rlimits and watch"]), results=results)


async def attempt(layout: Layout, name: str) -> str:
    """Try to outgrow a box. Returns what went wrong, or an empty string."""
    code, expected = ATTEMPTS[name]
    limits = replace(LIMITS, call_seconds=1.0) if Outcome.TIME in expected else LIMITS
    async with _box(layout, limits) as box:
        reply = await _watched(box, code)
    return "" if reply.outcome in expected else f"ended as {reply.outcome}"


async def _probe_inside(layout: Layout) -> tuple[dict[str, str], int]:
    """Probes from inside, with a secret in this process's environment and a bystander outside."""
    token = secrets.token_hex(8)
    os.environ[SECRET] = token
    bystander = subprocess.Popen(["sleep", "600"])  # noqa: ASYNC220 - returns at once
    try:
        async with _box(layout) as box:
            reply = await box.call("probe", secrets=[token])
        if not isinstance(reply.value, dict):
            return {"probes": f"they could not be run: {reply.outcome} {reply.output[-300:]}"}, 0
        results = {str(name): str(what) for name, what in reply.value.items()}
        if bystander.poll() is not None:
            results["signals to the host"] = "a process on the host was ended"
        return results, box.landlock
    finally:
        del os.environ[SECRET]
        bystander.kill()
        bystander.wait()


async def _outlive(layout: Layout) -> str:
    async with _box(layout) as box:
        await box.call("python", code=DAEMON)
        pids = usage.measure(box.pid).pids
    if len(pids) < 4:
        return "the daemons were not found"
    for _ in range(200):
        if not any(map(_exists, pids)):
            return ""
        await asyncio.sleep(0.05)
    return f"{len(pids)} processes live on"


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def _watched(box: Box, code: str) -> Reply:
    """A call during which the box is looked at, as a pool does."""
    call = asyncio.create_task(box.call("python", code=code))
    while not call.done():
        await asyncio.wait([call], timeout=0.02)
        if box.alive:
            box.check()
    return call.result()


@asynccontextmanager
async def _box(layout: Layout, limits: Limits = LIMITS) -> AsyncIterator[Box]:
    box = await Box.start(layout, limits)
    try:
        yield box
    finally:
        await box.close()
