"""Evaluation: plays tasks of a split once or more, keeps nothing but the scores.

The same tasks with the same seeds give comparable figures for two policies.
"""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actor.environment_pool import EnvironmentPool
from actor.episode import Player
from actor.inference_pool import InferencePool
from actor.server import fetch_chat
from understudy.client import Lease, TaskClient
from understudy.config import Config
from understudy.trajectory import Trajectory
from understudy.v1 import common_pb2, trajectory_pb2


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is played."""

    suite: str
    split: str
    num_tasks: int
    """Tasks 0 .. num_tasks - 1 of the split."""
    temperature: float
    seed: int


def wilson_interval(successes: float, number: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927, JASA 22: 209-212)."""
    if not number:
        return (0.0, 1.0)
    share = successes / number
    denominator = 1 + z * z / number
    centre = (share + z * z / (2 * number)) / denominator
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2)) / denominator
    return (max(centre - half, 0.0), min(centre + half, 1.0))


async def evaluate(config: Config, plan: EvaluationPlan) -> dict[str, Any]:
    """Play the plan against the run's inference and environments; see `summarise`.

    Raises:
        ConfigError: the environment servers lack the suite, the split or some of the tasks.
        PeerUnreachableError: no learner, no inference or no environment server.
    """
    learner = TaskClient(config.network.learner, config.network)
    inference = InferencePool(config.network, config.actor.generate_timeout_seconds)
    environments = EnvironmentPool(config.network, config.actor.step_timeout_seconds)
    try:
        for peer in (learner, inference, environments):
            await peer.wait_ready()
        await environments.check_tasks(plan.suite, plan.split, plan.num_tasks)
        player = Player(await fetch_chat(config, learner), inference, environments)
        start = time.monotonic()
        trajectories = await _play_all(player, config, plan)
        return summarise(trajectories, plan, time.monotonic() - start)
    finally:
        for peer in (learner, inference, environments):
            await peer.close()


async def _play_all(player: Player, config: Config, plan: EvaluationPlan) -> list[Trajectory]:
    slots = asyncio.Semaphore(config.actor.concurrency)

    async def play(ordinal: int) -> Trajectory:
        async with slots:
            return await player.play(_lease(ordinal, config, plan))

    return await asyncio.gather(*(play(ordinal) for ordinal in range(plan.num_tasks)))


def _lease(ordinal: int, config: Config, plan: EvaluationPlan) -> Lease:
    tasks = config.learner.tasks
    return Lease(
        lease_id=ordinal,
        ordinal=ordinal,
        sample_index=0,
        suite=plan.suite,
        split=plan.split,
        task_ordinal=ordinal,
        sampling=common_pb2.SamplingParameters(
            temperature=plan.temperature,
            max_new_tokens=tasks.max_new_tokens,
            seed=(plan.seed * 1_000_003 + ordinal) % 2**63,
        ),
        max_turns=tasks.max_turns,
        max_tokens=tasks.max_tokens,
        min_version=0,
        expires_after_seconds=math.inf,
    )


def summarise(
    trajectories: Sequence[Trajectory], plan: EvaluationPlan, wall_seconds: float
) -> dict[str, Any]:
    """Accuracy overall and by level, with 95 % intervals, and what else is worth knowing.

    An episode that failed for the infrastructure's sake counts as wrong, and is listed in outcomes.
    """
    levels = sorted({trajectory.level for trajectory in trajectories})
    by_level = {
        f"level{level}": _score([t for t in trajectories if t.level == level]) for level in levels
    }
    outcomes = Counter(
        trajectory_pb2.Outcome.Name(t.outcome).removeprefix("OUTCOME_").lower()
        for t in trajectories
    )
    number = max(len(trajectories), 1)
    return {
        "suite": plan.suite,
        "split": plan.split,
        "temperature": plan.temperature,
        "seed": plan.seed,
        "accuracy": {"all": _score(trajectories), **by_level},
        "outcomes": dict(outcomes),
        "turns_mean": sum(len(t.turns) for t in trajectories) / number,
        "tokens_mean": sum(t.num_tokens for t in trajectories) / number,
        "sampled_tokens_mean": sum(t.num_sampled_tokens for t in trajectories) / number,
        "versions": sorted({t.oldest_version for t in trajectories} - {None}),
        "wall_seconds": wall_seconds,
    }


def _score(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    number = len(trajectories)
    correct = sum(t.reward for t in trajectories)
    low, high = wilson_interval(correct, number)
    return {"accuracy": correct / max(number, 1), "ci95": [low, high], "n": number}


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(path)
