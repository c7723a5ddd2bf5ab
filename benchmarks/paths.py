"""One policy, the same tasks, by several ways to the practice suite's tools: is the score the same?

    native   the suite's own tools, in the environment server
    mcp      the same tools in a process of their own an episode, through the mcp adapter
    endpoint the plain `openai` client, a process an episode, through the recording endpoint

A JSON line a path, with the bootstrap interval of pass@1 over tasks, and how many of the episodes
were word for word those of the first path (same seeds; a path that is slower makes other batches in
the engine, which a CPU in float32 rarely shows):

    {"bench": "paths", "path": "mcp", "temperature": 1.0, "tasks": 200, "pass@1": 0.93,
     "ci95": [0.89, 0.96], "same_episodes": 200, "failed": 0, "seconds": 61.0}

It takes a model of the demo, by default the trained one that `make demo` leaves.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measured import Measured, measuring

MODEL = Path("runs/demo/model")
FOLDER = Path("runs/paths")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to the tools: a suite, and how an evaluation of it differs."""

    table: dict[str, Any]
    settings: Sequence[str] = ()


PATHS = {
    "native": Way(table={"adapter": "practice"}),
    "mcp": Way(
        table={
            "adapter": "mcp",
            "suite": "practice",
            "command": [
                *(sys.executable, "-m", "envserver.suites.practice.mcp_server"),
                *("--split", "{split}", "--task", "{task}"),
            ],
        },
        settings=["actor.concurrency=16"],  # a process each
    ),
    "endpoint": Way(
        table={
            "adapter": "harness",
            "tasks": "practice",
            "command": [sys.executable, "examples/harness_openai.py"],
        },
        settings=["actor.concurrency=8", "actor.recording_listen=127.0.0.1:0"],
    ),
}
SLOW = ("envserver.step_timeout_seconds=300",)
"""Settings of the servers: a command's whole conversation is one step, beside those of others."""
SUITES = {"native": "practice", "mcp": "practice-mcp", "endpoint": "practice-endpoint"}
"""The names of their tables: a suite without options keeps its own."""


def main() -> None:
    """Measure every path with the same policy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the policy")
    parser.add_argument("--num-tasks", type=int, default=600)
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    if not arguments.model.exists():
        parser.error(f"{arguments.model} does not exist; `make demo` makes it")
    tables = {SUITES[path]: way.table for path, way in PATHS.items()}
    first: Measured | None = None
    with measuring(FOLDER, arguments.model, tables, SLOW) as policy:
        for path, way in PATHS.items():
            measured = policy.evaluate(
                path, SUITES[path], arguments.num_tasks, arguments.temperature, way.settings
            )
            first = first or measured
            line = {"bench": "paths", "path": path, "temperature": arguments.temperature}
            print(json.dumps(line | _figures(measured, first)), flush=True)


def _figures(measured: Measured, first: Measured) -> dict[str, Any]:
    pairs = zip(measured.attempts, first.attempts, strict=True)
    return {
        "tasks": measured.result["num_tasks"],
        **measured.figures(),
        "same_episodes": sum(one["messages"] == other["messages"] for one, other in pairs),
        "failed": measured.result["num_failed"],
        "seconds": round(measured.result["wall_seconds"], 1),
    }


if __name__ == "__main__":
    main()
