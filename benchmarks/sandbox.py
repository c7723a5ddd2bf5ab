"""Sandbox: time of first and later calls, and of a neighbour's beside code that takes all it can.

    {"bench": "sandbox", "call": "first", "calls": 40, "p50_ms": ..., "p99_ms": ...}

cold: no box stands ready; first: one does; later: the same box again. neighbour: calls of one box
while another runs what `beside` says, again and again, each time until a limit ends it, by turns
with nothing beside it; ratio is the p99 beside over the p99 alone.
"""

import argparse
import asyncio
import json
import time

import numpy as np

from envserver.sandbox import Layout, Limits, Pool, Workspace
from understudy.process import prepare_process, run

NUM_WARM = 4
LOAD = "sum(range(20_000))"
"""About a millisecond of work."""
PAUSE_SECONDS = 0.003
TURN_SECONDS = 0.5
HOGS = {
    "endless loop": "while True: pass",
    "fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "16 busy processes": "import os\nfor _ in range(4): os.fork()\nwhile True: pass",
    "memory hog": "kept = []\nwhile True: kept.append(bytearray(2**20) + b'x')",
    "endless output": "while True: print('x' * 1000)",
}


def main() -> None:
    """Run every case and print its line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=40, help="first calls; later ones are tenfold")
    parser.add_argument("--turns", type=int, default=8, help="half seconds beside each, and alone")
    arguments = parser.parse_args()
    prepare_process("benchmark")
    raise SystemExit(run(measure(arguments.calls, arguments.turns)))


async def measure(num_calls: int, num_turns: int) -> int:
    """All cases."""
    pool = Pool(Layout.find(), Limits(call_seconds=2.0), NUM_WARM)
    await pool.start()
    try:
        first, later = await _calls(pool, num_calls)
        _report("cold", await _cold(num_calls // 2))
        _report("first", first)
        _report("later", later)
        for name, hog in HOGS.items():
            alone, beside = await _neighbour(pool, hog, num_turns)
            ratio = np.percentile(beside, 99) / np.percentile(alone, 99)
            _report("alone", alone)
            _report("neighbour", beside, beside=name, ratio=round(float(ratio), 2))
    finally:
        await pool.close()
    return 0


async def _cold(num_calls: int) -> list[float]:
    times = []
    for _ in range(num_calls):
        pool = Pool(Layout.find(), Limits(), 0)
        start = time.perf_counter()
        workspace = Workspace(pool)
        await workspace.call("python", code="1 + 1")
        times.append(time.perf_counter() - start)
        await workspace.close()
    return times


async def _calls(pool: Pool, num_calls: int) -> tuple[list[float], list[float]]:
    first: list[float] = []
    later: list[float] = []
    for _ in range(num_calls):
        await asyncio.sleep(0.1)  # the pool makes up for the box before
        workspace = Workspace(pool)
        for number in range(11):
            start = time.perf_counter()
            await workspace.call("python", code="1 + 1")
            (later if number else first).append(time.perf_counter() - start)
        await workspace.close()
    return first, later


async def _neighbour(pool: Pool, hog: str, num_turns: int) -> tuple[list[float], list[float]]:
    """Times of a box's calls alone, and while another runs `hog`."""
    calm = Workspace(pool)
    await calm.call("python", code=LOAD)
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(num_turns):
        await _turn(calm, alone)
        loud = asyncio.create_task(_repeat(Workspace(pool), hog))
        await _turn(calm, beside)
        loud.cancel()
        await asyncio.wait([loud])
    await calm.close()
    return alone, beside


async def _turn(workspace: Workspace, times: list[float]) -> None:
    end = time.perf_counter() + TURN_SECONDS
    while (start := time.perf_counter()) < end:
        await workspace.call("python", code=LOAD)
        times.append(time.perf_counter() - start)
        await asyncio.sleep(PAUSE_SECONDS)


async def _repeat(workspace: Workspace, code: str) -> None:
    try:
        while True:
            await workspace.call("python", code=code)
    finally:
        await workspace.close()


def _report(call: str, times: list[float], **more: object) -> None:
    p50, p99 = np.percentile(np.array(times) * 1000, [50, 99])
    line = {"bench": "sandbox", "call": call, **more, "calls": len(times)}
    print(json.dumps(line | {"p50_ms": round(p50, 2), "p99_ms": round(p99, 2)}), flush=True)


if __name__ == "__main__":
    main()
