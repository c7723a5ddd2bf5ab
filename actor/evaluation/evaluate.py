"""An evaluation from its plan to its files.

plan -> backend, environment servers -> attempts (taken up, or begun) -> result -> files
"""

import contextlib
import json
import logging
import math
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from actor.agents.opening import agent_policy
from actor.environment_pool import EnvironmentPool
from actor.evaluation.attempts import Attempt, AttemptsFile
from actor.evaluation.backends import EndpointPlan, Opener, endpoint_backend, service_backend
from actor.evaluation.plan import EvaluationPlan, num_tasks_of, settings_of
from actor.evaluation.play import Attempts
from actor.evaluation.result import Scale, figures_of, is_submission, submission
from understudy.config import Config
from understudy.errors import ConfigError
from understudy.files import write_durably
from understudy.v1 import environment_pb2

_log = logging.getLogger(__name__)


async def evaluate(
    config: Config,
    plan: EvaluationPlan,
    out: Path | None = None,
    endpoint: EndpointPlan | None = None,
) -> dict[str, Any]:
    """Play the plan and say what came of it, in files beside `out` if it is given.

    Raises:
        ConfigError: the environment servers lack the suite, the split or some of the tasks;
            attempts that are there were played under other settings; the endpoint refuses.
        PeerUnreachableError: no environment server, or nobody who would reply.
    """
    environments = EnvironmentPool(config.network, config.actor.step_timeout_seconds)
    try:
        async with _backend(config, endpoint) as open_backend:
            await environments.wait_ready()
            description = await environments.describe(plan.suite)
            num_tasks = num_tasks_of(plan, description)
            await environments.check_tasks(plan.suite, plan.split, num_tasks)
            scale = _scale(plan, description)
            backend = await open_backend()
            settings = settings_of(config, plan, description.digest, backend.name, backend.tools)
            file = AttemptsFile(out and _beside(out, ".attempts.jsonl"), settings)
            with contextlib.closing(file):
                start = time.monotonic()
                async with agent_policy(config, backend.policy) as policy:
                    await Attempts(config, plan, policy, environments, file).play(num_tasks)
                kept = _planned(plan, num_tasks, file)
                result = {
                    **{"suite": plan.suite, "split": plan.split, "policy": backend.name},
                    **{"temperature": plan.temperature, "seed": plan.seed, "k": plan.k},
                    "num_tasks": num_tasks,
                    **figures_of(kept, scale),
                    "num_resumed": file.num_resumed,
                    "wall_seconds": time.monotonic() - start,
                }
                if out:
                    _write_files(out, result, kept, file)
    finally:
        await environments.close()
    return result


def _planned(plan: EvaluationPlan, num_tasks: int, file: AttemptsFile) -> list[Attempt]:
    """Attempts of the plan, in order; a file that is taken up may have more."""
    attempts = [a for a in file.attempts.values() if a.task < num_tasks and a.attempt < plan.k]
    return sorted(attempts, key=lambda attempt: attempt.key)


def _backend(config: Config, endpoint: EndpointPlan | None) -> AbstractAsyncContextManager[Opener]:
    return endpoint_backend(config, endpoint) if endpoint else service_backend(config)


def _scale(plan: EvaluationPlan, description: environment_pb2.DescribeSuiteResponse) -> Scale:
    passing: float | None = plan.passing_reward
    if passing is None and math.isfinite(description.max_reward):
        passing = description.max_reward
    if passing is None and plan.k > 1:
        raise ConfigError(
            f"suite {plan.suite!r} has no highest reward; say with --passing-reward from which "
            "reward an attempt has passed"
        )
    return Scale(
        k=plan.k,
        seed=plan.seed,
        passing_reward=passing,
        best_reward=description.max_reward,
        worst_reward=description.min_reward,
    )


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.stem + ending)


def _write_files(
    out: Path, result: dict[str, Any], kept: list[Attempt], file: AttemptsFile
) -> None:
    """JSON, report and, where task ids are GAIA's, the submission."""
    from actor.evaluation.report import write_report

    if is_submission(kept):
        lines = submission(file.whole(kept))
        _write(_beside(out, ".submission.jsonl"), [json.dumps(line) for line in lines])
        if missing := result["num_tasks"] - len(lines):
            _log.warning("the submission has no line for %d tasks that never began", missing)
    write_report(result, file.whole(kept), _beside(out, ".html"))
    _write(out, [json.dumps(result, indent=2)])


def _write(path: Path, lines: list[str]) -> None:
    write_durably(path, ["".join(f"{line}\n" for line in lines).encode()])
