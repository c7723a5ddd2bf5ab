"""Estimators with a value head, against their definitions as sums and products."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.trainer.losses import table
from learner.trainer.losses.tokens import Steps, Targets, mean_by, sum_by
from losses_helpers import LENGTHS, config, float64, members, normal, tokens
from understudy.config import AlgorithmConfig

Row = tuple[list[float], list[float], list[float], float]
"""One episode: log-ratios, values and rewards of its steps, and the value after the last."""


def definition_of_vtrace(row: Row, using: AlgorithmConfig) -> tuple[list[float], list[float]]:
    """Targets and advantages: IMPALA's equation 1, with remark 2's lambda in c."""
    log_ratios, values, rewards, end = row
    num, gamma = len(values), using.gamma
    ratios = [math.exp(x) for x in log_ratios]
    rhos = [min(using.importance_cap, w) for w in ratios]
    traces = [using.trace_decay * min(using.c_bar, w) for w in ratios]
    following = [*values[1:], end]
    deltas = [rhos[t] * (rewards[t] + gamma * following[t] - values[t]) for t in range(num)]
    targets = [
        values[s]
        + sum(gamma ** (t - s) * math.prod(traces[s:t]) * deltas[t] for t in range(s, num))
        for s in range(num)
    ]
    after = [*targets[1:], end]
    return targets, [rewards[s] + gamma * after[s] - values[s] for s in range(num)]


def definition_of_gae(row: Row, using: AlgorithmConfig) -> tuple[list[float], list[float]]:
    """Targets and advantages: sums of discounted temporal differences."""
    _, values, rewards, end = row
    num, decay = len(values), using.gamma * using.trace_decay
    following = [*values[1:], end]
    deltas = [rewards[t] + using.gamma * following[t] - values[t] for t in range(num)]
    advantages = [sum(decay ** (t - s) * deltas[t] for t in range(s, num)) for s in range(num)]
    return [a + v for a, v in zip(advantages, values, strict=True)], advantages


DEFINITIONS = {"gae": definition_of_gae, "vtrace": definition_of_vtrace}
Definition = Callable[[Row, AlgorithmConfig], tuple[list[float], list[float]]]


def estimate(
    name: str,
    log_ratios: Tensor,
    values: Tensor,
    end_values: Tensor,
    steps: Steps,
    using: AlgorithmConfig,
) -> Targets:
    return table.CRITICS[name](
        log_ratios_K=log_ratios, values_K=values, end_values_E=end_values, steps=steps, config=using
    )


def one_episode(name: str, row: Row, using: AlgorithmConfig, truncated: bool = True) -> Targets:
    log_ratios, values, rewards, end = row
    steps = tokens([[1] * len(values)], rewards=rewards, truncated=[truncated]).steps
    return estimate(name, float64(log_ratios), float64(values), float64([end]), steps, using)


def test_every_critic_has_a_definition_here() -> None:
    assert set(DEFINITIONS) == set(table.CRITICS)


numbers = st.floats(-3, 3, width=32)
shares = st.floats(0, 1)
episodes = st.lists(
    st.tuples(st.booleans(), numbers, st.lists(st.tuples(numbers, numbers, numbers), min_size=1)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(episodes, shares, shares, st.floats(0.1, 3), st.floats(0.1, 3))
def test_estimates_equal_their_definitions(
    drawn: list, gamma: float, trace_decay: float, rho_bar: float, c_bar: float
) -> None:
    """Over any number of episodes at once, terminated or truncated."""
    using = config(gamma=gamma, trace_decay=trace_decay, importance_cap=rho_bar, c_bar=c_bar)
    columns = [list(zip(*steps, strict=True)) for _, _, steps in drawn]
    log_ratios, values, rewards = ([x for c in columns for x in c[i]] for i in range(3))
    made = tokens(
        [[1] * len(steps) for _, _, steps in drawn],
        rewards=rewards,
        truncated=[truncated for truncated, _, _ in drawn],
    )
    ends = float64([end for _, end, _ in drawn])
    for name, definition in DEFINITIONS.items():
        found = estimate(name, float64(log_ratios), float64(values), ends, made.steps, using)
        expected = [
            definition((*map(list, column), end if truncated else 0.0), using)
            for column, (truncated, end, _) in zip(columns, drawn, strict=True)
        ]
        targets = [v for episode, _ in expected for v in episode]
        advantages = [a for _, episode in expected for a in episode]
        torch.testing.assert_close(found.values_K, float64(targets), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.advantages_K, float64(advantages), rtol=1e-9, atol=1e-9)


ROW: Row = ([0.0] * 5, [0.3, -0.2, 0.9, 0.1, 0.5], [0.0, 1.0, -0.5, 0.0, 2.0], 0.7)


def returns(row: Row, gamma: float) -> list[float]:
    """Discounted sums of rewards, with the value of the last state."""
    _, values, rewards, end = row
    num = len(values)
    return [
        sum(gamma ** (t - s) * rewards[t] for t in range(s, num)) + gamma ** (num - s) * end
        for s in range(num)
    ]


@pytest.mark.parametrize("cap", [1.0, 5.0])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_on_policy_targets_are_n_step_returns(name: str, cap: float) -> None:
    using = config(gamma=0.9, importance_cap=cap, c_bar=cap)
    found = one_episode(name, ROW, using)
    expected = returns(ROW, 0.9)
    torch.testing.assert_close(found.values_K, float64(expected))
    _, values, rewards, end = ROW
    after = [*expected[1:], end]
    torch.testing.assert_close(
        found.advantages_K,
        float64([r + 0.9 * v - V for r, v, V in zip(rewards, after, values, strict=True)]),
    )


@pytest.mark.parametrize("fields", [{"c_bar": 1e-12}, {"trace_decay": 0.0}])
def test_vtrace_without_traces_is_one_step_temporal_difference(fields: dict[str, float]) -> None:
    using = config(gamma=0.9, importance_cap=2.0, **fields)
    row = ([0.4, -0.4, 1.5, 0.0, -2.0], *ROW[1:])
    found = one_episode("vtrace", row, using)
    log_ratios, values, rewards, end = row
    following = [*values[1:], end]
    expected = [
        V + min(2.0, math.exp(x)) * (r + 0.9 * after - V)
        for x, V, r, after in zip(log_ratios, values, rewards, following, strict=True)
    ]
    torch.testing.assert_close(found.values_K, float64(expected), rtol=1e-10, atol=1e-10)


def test_on_policy_vtrace_is_gae_in_its_targets() -> None:
    using = config(gamma=0.9, trace_decay=0.7, importance_cap=1.0)
    ours, gae = (one_episode(name, ROW, using) for name in ("vtrace", "gae"))
    torch.testing.assert_close(ours.values_K, gae.values_K)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_termination_bootstraps_nothing_and_truncation_the_last_value(name: str) -> None:
    using = config(gamma=0.5, importance_cap=1.0)
    row = ([0.0], [0.0], [1.0], 10.0)
    assert one_episode(name, row, using, truncated=True).values_K.item() == 1 + 0.5 * 10
    assert one_episode(name, row, using, truncated=False).values_K.item() == 1
    unknown = ([0.0], [0.0], [1.0], math.nan)  # which counts for nothing where it terminated
    assert one_episode(name, unknown, using, truncated=False).values_K.item() == 1


@pytest.mark.parametrize("step", ["turn", "token"])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_nothing_leaks_between_episodes(name: str, step: str) -> None:
    """Estimates of an episode are the same alone and whatever the others are."""
    using = config(gamma=0.9, trace_decay=0.8)
    num = sum(len(turns) if step == "turn" else sum(turns) for turns in LENGTHS)
    drawn = [normal(num, 1.0, seed=s) for s in range(3)]
    ends, truncated = float64([1.0, 2.0, 3.0, 4.0]), [True, False, True, False]

    def together(kept: list[Tensor]) -> Targets:
        log_ratios, values, rewards = kept
        made = tokens(LENGTHS, step=step, rewards=rewards.tolist(), truncated=truncated)
        return estimate(name, log_ratios, values, ends, made.steps, using)

    found, start = together(drawn), 0
    for place, turns in enumerate(LENGTHS):
        size = len(turns) if step == "turn" else sum(turns)
        own = slice(start, start + size)
        made = tokens(
            [turns],
            step=step,
            rewards=drawn[2][own].tolist(),
            truncated=truncated[place : place + 1],
        )
        alone = estimate(
            name, drawn[0][own], drawn[1][own], ends[place : place + 1], made.steps, using
        )
        disturbed = [values + 100 for values in drawn]
        for values, changed in zip(drawn, disturbed, strict=True):
            changed[own] = values[own]
        for field in ("values_K", "advantages_K"):
            expected = getattr(found, field)[own]
            torch.testing.assert_close(getattr(alone, field), expected)
            torch.testing.assert_close(getattr(together(disturbed), field)[own], expected)
        start += size


def test_turns_of_one_token_are_token_steps() -> None:
    by_turn, by_token = tokens([[1, 1, 1], [1, 1]]), tokens([[3], [2]], step="token")
    for field in vars(by_turn.steps):
        assert torch.equal(getattr(by_turn.steps, field), getattr(by_token.steps, field))


def test_a_turn_is_a_step_whatever_its_length() -> None:
    """Its tokens count through their merged ratio alone."""
    using = config(importance_cap=1.0)
    estimates = []
    for turns in ([2, 3], [20, 30]):
        made = tokens([turns], rewards=[0.0, 1.0])
        log_ratios = mean_by(torch.full_like(made.behaviour_logprobs_N, -0.1), made.step_N, 2)
        values = float64([0.2, 0.4])
        estimates.append(estimate("vtrace", log_ratios, values, float64([0]), made.steps, using))
    short, long = estimates
    torch.testing.assert_close(short.values_K, long.values_K)
    torch.testing.assert_close(short.advantages_K, long.advantages_K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_extreme_ratios_stay_finite(name: str, dtype: torch.dtype) -> None:
    log_ratios = torch.tensor([1e4, -1e4, 0.0, 1e4, 1e4, -1e4, -1e4], dtype=dtype)
    values = torch.ones(7, dtype=dtype)
    steps = tokens(rewards=[1.0] * 7, truncated=[True] * 4).steps
    steps = Steps(**vars(steps) | {"rewards_K": steps.rewards_K.to(dtype)})
    using = config(importance_cap=1e30, c_bar=1.0)
    found = estimate(name, log_ratios, values, torch.ones(4, dtype=dtype), steps, using)
    for column in (found.values_K, found.advantages_K):
        assert column.isfinite().all()
        assert column.dtype == dtype


@pytest.mark.parametrize("name", DEFINITIONS)
def test_estimates_have_no_gradient(name: str) -> None:
    log_ratios, values = (normal(7, 1.0, seed=s).requires_grad_() for s in (1, 2))
    ends = normal(4, 1.0, seed=3).requires_grad_()
    found = estimate(name, log_ratios, values, ends, tokens().steps, config())
    assert not found.values_K.requires_grad
    assert not found.advantages_K.requires_grad


@pytest.mark.parametrize("name", DEFINITIONS)
def test_no_steps_have_no_estimates(name: str) -> None:
    empty = float64([])
    assert estimate(name, empty, empty, empty, tokens([]).steps, config()).values_K.shape == (0,)


DEVIATION, TURN, NUM_EPISODES = 0.05, 50, 400
"""Of a token's log-ratio; tokens of a turn."""
TRACES = {
    "token": {50: 0.37, 200: 0.017, 1000: 1.3e-9},
    "product": {50: 0.95, 200: 0.56, 1000: 0.037},
    "geometric": {50: 1.0, 200: 0.99, 1000: 0.94},
}


