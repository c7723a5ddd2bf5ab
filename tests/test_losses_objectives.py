"""Objectives against their formulas in plain Python, and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from learner.trainer.losses import table
from learner.trainer.losses.tokens import PolicyLoss, Tokens
from losses_helpers import LENGTHS, config, float64, members, normal, tokens

LOW, HIGH = 0.2, 0.28
CONFIG = config(clip_low=LOW, clip_high=HIGH)
MANY = [[7, 5, 9] for _ in range(10)]
NUM_TOKENS = 210
NAMES = list(table.OBJECTIVES)


def draw(made: Tokens, scale: float = 0.4) -> dict[str, Tensor]:
    """Log-probabilities that moved by about `scale`, advantages and weights of every token."""
    num = made.num_tokens
    logprobs = -normal(num, 1.0, seed=1).abs()
    # Episodes differ as wholes too, so that some leave the clip of a geometric mean.
    moved = normal(num, scale, seed=2) + normal(made.num_episodes, scale, seed=3)[made.episode_N]
    return {
        "logprobs_N": logprobs,
        "proximal_logprobs_N": logprobs - moved,
        "advantages_N": normal(num, 1.0, seed=4),
        "weights_N": normal(num, 1.0, seed=5).abs(),
    }


def compute(name: str, made: Tokens, drawn: dict[str, Tensor]) -> PolicyLoss:
    return table.OBJECTIVES[name](**drawn, tokens=made, config=CONFIG)


def bounded(ratio: float) -> float:
    return min(max(ratio, 1 - LOW), 1 + HIGH)


def stopped(ratio: float, advantage: float) -> bool:
    """The ratio has left the clip in the direction in which the advantage pulls."""
    return (advantage > 0 and ratio > 1 + HIGH) or (advantage < 0 and ratio < 1 - LOW)


def reference(name: str, made: Tokens, drawn: dict[str, Tensor]) -> list[tuple[float, float, bool]]:
    """Loss, d loss / d logprob and whether it is clipped, of every token, as the papers have it."""
    logprobs, proximal, advantages, weights = (values.tolist() for values in drawn.values())
    ratios = [math.exp(new) / math.exp(old) for new, old in zip(logprobs, proximal, strict=True)]
    if name == "sequence_clip":
        episodes = members(made.episode_N, made.num_episodes)
        means = [math.prod(ratios[n] for n in e) ** (1 / len(e)) for e in episodes]
        ratios = [means[e] for e in made.episode_N.tolist()]
    rows = []
    for logprob, ratio, advantage, weight in zip(
        logprobs, ratios, advantages, weights, strict=True
    ):
        push = -weight * ratio * advantage
        if name == "policy_gradient":
            rows.append((push, push, False))
        elif name == "clipped_weight":
            push = -weight * bounded(ratio) * advantage
            rows.append((push * logprob, push, bounded(ratio) != ratio))
        else:
            loss = -weight * min(ratio * advantage, bounded(ratio) * advantage)
            gone = stopped(ratio, advantage)
            rows.append((loss, 0.0 if gone else push, gone))
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_objectives_equal_their_formula_and_gradient(name: str) -> None:
    made = tokens(MANY)
    drawn = draw(made)
    drawn["logprobs_N"].requires_grad_()
    found = compute(name, made, drawn)
    found.losses_N.sum().backward()
    losses, gradients, clipped = zip(*reference(name, made, drawn), strict=True)
    torch.testing.assert_close(found.losses_N.detach(), float64(losses), rtol=1e-11, atol=0)
    torch.testing.assert_close(drawn["logprobs_N"].grad, float64(gradients), rtol=1e-11, atol=0)
    assert found.clipped_N.tolist() == list(clipped)
    assert not found.clipped_N.requires_grad
    if name != "policy_gradient":
        assert 0.05 < sum(clipped) / NUM_TOKENS < 0.95


def away_from_corners(made: Tokens, drawn: dict[str, Tensor], margin: float = 0.01) -> Tensor:
    ratios = torch.exp(drawn["logprobs_N"] - drawn["proximal_logprobs_N"])
    return ((ratios - (1 - LOW)).abs() > margin) & ((ratios - (1 + HIGH)).abs() > margin)


@pytest.mark.parametrize("name", ["policy_gradient", "clip"])
def test_gradients_equal_finite_differences(name: str) -> None:
    made = tokens(MANY)
    drawn = draw(made)
    smooth = away_from_corners(made, drawn)
    kept = {field: values[smooth] for field, values in drawn.items()}
    alone = tokens([[int(smooth.sum())]])
    assert torch.autograd.gradcheck(
        lambda x: compute(name, alone, kept | {"logprobs_N": x}).losses_N,
        kept["logprobs_N"].requires_grad_(),
    )


def test_sequence_clip_has_the_gradient_of_gspo() -> None:
    """GSPO's loss of an episode has one advantage and one weight; its tokens' add up to it."""
    made = tokens(MANY)
    drawn = draw(made)
    for field in ("advantages_N", "weights_N"):
        drawn[field] = drawn[field][:10][made.episode_N]
    log_ratios = drawn["logprobs_N"] - drawn["proximal_logprobs_N"]
    means = log_ratios.reshape(10, 21).mean(1).exp()
    assert ((means - (1 - LOW)).abs() > 0.01).all()
    assert ((means - (1 + HIGH)).abs() > 0.01).all()
    found = compute("sequence_clip", made, drawn)
    assert 0 < found.clipped_N.sum() < NUM_TOKENS
    assert torch.autograd.gradcheck(
        lambda x: (
            compute("sequence_clip", made, drawn | {"logprobs_N": x})
            .losses_N.reshape(10, 21)
            .sum(1)
        ),
        drawn["logprobs_N"].requires_grad_(),
    )


def test_clipped_weight_equals_finite_differences_at_a_fixed_weight() -> None:
    """Its weight counts as a constant, which finite differences see where the clip holds it."""
    made = tokens(MANY)
    drawn = draw(made)
    fixed = compute("clipped_weight", made, drawn).clipped_N & away_from_corners(made, drawn)
    kept = {field: values[fixed] for field, values in drawn.items()}
    alone = tokens([[int(fixed.sum())]])
    assert torch.autograd.gradcheck(
        lambda x: compute("clipped_weight", alone, kept | {"logprobs_N": x}).losses_N,
        kept["logprobs_N"].requires_grad_(),
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_first_update_of_a_batch_is_the_weighted_policy_gradient(name: str) -> None:
    """At pi = pi_prox, whatever the objective."""
    made = tokens(MANY)
    drawn = draw(made, scale=0.0)
    found = compute(name, made, drawn | {"logprobs_N": drawn["logprobs_N"].requires_grad_()})
    found.losses_N.sum().backward()
    expected = -drawn["weights_N"] * drawn["advantages_N"]
    torch.testing.assert_close(drawn["logprobs_N"].grad, expected)
    assert not found.clipped_N.any()


@pytest.mark.parametrize("name", NAMES)
def test_only_the_policys_own_logprobs_have_a_gradient(name: str) -> None:
    made = tokens()
    drawn = {field: values.requires_grad_() for field, values in draw(made).items()}
    compute(name, made, drawn).losses_N.sum().backward()
    assert [field for field, values in drawn.items() if values.grad is not None] == ["logprobs_N"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_stay_finite(name: str, dtype: torch.dtype) -> None:
    made = tokens([[6], [2], [2]])
    log_ratios = torch.tensor([1e4, -1e4, 0, 1e4, -1e4, 0, 1e4, 1e4, -1e4, -1e4], dtype=dtype)
    ones = torch.ones_like(log_ratios)
    for advantage in (-1.0, 0.0, 1.0):
        for weight in (0.0, 1.0):
            logprobs = torch.full_like(log_ratios, -1e4).requires_grad_()
            found = compute(
                name,
                made,
                {
                    "logprobs_N": logprobs,
                    "proximal_logprobs_N": logprobs.detach() - log_ratios,
                    "advantages_N": advantage * ones,
                    "weights_N": weight * ones,
                },
            )
            found.losses_N.sum().backward()
            assert found.losses_N.isfinite().all()
            assert found.losses_N.dtype == dtype
            assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_episodes_have_the_same_losses_alone(name: str) -> None:
    together = tokens()
    drawn = draw(together)
    losses, start = compute(name, together, drawn).losses_N, 0
    for turns in LENGTHS:
        end = start + sum(turns)
        own = {field: values[start:end] for field, values in drawn.items()}
        alone = compute(name, tokens([turns]), own)
        torch.testing.assert_close(alone.losses_N, losses[start:end])
        start = end


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_have_no_losses(name: str) -> None:
    made = tokens([])
    found = compute(name, made, draw(made))
    assert found.losses_N.shape == found.clipped_N.shape == (0,)
