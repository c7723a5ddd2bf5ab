"""pass@k, pass^k and their intervals: against enumeration, and against a simulation."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from actor.evaluation.statistics import Estimate, curves, estimate, pass_at_k, pass_hat_k


@pytest.mark.parametrize("n", range(1, 9))
def test_estimators_equal_the_share_of_all_draws_of_k(n: int) -> None:
    for c in range(n + 1):
        attempts = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = list(combinations(attempts, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
            assert pass_hat_k(n, c, k) == pytest.approx(sum(map(all, draws)) / len(draws))


def test_estimators_are_unbiased() -> None:
    """Their expectation over n attempts that pass with probability p is that of k attempts."""
    p, n = 0.3, 10
    chance = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    for k in (1, 3, 10):
        at = sum(chance[c] * pass_at_k(n, c, k) for c in range(n + 1))
        hat = sum(chance[c] * pass_hat_k(n, c, k) for c in range(n + 1))
        assert at == pytest.approx(1 - (1 - p) ** k)
        assert hat == pytest.approx(p**k)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_what_cannot_be_estimated_is_refused(n: int, c: int, k: int) -> None:
    for function in (pass_at_k, pass_hat_k):
        with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
            function(n, c, k)


def test_thousands_of_attempts_neither_overflow_nor_round_away() -> None:
    assert pass_at_k(4000, 1, 2000) == pytest.approx(0.5)
    assert pass_hat_k(4000, 3999, 2000) == pytest.approx(0.5)


def test_a_curve_is_the_mean_over_the_tasks_that_have_enough_attempts() -> None:
    at, hat = curves([(4, 2), (4, 0), (2, 2)], 4, seed=0)
    known = [point for point in at if point]
    assert [point.num_tasks for point in known] == [3, 3, 2, 2]
    assert known[0].value == pytest.approx((0.5 + 0 + 1) / 3)
    assert known[1].value == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert known[3].value == pytest.approx((1 + 0) / 2)
    assert hat[1] is not None
    assert hat[1].value == pytest.approx((1 / 6 + 0 + 1) / 3)
    assert curves([(1, 1)], 2, seed=0)[0][1] is None
    assert curves([], 2, seed=0) == ([None, None], [None, None])


def test_intervals_depend_on_nothing_but_the_seed() -> None:
    tasks = [(8, c % 9) for c in range(50)]
    assert curves(tasks, 8, seed=3) == curves(tasks, 8, seed=3)
    assert curves(tasks, 8, seed=3) != curves(tasks, 8, seed=4)


def test_tasks_that_are_all_alike_leave_nothing_to_chance() -> None:
    (point,) = estimate(np.full((20, 1), 0.5), seed=0)
    assert point == Estimate(value=0.5, low=0.5, high=0.5, num_tasks=20)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """80 tasks of unequal difficulty, drawn anew 200 times: the truth is that of all tasks."""
    rng = np.random.default_rng(0)
    n, k = 6, 3
    truth = float(np.mean(1 - (1 - rng.beta(0.6, 1.4, 200_000)) ** k))
    covered = 0
    for trial in range(200):
        passes = rng.binomial(n, rng.beta(0.6, 1.4, 80))
        values = np.array([[pass_at_k(n, int(c), k)] for c in passes])
        (point,) = estimate(values, seed=trial)
        assert point is not None
        covered += point.low <= truth <= point.high
    assert 0.88 <= covered / 200 <= 0.99