@pytest.mark.parametrize("num_tokens", [50, 200, 1000])
@pytest.mark.parametrize("kind", TRACES)
def test_how_much_of_a_final_reward_reaches_the_first_step(kind: str, num_tokens: int) -> None:
    """The table of docs/algorithms.md: v of the first state with V = 0 and a last reward of 1."""
    turns = [[TURN] * (num_tokens // TURN)] * NUM_EPISODES
    made = tokens(turns, step="token" if kind == "token" else "turn")
    # Of the policy that sampled, the mean of a token's ratio is 1.
    log_ratios = normal(made.num_tokens, DEVIATION, seed=6) - DEVIATION**2 / 2
    merge = mean_by if kind == "geometric" else sum_by
    ends = members(made.steps.episode_K, NUM_EPISODES)
    rewards = torch.zeros(made.num_steps, dtype=torch.float64)
    rewards[[places[-1] for places in ends]] = 1.0
    found = estimate(
        "vtrace",
        merge(log_ratios, made.step_N, made.num_steps),
        torch.zeros_like(rewards),
        torch.zeros(NUM_EPISODES, dtype=torch.float64),
        Steps(**vars(made.steps) | {"rewards_K": rewards}),
        config(importance_cap=1.0),
    )
    survived = found.values_K[[places[0] for places in ends]].median().item()
    assert survived == pytest.approx(TRACES[kind][num_tokens], rel=0.05)
