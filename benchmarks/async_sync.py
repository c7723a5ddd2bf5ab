"""Async against sync at equal hardware: wall time until the agent is nearly as good as it gets.

The demo's agent on two cores, seeds in turn. `async` plays the next batch while it trains on one,
a core each; `sync` plays a batch with the newest weights and then trains on it, each with both
cores; `sync_halves` is sync with a core each, as async has them. A JSON line a run, and a last one:

    {"bench": "async_sync", "case": "sync", "seed": 0, "steps": 80, "heldout": [[0, 0.3], ...],
     "final": 0.83, "seconds_to_80": ..., "seconds": ...}
    {"bench": "async_sync", "case": "ratio", "sync": 1.4, "sync_halves": 2.1}

seconds_to_80 is the time from the first evaluation's version to the first of which the accuracy is
80 % of the best mean that any case ended with, interpolated between evaluations; a ratio is that of
a sync case over that of async, summed over seeds. It takes the model that `make demo` warms up.
"""

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.demo_runs import BASE, Played, play

RUNS = Path("runs/async_sync")
ALONE = ("inference.cpus=[]", "learner.trainer_cpus=[]", "inference.threads=2")
"""Roles that take turns have both cores in theirs."""
CASES = {
    "async": ("learner.tasks.max_staleness=1",),
    "sync": ("learner.tasks.max_staleness=0", *ALONE),
    "sync_halves": ("learner.tasks.max_staleness=0",),
}
FIRST_PORT = 31_500
SHARE = 0.8


def main() -> None:
    """Run every case with every seed, and print what each took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=80)
    arguments = parser.parse_args()
    if not BASE.exists():
        parser.error(f"{BASE} does not exist; `make demo` makes it")
    settings = (
        f"learner.train.steps={arguments.steps}",
        "learner.evaluation.every_steps=8",
        "learner.evaluation.num_tasks=120",
        "learner.checkpoint_every_steps=0",
    )
    played = {
        (case, seed): play(
            RUNS / f"{case}-{seed}", (*settings, *CASES[case], f"run.seed={seed}"), FIRST_PORT
        )
        for seed in arguments.seeds
        for case in CASES
    }
    finals = {
        case: statistics.fmean(played[case, seed].heldout[-1][1] for seed in arguments.seeds)
        for case in CASES
    }
    seconds = {key: seconds_to(SHARE * max(finals.values()), run) for key, run in played.items()}
    for (case, seed), run in played.items():
        print(json.dumps(_line(case, seed, run) | {"seconds_to_80": seconds[case, seed]}))
    print(json.dumps(_ratios(seconds, arguments.seeds)))


def _line(case: str, seed: int, run: Played) -> dict[str, Any]:
    return {
        "bench": "async_sync",
        "case": case,
        "seed": seed,
        "steps": len(run.steps),
        "heldout": run.heldout,
        "final": run.heldout[-1][1],
        "seconds": round(run.steps[-1]["time"] - _issued(run.evaluations[0]), 1),
    }


def seconds_to(accuracy: float, run: Played) -> float | None:
    """Time to an accuracy, by when versions were published; None if the run never had it."""
    points = [(_issued(line), line["heldout_accuracy"]) for line in run.evaluations]
    for (before, low), (after, high) in pairwise(points):
        if high >= accuracy > low:
            there = before + (after - before) * (accuracy - low) / (high - low)
            return round(float(there - points[0][0]), 1)
    return None


def _issued(evaluation: dict[str, Any]) -> float:
    """When its version was published."""
    return float(evaluation["time"] - evaluation["seconds"])


def _ratios(seconds: dict[tuple[str, int], float | None], seeds: list[int]) -> dict[str, Any]:
    line: dict[str, Any] = {"bench": "async_sync", "case": "ratio"}
    for case in CASES:
        pairs = [(seconds[case, seed], seconds["async", seed]) for seed in seeds]
        if case == "async":
            continue
        times = [(sync, other) for sync, other in pairs if sync is not None and other is not None]
        if len(times) == len(seeds):
            line[case] = round(sum(t for t, _ in times) / sum(o for _, o in times), 2)
    return line


if __name__ == "__main__":
    main()
