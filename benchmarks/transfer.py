"""Does what the demo learned on `practice` carry over to `practice-transfer`, which it never saw?

The model that the demo warms up and the one that it trains, on both suites, sampled and greedily,
with the same limits of length everywhere. A JSON line each:

    {"bench": "transfer", "model": "trained", "suite": "practice-transfer", "temperature": 1.0,
     "tasks": 200, "pass@1": 0.0, "ci95": [0.0, 0.0], "level1": 0.0, "level2": 0.0, "level3": 0.0,
     "calls": 312, "truncated": 12, "tokens_mean": 240.0}

`calls` is how many observations there were in all episodes, of calls that made no sense too.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.demo_runs import BASE
from benchmarks.measured import Measured, measuring
from benchmarks.paths import MODEL
from envserver.suites.practice.people import PEOPLE
from envserver.suites.practice.tasks import LEVELS
from envserver.suites.transfer.waters import WATERS

FOLDER = Path("runs/transfer")
TABLES = {
    PEOPLE.name: {"adapter": "envserver.suites.practice:PracticeSuite"},
    WATERS.name: {"adapter": "envserver.suites.transfer:TransferSuite"},
}
LIMITS = (
    "inference.max_model_len=1536",
    "learner.tasks.max_tokens=1500",
    "learner.tasks.max_new_tokens=96",
    "learner.tasks.max_turns=13",
)
"""The demo's tokenizer spells the words of the other suite: the expert's longest episode of 300
takes 743 tokens there, and 161 at home."""


def main() -> None:
    """Measure both models on both suites."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, default=BASE, help="folder of the model before")
    parser.add_argument("--trained", type=Path, default=MODEL, help="folder of the model after")
    parser.add_argument("--num-tasks", type=int, default=600)
    arguments = parser.parse_args()
    for model, folder in (("base", arguments.base), ("trained", arguments.trained)):
        if not folder.exists():
            parser.error(f"{folder} does not exist; `make demo` makes it")
        with measuring(FOLDER / model, folder, TABLES, LIMITS) as policy:
            for suite in TABLES:
                for temperature in (1.0, 0.0):
                    measured = policy.evaluate(
                        f"{suite}-{temperature:g}", suite, arguments.num_tasks, temperature
                    )
                    line = {"bench": "transfer", "model": model, "suite": suite}
                    figures = {"temperature": temperature, **_figures(measured)}
                    print(json.dumps(line | figures), flush=True)


def _figures(measured: Measured) -> dict[str, Any]:
    result = measured.result
    observed = [
        message["content"]
        for attempt in measured.attempts
        for message in attempt["messages"]
        if message["role"] == "tool"
    ]
    by_level = {f"level{n}": measured.figures(f"level{n}")["pass@1"] for n in LEVELS}
    return {
        "tasks": result["num_tasks"],
        **measured.figures(),
        **by_level,
        "calls": len(observed),
        "truncated": result["outcomes"].get("truncated", 0),
        "tokens_mean": round(result["tokens_mean"], 1),
    }


if __name__ == "__main__":
    main()
