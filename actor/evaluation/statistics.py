"""What a number of attempts at a number of tasks say: pure functions.

A task was attempted n times and passed c times. For k attempts drawn from the n without putting
back, of which there are C(n, k):

    pass@k = 1 - C(n-c, k) / C(n, k)     at least one passes  (Chen et al., arXiv 2107.03374, eq. 1)
    pass^k =     C(c, k)   / C(n, k)     all of them pass     (Yao et al., arXiv 2406.12045, sec. 3)

Both are unbiased for k fresh attempts. The figures of a set of tasks are means over its tasks, and
intervals come from drawing tasks anew (percentile bootstrap): attempts at one task are alike, tasks
are not, so that tasks are what chance is about.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from understudy.trajectory import FloatArray

NUM_RESAMPLES = 2000
INTERVAL = (2.5, 97.5)
"""Percentiles of a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over tasks with its 95 % interval."""

    value: float
    low: float
    high: float
    num_tasks: int
    """Tasks that the mean is over."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k attempts passes, from c passes in n attempts; n >= k."""
    _check(n, c, k)
    return 1 - comb(n - c, k) / comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """Chance that all of k attempts pass, from c passes in n attempts; n >= k."""
    _check(n, c, k)
    return comb(c, k) / comb(n, k)


def _check(n: int, c: int, k: int) -> None:
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n = {n}, c = {c}, k = {k}: 0 <= c <= n and 1 <= k <= n must hold")


def curves(
    tasks: Sequence[tuple[int, int]], max_k: int, seed: int
) -> tuple[list[Estimate | None], list[Estimate | None]]:
    """pass@k and pass^k of a set of tasks for k = 1 .. max_k.

    Args:
        tasks: (attempts n, passes c) of each task. A task counts towards a k only if n >= k.

    Returns:
        Both curves, index k - 1; None where no task has k attempts.
    """
    ks = range(1, max_k + 1)
    nan = float("nan")
    at = [[pass_at_k(n, c, k) if k <= n else nan for k in ks] for n, c in tasks]
    hat = [[pass_hat_k(n, c, k) if k <= n else nan for k in ks] for n, c in tasks]
    return (
        estimate(np.array(at).reshape(len(tasks), max_k), seed),
        estimate(np.array(hat).reshape(len(tasks), max_k), seed),
    )


def estimate(values: FloatArray, seed: int) -> list[Estimate | None]:
    """Mean over tasks of each column, with percentile bootstrap intervals over tasks.

    Args:
        values: [T, K] a figure of each task; NaN leaves the task out of a column.
        seed: of the resamples, which are the same for every column.
    """
    num_tasks, num_columns = values.shape
    if not num_tasks:
        return [None] * num_columns
    draws = np.random.default_rng(seed).multinomial(
        num_tasks, np.full(num_tasks, 1 / num_tasks), size=NUM_RESAMPLES
    )  # [B, T] how often each task is in a resample
    known = np.isfinite(values)
    counts = draws @ known  # [B, K]
    sums = draws @ np.where(known, values, 0.0)
    with np.errstate(invalid="ignore"):  # a resample without a task that counts: 0 / 0
        means = sums / counts
    return [
        _estimate(values[known[:, column], column], means[:, column])
        for column in range(num_columns)
    ]


def _estimate(values: FloatArray, resampled: FloatArray) -> Estimate | None:
    if not len(values):
        return None
    low, high = np.nanpercentile(resampled, INTERVAL)
    return Estimate(
        value=float(values.mean()), low=float(low), high=float(high), num_tasks=len(values)
    )
