"""Staleness: what corrections are worth when experience is 0, 1, 4 or 16 versions old.

Real runs of the demo's agent, shorter ones, deterministic: every batch is played by exactly the
version that is so many steps behind the one that learns from it (the first batches by the first
version). A JSON line a run, appended to benchmarks/staleness.jsonl, which is kept with the code;
runs that are there, of the same warmed-up model, are not run again, so that the benchmark can be
stopped and taken up.

    {"bench": "staleness", "algorithm": "vtrace", "staleness": 4, "seed": 0, "base": "1f0c...",
     "heldout": [[0, 0.3], [12, ...], ...], "heldout_seconds": [...], "reward": [...],
     "ess_min": ..., "kl_max": ...}

heldout is [step, accuracy] on the same 120 tasks of the test split at temperature 1, and
heldout_seconds when each was known, counted from the first version; reward is the mean of each
batch. It takes the model that `make demo` warms up (runs/demo-warmup-0/base).
"""

import argparse
import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.demo_runs import BASE, play, read_lines

RUNS = Path("runs/staleness")
RESULTS = Path(__file__).with_suffix(".jsonl")
STALENESS = (0, 1, 4, 16)
ALGORITHMS = {
    "uncorrected": ("learner.algorithm.correction=none",),
    "truncated": ("learner.algorithm.correction=token",),
    "masked": ("learner.algorithm.correction=token_mask",),
    "decoupled": ("learner.algorithm.proximal=interpolated",),
    "vtrace": ("learner.algorithm.name=vtrace",),
}
"""Their settings; `decoupled` clips against a policy between both, one version old."""
SETTINGS = (
    "run.deterministic=true",
    "learner.ranks=1",
    "learner.trainer_cpus=[]",
    "inference.cpus=[]",
    "inference.max_running=128",
    "actor.concurrency=128",
    "learner.tasks.groups_per_batch=16",
    "learner.train.steps=48",
    "learner.train.learning_rate=3e-4",
    "learner.algorithm.kl_coefficient=0.05",
    "learner.checkpoint_every_steps=0",
    "learner.evaluation.every_steps=12",
    "learner.evaluation.num_tasks=120",
)
FIRST_PORT = 31_000


def main() -> None:
    """Run what is not there yet and print every line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", choices=ALGORITHMS, nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--at-once", type=int, default=2, help="runs at one time")
    arguments = parser.parse_args()
    if not BASE.exists():
        parser.error(f"{BASE} does not exist; `make demo` makes it")
    RUNS.mkdir(parents=True, exist_ok=True)
    base = digest_base()
    known = {_key(line): line for line in read_lines(RESULTS) if line["base"] == base}
    cases = [
        (algorithm, staleness, seed)
        for seed in arguments.seeds
        for staleness in STALENESS
        for algorithm in arguments.algorithms
    ]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        new = [case for case in cases if case not in known]
        ports = (FIRST_PORT + 10 * index for index in range(len(new)))
        for line in pool.map(_run, new, ports):
            known[_key(line)] = line
    for case in cases:
        print(json.dumps(known[case]), flush=True)


def digest_base() -> str:
    """What tells the warmed-up model from those of other machines."""
    return hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()[:16]


def _key(line: dict[str, Any]) -> tuple[str, int, int]:
    return line["algorithm"], line["staleness"], line["seed"]


def _run(case: tuple[str, int, int], port: int) -> dict[str, Any]:
    algorithm, staleness, seed = case
    settings = (
        *SETTINGS,
        *ALGORITHMS[algorithm],
        f"run.seed={seed}",
        f"learner.tasks.max_staleness={staleness}",
    )
    start = time.monotonic()
    played = play(RUNS / f"{algorithm}-{staleness}-{seed}", settings, port)
    steps = played.steps
    result = {
        "bench": "staleness",
        "algorithm": algorithm,
        "staleness": staleness,
        "seed": seed,
        "base": digest_base(),
        "heldout": played.heldout,
        "heldout_seconds": played.heldout_seconds,
        "reward": [round(line["reward_mean"], 4) for line in steps],
        "episodes": sum(line["episodes"] for line in steps),
        "staleness_mean": [round(line["token_staleness_mean"], 2) for line in steps],
        "ess_min": round(min(line["effective_sample_size"] for line in steps), 4),
        "kl_max": round(max(line["kl_behaviour"] for line in steps), 4),
        "skipped": sum(line["skipped_updates"] for line in steps),
        "seconds": round(time.monotonic() - start, 1),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")
    return result


if __name__ == "__main__":
    main()
