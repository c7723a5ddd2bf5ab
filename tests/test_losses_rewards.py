"""Advantages from rewards alone, against the papers' formulas in plain Python."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from learner.trainer.losses import table

GROUPS = [[1.0, 0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [-1.0, 3.0]]
EPSILON = 1e-6

Groups = list[list[float]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float]) -> float:
    return math.sqrt(mean([(value - mean(values)) ** 2 for value in values]))


def grpo(groups: Groups) -> Groups:
    return [[(r - mean(rs)) / (deviation(rs) + EPSILON) for r in rs] for rs in groups]


def dr_grpo(groups: Groups) -> Groups:
    return [[r - mean(rs) for r in rs] for rs in groups]


def rloo(groups: Groups) -> Groups:
    return [[r - mean(rs[:i] + rs[i + 1 :]) for i, r in enumerate(rs)] for rs in groups]


def reinforce_pp(groups: Groups) -> Groups:
    everything = [r for rs in groups for r in rs]
    scale = deviation(everything) + EPSILON
    return [[(r - mean(everything)) / scale for r in rs] for rs in groups]


def reinforce_pp_baseline(groups: Groups) -> Groups:
    return reinforce_pp(dr_grpo(groups))


FORMULAS = {
    "group_normalized": grpo,
    "group_mean": dr_grpo,
    "leave_one_out": rloo,
    "batch_normalized": reinforce_pp,
    "group_mean_batch_normalized": reinforce_pp_baseline,
}


def estimate(name: str, groups: Groups) -> Groups:
    return [a.tolist() for a in table.ESTIMATORS[name]([np.array(rs) for rs in groups])]


def test_every_estimator_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(table.ESTIMATORS)


@pytest.mark.parametrize(("name", "formula"), FORMULAS.items())
def test_advantages_equal_the_formula(name: str, formula: Callable[[Groups], Groups]) -> None:
    for found, expected in zip(estimate(name, GROUPS), formula(GROUPS), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", set(FORMULAS) - {"batch_normalized"})
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_group_of_equal_rewards_has_no_advantage(name: str, reward: float) -> None:
    uniform, _ = estimate(name, [[reward] * 8, [0.0, 1.0]])
    np.testing.assert_allclose(uniform, 0, atol=1e-9)


def test_a_group_of_equal_rewards_counts_among_the_batch() -> None:
    solved, failed = estimate("batch_normalized", [[1.0] * 8, [0.0] * 8])
    np.testing.assert_allclose(solved, 1, rtol=1e-5)
    np.testing.assert_allclose(failed, -1, rtol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_single_episode_has_no_advantage(name: str) -> None:
    assert estimate(name, [[3.0]]) == [[0.0]]


@pytest.mark.parametrize("name", FORMULAS)
def test_no_groups_have_no_advantages(name: str) -> None:
    assert estimate(name, []) == []


def test_leave_one_out_is_the_group_mean_stretched() -> None:
    """G / (G - 1) (R_i - mean): the form in which the paper's equation is often quoted."""
    for left_out, centred, group in zip(
        estimate("leave_one_out", GROUPS), dr_grpo(GROUPS), GROUPS, strict=True
    ):
        stretch = len(group) / (len(group) - 1)
        np.testing.assert_allclose(left_out, np.array(centred) * stretch, rtol=1e-12, atol=1e-15)
