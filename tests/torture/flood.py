"""A trainer that stands still while ten times as many episodes are offered as it ever trained.

Nothing limits how far ahead episodes are played but the log's quota. So the log fills up to it,
what actors have finished waits with them up to `max_unacked_bytes`, nothing is leased, and
everybody waits. The memory of each role is read all the while, and held against what the
configuration allows it. Once the trainer goes on and a checkpoint has made room, trajectories are
stored again.
"""

import asyncio
import time
from pathlib import Path

import psutil

from tests.torture.campaign import Result
from tests.torture.players import be_impatient
from tests.torture.system import CONCURRENCY, NUM_ACTORS, PROGRESS_SECONDS, System

TIMES = 10
"""Episodes side by side, as a multiple of those of the other cases."""
MIB = 2**20
BUFFER_BYTES = UNACKED_BYTES = MIB
GROUPS_PER_BATCH = 64
"""So many that the trainer works off a whole segment of the log, whose payloads go together, in
some seconds."""
QUOTA_BYTES_PER_SECOND = 64 * 2**10
"""Quota for each second of the flood: reached in less than half of it."""
SLACK_BYTES = 32 * MIB
"""What a role may take beyond its queues: sessions and requests under way, and what Python and gRPC
keep of their first work."""
SETTLE_SECONDS = 3.0


def torture(seconds: float, folder: Path) -> Result:
    """Flood the intake for so many seconds."""
    be_impatient()
    return asyncio.run(_torture(seconds, folder))


async def _torture(seconds: float, folder: Path) -> Result:
    begin = time.monotonic()
    quota = int(seconds * QUOTA_BYTES_PER_SECOND)
    system = System(
        folder,
        seed=0,
        settings=(
            f"actor.concurrency={TIMES * CONCURRENCY}",
            f"actor.max_unacked_bytes={UNACKED_BYTES}",
            f"learner.log.buffer_bytes={BUFFER_BYTES}",
            f"learner.log.quota_bytes={quota}",
            "learner.log.retention=checkpoint",
            "learner.tasks.max_staleness=1000000",
            f"learner.tasks.groups_per_batch={GROUPS_PER_BATCH}",
        ),
    )
    result = Result(campaign="flood", seed=0)
    async with system.running():
        await asyncio.sleep(SETTLE_SECONDS)
        system.world.trains.clear()
        base, highest = _memory(system), _memory(system)
        full_after = None
        start = time.monotonic()
        while (passed := time.monotonic() - start) < seconds:
            await asyncio.sleep(0.2)
            highest = {name: max(highest[name], now) for name, now in _memory(system).items()}
            if full_after is None and _log_bytes(system) >= quota:
                full_after = passed
        system.check_others()
        log_bytes = _log_bytes(system)
        went_on = time.time()
        system.world.trains.set()
        await system.progress("the flood")
        await _stored_since(system, went_on)
    result.violations, result.figures = system.check()
    if full_after is None:
        result.violations.append(f"the log has {log_bytes} bytes: its quota of {quota} was not met")
    if log_bytes > quota + NUM_ACTORS * BUFFER_BYTES:
        result.violations.append(f"the log has {log_bytes} bytes, far beyond its quota of {quota}")
    growth = {name: highest[name] - base[name] for name in base}
    budgets = {name: _budget(name, quota) for name in base}
    result.violations += [
        f"{name} grew by {growth[name]} bytes; its budget is {budget}"
        for name, budget in budgets.items()
        if growth[name] > budget
    ]
    result.seconds = time.monotonic() - begin
    result.extra = {
        "flood_seconds": seconds,
        "quota_mib": round(quota / MIB, 1),
        "log_mib": round(log_bytes / MIB, 1),
        "full_after_seconds": full_after and round(full_after, 1),
        "growth_mib": {name: round(number / MIB, 1) for name, number in growth.items()},
        "budget_mib": {name: round(number / MIB, 1) for name, number in budgets.items()},
    }
    return result


async def _stored_since(system: System, start: float) -> None:
    """Wait for a trajectory that is stored later than this."""
    deadline = time.monotonic() + PROGRESS_SECONDS
    while system.stored_times()[-1] < start:
        if time.monotonic() > deadline:
            system.history.violation("nothing was stored once the trainer went on")
            return
        await asyncio.sleep(0.5)


def _budget(name: str, quota: int) -> int:
    """Bytes that a role may grow by: what its configuration lets its queues hold, and the slack."""
    if name == "intake":  # its index has less of an episode than the log
        return quota + BUFFER_BYTES + NUM_ACTORS * UNACKED_BYTES + SLACK_BYTES
    return SLACK_BYTES + (UNACKED_BYTES if name.startswith("actor") else 0)


def _memory(system: System) -> dict[str, int]:
    """Resident bytes of each role."""
    return {
        name: psutil.Process(process.pid).memory_info().rss
        for name, process in system.processes.items()
    }


def _log_bytes(system: System) -> int:
    folder = system.config.run.path / "log"
    return sum(path.stat().st_size for path in folder.glob("*.seg"))
