"""The cases of the intake: random kills, failpoints, pulled plugs, and bugs that must be found."""

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.torture.buggy_intake import BUGS
from tests.torture.campaign import FAILPOINTS, Plan, Result, run_campaign, split_kills
from tests.torture.disks import ImageDisk, StrictDisk

FIND_SECONDS = 60.0
"""Time within which a seeded bug must be found."""
SLOW_SYNC_SECONDS = 0.02

SETTINGS: dict[str, Plan] = {
    # What is told too early is durable a moment later: on a slow disk the moment is longer.
    "ack_before_flush": Plan(name="", sync_seconds=SLOW_SYNC_SECONDS),
    "answer_before_flush": Plan(name="", sync_seconds=SLOW_SYNC_SECONDS),
    "no_fdatasync": Plan(name="", disk=StrictDisk),
    "no_directory_sync": Plan(name="", disk=StrictDisk),
    "trim_at_trained": Plan(name="", retention="checkpoint"),
}
"""Where a bug shows, if not by plain kills."""


def kills(number: int, seed: int, folder: Path) -> Iterator[Result]:
    """kill -9 at random moments."""
    for index, plan in enumerate(split_kills(number, name="kills", seed=seed)):
        yield run_campaign(plan, folder / f"kills-{index}")


def failpoints(each: int, seed: int, folder: Path) -> Iterator[Result]:
    """Every failpoint so many times, at a random one of its hits."""
    draw = random.Random(seed)
    for name, most in FAILPOINTS.items():
        hits = [f"{name}:{draw.randint(1, most)}" for _ in range(each)]
        retention = draw.choice(("all", "checkpoint"))
        plan = Plan(name=name, seed=seed, failpoints=hits, segment_bytes=2**14, retention=retention)
        yield run_campaign(plan, folder / name)


def images(number: int, seed: int, folder: Path) -> Iterator[Result]:
    """Pulled plugs on ext4, fast and slow to sync."""
    for index, plan in enumerate(split_kills(number, name="image", seed=seed, disk=ImageDisk)):
        slow = replace(plan, sync_seconds=SLOW_SYNC_SECONDS * (index % 2))
        yield run_campaign(slow, folder / f"image-{index}")


def strict(number: int, seed: int, folder: Path) -> Iterator[Result]:
    """Crashes that leave no more than POSIX grants."""
    for index, plan in enumerate(split_kills(number, name="strict", seed=seed, disk=StrictDisk)):
        # A segment that retention replaces is not followed by the strict disk.
        slow = replace(plan, retention="all", sync_seconds=SLOW_SYNC_SECONDS)
        yield run_campaign(slow, folder / f"strict-{index}")


def find_bug(name: str, seed: int, folder: Path, plan: Plan | None = None) -> Result:
    """Campaigns against an intake with a bug until one finds it, or time is up."""
    begin = time.monotonic()
    setting = plan or SETTINGS.get(name, Plan(name=""))
    attempt = 0
    while True:
        chosen = replace(
            setting, name=name, bug=name, seed=seed + attempt, kills=5, segment_bytes=2**15
        )
        result = run_campaign(chosen, folder / f"{name}-{attempt}")
        result.seconds = time.monotonic() - begin
        if result.violations or result.seconds > FIND_SECONDS:
            return result
        attempt += 1


def find_bugs(seed: int, folder: Path) -> Iterator[Result]:
    """All seeded bugs."""
    for name in BUGS:
        yield find_bug(name, seed, folder)
