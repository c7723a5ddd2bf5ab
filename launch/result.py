"""The demo's result.json, from what the roles wrote."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from launch.progress import Progress
from launch.tail import Tail
from understudy.config import Config
from understudy.errors import UnderstudyError


class Evaluations:
    """Results of `understudy eval`, by policy."""

    def __init__(self) -> None:
        self.results: dict[str, dict[str, Any]] = {}

    def read(self, name: str, path: Path, version: int) -> None:
        """Take the result that an evaluation of one version wrote.

        Raises:
            UnderstudyError: when another version played.
        """
        result = json.loads(path.read_text())
        if result["versions"] != [version]:
            raise UnderstudyError(
                f"{path}: versions {result['versions']} played, not {version}; start again"
            )
        self.results[name] = result

    def accuracies(self) -> dict[str, Any]:
        """Accuracy by policy: all, level1, level2, level3, each with ci95 and n."""
        return {
            name: {
                group: {key: figures[key] for key in ("accuracy", "ci95", "n")}
                for group, figures in result["accuracy"].items()
                if not group.startswith("tag:") and figures["n"]
            }
            for name, result in self.results.items()
        }

    def token_budget(self) -> dict[str, dict[str, float]]:
        """Mean tokens, sampled tokens and turns of an episode, by policy."""
        keys = ("tokens_mean", "sampled_tokens_mean", "turns_mean")
        return {
            name: {key: round(result[key], 2) for key in keys}
            for name, result in self.results.items()
        }


def collect_result(
    run_path: Path,
    evaluations: Evaluations,
    progress: Progress,
    config: Config,
    *,
    interrupted: bool,
) -> dict[str, Any]:
    """Put the run into numbers, write them to `result.json` and return them."""
    lines = Tail(run_path / "metrics.jsonl").new_lines()
    # Of a step that was taken again after a restart, the last line counts.
    steps = list({line["step"]: line for line in lines if line.get("kind") == "step"}.values())
    evaluated = {line["step"]: line for line in lines if line.get("kind") == "evaluation"}
    replicas = [line for line in lines if line.get("kind") == "replica"]
    result = {
        "seed": config.run.seed,
        "control": config.learner.tasks.shuffle_rewards,
        "interrupted": interrupted,
        **evaluations.accuracies(),
        "episodes": sum(step["episodes"] for step in steps),
        "steps": len(steps),
        "wall_seconds": {
            **progress.seconds,
            "total_after_setup": round(progress.elapsed, 2),
        },
        "versions_published": sum(line.get("kind") == "version" for line in lines),
        "heldout_accuracy": {
            f"step {step}": line["heldout_accuracy"] for step, line in sorted(evaluated.items())
        }
        or None,
        "staleness": _mean_and_max(steps, "staleness_mean", "staleness_max"),
        "logprob_mismatch": _mean_and_max(replicas, "mismatch_mean", "mismatch_max"),
        "token_budget": evaluations.token_budget(),
        "machine": _machine(),
    }
    run_path.mkdir(parents=True, exist_ok=True)
    (run_path / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _mean_and_max(lines: list[dict[str, Any]], mean: str, top: str) -> dict[str, float] | None:
    lines = [line for line in lines if line.get(mean) is not None]
    if not lines:
        return None
    return {
        "mean": sum(line[mean] for line in lines) / len(lines),
        "max": max(line[top] for line in lines),
    }


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
