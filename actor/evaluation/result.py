"""What attempts amount to: figures by level and tag, and a submission to GAIA's leaderboard.

An attempt that the infrastructure failed says nothing about the policy: it is in no figure, is
counted in `failed`, and `accuracy_if_failed` has the accuracy were all such wrong, or all right.
"""

import math
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actor.evaluation.attempts import Attempt
from actor.evaluation.statistics import Estimate, curves, estimate
from understudy.evaluation import interval_of

_FAILURES_TOLD = 5
TAG = "tag:"
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How attempts become figures."""

    k: int
    seed: int
    """Of the bootstrap."""
    passing_reward: float | None
    """From this reward on an attempt has passed; None: the suite knows no such thing."""
    worst_reward: float
    best_reward: float
    """Lowest and highest reward of the suite; may be infinite."""


def passes(reward: float, passing_reward: float) -> bool:
    """Whether a reward, which has travelled as float32, reaches another."""
    return reward >= passing_reward - _ROUNDING * max(abs(passing_reward), 1.0)


def figures_of(attempts: Sequence[Attempt], scale: Scale) -> dict[str, Any]:
    """All figures of some attempts, ready for JSON. Groups: all, level1, level2, ..., tag:x."""
    kinds = {a.task: (a.level, a.tags) for a in attempts if a.task_id}
    judged = [a for a in attempts if not a.has_failed]
    scored = [a for a in attempts if a.reward is not None or a.has_failed]
    number = max(len(judged), 1)
    return {
        "passing_reward": scale.passing_reward,
        "reward_range": [_finite(scale.worst_reward), _finite(scale.best_reward)],
        "accuracy": {
            name: _group([a for a in scored if name in _groups(a, kinds)], scale)
            for name in _names(kinds)
            if any(a.reward is not None for a in attempts)
        },
        "num_attempts": len(attempts),
        "num_failed": len(attempts) - len(judged),
        "num_unscored": sum(a.reward is None for a in judged),
        "num_retried": sum(a.tries > 1 for a in attempts),
        "outcomes": dict(Counter(a.outcome for a in attempts)),
        "failures": _failures(attempts),
        "turns_mean": sum(a.turns for a in judged) / number,
        "tokens_mean": sum(a.tokens for a in judged) / number,
        "sampled_tokens_mean": sum(a.sampled_tokens for a in judged) / number,
        "seconds_mean": sum(a.seconds for a in judged) / number,
        "versions": sorted({version for a in attempts for version in a.versions}),
    }


Kinds = Mapping[int, tuple[int, tuple[str, ...]]]
"""Level and tags by task, of the tasks that were ever opened."""


def _names(kinds: Kinds) -> list[str]:
    levels = sorted({level for level, _ in kinds.values()})
    tags = sorted({tag for _, tags in kinds.values() for tag in tags})
    return ["all", *(f"level{level}" for level in levels), *(f"{TAG}{tag}" for tag in tags)]


def _groups(attempt: Attempt, kinds: Kinds) -> set[str]:
    if attempt.task not in kinds:
        return {"all"}
    level, tags = kinds[attempt.task]
    return {"all", f"level{level}", *(f"{TAG}{tag}" for tag in tags)}


def _group(attempts: Sequence[Attempt], scale: Scale) -> dict[str, Any]:
    """The figures of one group; each task counts the same, however often it was attempted."""
    failed = sum(a.has_failed for a in attempts)
    rewards = list(_by_task(attempts).values())
    means = [float(np.mean(of_task)) for of_task in rewards]
    at, hat = _curves(rewards, scale)
    return {
        "accuracy": sum(means) / len(means) if means else None,
        "ci95": _interval(means, scale) if means else None,
        "n": len(attempts) - failed,
        "tasks": len(rewards),
        "failed": failed,
        "accuracy_if_failed": [
            _mean_with_failed(attempts, scale.worst_reward),
            _mean_with_failed(attempts, scale.best_reward),
        ],
        "pass_at_k": list(_points(at)),
        "pass_hat_k": list(_points(hat)),
    }


def _curves(
    rewards: Sequence[Sequence[float]], scale: Scale
) -> tuple[list[Estimate | None], list[Estimate | None]]:
    if scale.passing_reward is None:
        return [], []
    passing = scale.passing_reward
    counts = [(len(some), sum(passes(reward, passing) for reward in some)) for some in rewards]
    return curves(counts, scale.k, scale.seed)


def _by_task(attempts: Iterable[Attempt], if_failed: float | None = None) -> dict[int, list[float]]:
    """Rewards by task; those of failed attempts as given, or left out."""
    rewards: dict[int, list[float]] = {}
    for attempt in attempts:
        reward = if_failed if attempt.has_failed else attempt.reward
        if reward is not None:
            rewards.setdefault(attempt.task, []).append(reward)
    return rewards


def _mean_with_failed(attempts: Sequence[Attempt], if_failed: float) -> float | None:
    means = [float(np.mean(rewards)) for rewards in _by_task(attempts, if_failed).values()]
    return _finite(sum(means) / len(means)) if means else None


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None


def _interval(means: Sequence[float], scale: Scale) -> list[float]:
    """Of one attempt a task as within a run; of more, by the bootstrap over tasks."""
    if scale.k == 1:
        return list(interval_of(means))
    (mean,) = estimate(np.array(means).reshape(-1, 1), scale.seed)
    assert mean is not None
    return [mean.low, mean.high]


def _points(curve: Sequence[Estimate | None]) -> Iterator[dict[str, Any]]:
    for k, point in enumerate(curve, 1):
        if point:
            interval = [point.low, point.high]
            yield {"k": k, "value": point.value, "ci95": interval, "tasks": point.num_tasks}


def _failures(attempts: Iterable[Attempt]) -> list[dict[str, Any]]:
    """What attempts failed of, the most frequent first."""
    told = Counter(f"{a.outcome}: {a.detail}" for a in attempts if a.has_failed)
    return [{"what": what, "attempts": n} for what, n in told.most_common(_FAILURES_TOLD)]


def is_submission(attempts: Iterable[Attempt]) -> bool:
    """Whether task ids are UUIDs, as GAIA's are."""
    ids = {attempt.task_id for attempt in attempts if attempt.task_id}
    return bool(ids) and all(map(_is_uuid, ids))


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def submission(attempts: Iterable[Attempt]) -> list[dict[str, str]]:
    """Lines for GAIA's leaderboard: of each task the answer of the first attempt that did not fail,
    or an empty one."""
    chosen: dict[str, Attempt] = {}
    for attempt in sorted(attempts, key=lambda a: (a.has_failed, a.key)):
        if attempt.task_id:
            chosen.setdefault(attempt.task_id, attempt)
    return [
        {
            "task_id": attempt.task_id,
            "model_answer": "" if attempt.has_failed else attempt.answer,
            "reasoning_trace": _trace(attempt.messages),
        }
        for attempt in sorted(chosen.values(), key=lambda a: a.task)
    ]


def _trace(messages: Iterable[Mapping[str, Any]]) -> str:
    parts = []
    for message in messages:
        calls = [f"{c['name']}({c['arguments']})" for c in message.get("tool_calls", ())]
        who = f"{message.get('name', '')} {message['role']}".strip()
        parts.append("\n".join([f"[{who}] {message['content']}".rstrip(), *calls]))
    return "\n\n".join(parts)
