"""Corrections and proximal policies, against their formulas in plain Python."""

import math
from collections.abc import Callable

import pytest
import torch

from learner.trainer.losses import table
from learner.trainer.losses.tokens import Tokens
from losses_helpers import LENGTHS, config, float64, members, normal, tokens
from understudy.config import AlgorithmConfig

CONFIG = config(importance_cap=1.3, mask_low=0.8, mask_high=1.25)
NUM_TOKENS = sum(n for turns in LENGTHS for n in turns)


def product(ratios: list[float]) -> float:
    return math.prod(ratios)


def geometric(ratios: list[float]) -> float:
    return math.prod(ratios) ** (1 / len(ratios))


def inside(ratio: float) -> bool:
    return CONFIG.mask_low <= ratio <= CONFIG.mask_high


def capped(ratio: float) -> float:
    return min(ratio, CONFIG.importance_cap)


Groups = list[list[int]]
Formula = Callable[[list[float], int, Groups, Groups], float]
"""Ratios of all tokens, a token, the tokens of each step and of each episode -> its weight."""


def those_with(n: int, groups: Groups, ratios: list[float]) -> list[float]:
    return next([ratios[m] for m in group] for group in groups if n in group)


FORMULAS: dict[str, Formula] = {
    "none": lambda w, n, steps, episodes: 1.0,
    "token": lambda w, n, steps, episodes: capped(w[n]),
    "sequence": lambda w, n, steps, episodes: capped(product(those_with(n, episodes, w))),
    "step": lambda w, n, steps, episodes: capped(geometric(those_with(n, steps, w))),
    "token_mask": lambda w, n, steps, episodes: w[n] if inside(w[n]) else 0.0,
    "geometric_mask": lambda w, n, steps, episodes: (
        capped(w[n]) if inside(geometric(those_with(n, episodes, w))) else 0.0
    ),
}


def reference(formula: Formula, log_ratios: torch.Tensor, made: Tokens) -> torch.Tensor:
    ratios = [math.exp(x) for x in log_ratios.tolist()]
    steps = members(made.step_N, made.num_steps)
    episodes = members(made.episode_N, made.num_episodes)
    return float64([formula(ratios, n, steps, episodes) for n in range(len(ratios))])


def weigh(name: str, log_ratios: torch.Tensor, made: Tokens, using: AlgorithmConfig = CONFIG):
    return table.CORRECTIONS[name](log_ratios_N=log_ratios, tokens=made, config=using)


def test_every_correction_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(table.CORRECTIONS)


@pytest.mark.parametrize("step", ["turn", "token"])
@pytest.mark.parametrize("name", FORMULAS)
def test_weights_equal_the_formula(name: str, step: str) -> None:
    made = tokens(LENGTHS * 5, step=step)
    # Episodes differ as wholes too, so that some leave the band of a geometric mean.
    shifts = normal(made.num_episodes, 0.3, seed=8)[made.episode_N]
    log_ratios = normal(made.num_tokens, 0.3, seed=1) + shifts
    expected = reference(FORMULAS[name], log_ratios, made)
    torch.testing.assert_close(weigh(name, log_ratios, made), expected, rtol=1e-12, atol=0)
    if name != "none":  # the cap or the mask holds for some and not for others
        bound = 0.0 if "mask" in name else CONFIG.importance_cap
        assert 0 < (expected == bound).sum() < made.num_tokens


def test_product_of_a_step() -> None:
    log_ratios, made = normal(NUM_TOKENS, 0.3, seed=2), tokens()

    def formula(w: list[float], n: int, steps: Groups, episodes: Groups) -> float:
        return capped(product(those_with(n, steps, w)))

    found = weigh("step", log_ratios, made, config(importance_cap=1.3, step_ratio="product"))
    torch.testing.assert_close(found, reference(formula, log_ratios, made), rtol=1e-12, atol=0)


def test_steps_of_one_token_weigh_as_tokens_do() -> None:
    log_ratios = normal(NUM_TOKENS, 0.3, seed=3)
    by_steps = weigh("step", log_ratios, tokens(step="token"))
    torch.testing.assert_close(by_steps, weigh("token", log_ratios, tokens()))


@pytest.mark.parametrize("name", FORMULAS)
def test_tokens_of_the_present_policy_weigh_1(name: str) -> None:
    torch.testing.assert_close(
        weigh(name, torch.zeros(NUM_TOKENS, dtype=torch.float64), tokens()),
        torch.ones(NUM_TOKENS, dtype=torch.float64),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FORMULAS)
def test_extreme_ratios_stay_finite(name: str, dtype: torch.dtype) -> None:
    extreme = torch.tensor([1e4, -1e4, 0.0], dtype=dtype).repeat(NUM_TOKENS // 3)
    for log_ratios in (extreme, extreme.abs(), -extreme.abs()):
        weights = weigh(name, log_ratios, tokens(), config(importance_cap=1e30))
        assert weights.isfinite().all()
        assert weights.dtype == dtype


@pytest.mark.parametrize("name", FORMULAS)
def test_weights_have_no_gradient(name: str) -> None:
    log_ratios = normal(NUM_TOKENS, 0.3, seed=4).requires_grad_()
    assert not weigh(name, log_ratios, tokens()).requires_grad


@pytest.mark.parametrize("name", FORMULAS)
def test_episodes_weigh_the_same_alone(name: str) -> None:
    log_ratios = normal(NUM_TOKENS, 0.3, seed=5)
    together, start = weigh(name, log_ratios, tokens()), 0
    for turns in LENGTHS:
        end = start + sum(turns)
        alone = weigh(name, log_ratios[start:end], tokens([turns]))
        torch.testing.assert_close(alone, together[start:end])
        start = end


@pytest.mark.parametrize("name", FORMULAS)
def test_no_tokens_have_no_weights(name: str) -> None:
    assert weigh(name, float64([]), tokens([])).shape == (0,)


def test_proximal_policies_equal_their_formulas() -> None:
    old, behaviour = -normal(NUM_TOKENS, 1.0, seed=6).abs(), -normal(NUM_TOKENS, 1.0, seed=7).abs()
    staleness = [float(n % 5) for n in range(NUM_TOKENS)]
    made = tokens(behaviour=behaviour, staleness=staleness)

    def between(mu: float, pi: float, versions: float) -> float:
        share = 1 / versions if versions else 0.0
        return share * mu + (1 - share) * pi

    rows = zip(behaviour.tolist(), old.tolist(), staleness, strict=True)
    expected = {
        "recomputed": old,
        "behaviour": behaviour,
        "interpolated": float64([between(*row) for row in rows]),
    }
    assert set(expected) == set(table.PROXIMAL)
    for name, logprobs in expected.items():
        found = table.PROXIMAL[name](logprobs_N=old, tokens=made)
        torch.testing.assert_close(found, logprobs, rtol=1e-12, atol=1e-15)


def test_interpolation_finds_the_version_before_the_learners() -> None:
    """Where every version moves a log-probability by as much, that is the policy it stands for."""
    per_version, versions_behind = 0.03, [1.0, 2.0, 3.0, 7.0]
    learner = float64([-2.0] * 4)
    behaviour = learner - per_version * float64(versions_behind)
    made = tokens([[4]], behaviour=behaviour, staleness=versions_behind)
    found = table.PROXIMAL["interpolated"](logprobs_N=learner, tokens=made)
    torch.testing.assert_close(found, learner - per_version)
