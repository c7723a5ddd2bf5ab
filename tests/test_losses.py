"""The KL term, the value loss, aggregations and the table of parts."""

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from learner.trainer.losses import table
from learner.trainer.losses.kl import kl_values, reverse_kl
from learner.trainer.losses.tokens import PolicyLoss, Tokens, Totals
from learner.trainer.losses.value import squared_error
from losses_helpers import LENGTHS, config, float64, members, normal, tokens
from understudy.config import algorithm

LENGTH = 16
NUM_TOKENS = sum(n for turns in LENGTHS for n in turns)


def totals_of(made: Tokens) -> Totals:
    return Totals(
        num_tokens=made.num_tokens, num_steps=made.num_steps, num_episodes=made.num_episodes
    )


def aggregate(name: str, losses: Tensor, made: Tokens, totals: Totals | None = None) -> Tensor:
    return table.AGGREGATIONS[name](
        losses_N=losses,
        tokens=made,
        totals=totals or totals_of(made),
        config=config(constant_length=LENGTH),
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


FORMULAS: dict[str, Callable[[list[list[float]]], float]] = {
    "token": lambda episodes: mean([loss for losses in episodes for loss in losses]),
    "sequence": lambda episodes: mean([mean(losses) for losses in episodes]),
    "constant": lambda episodes: mean([sum(losses) / LENGTH for losses in episodes]),
}
"""Losses of the tokens of each episode -> loss of the batch."""


def test_every_aggregation_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(table.AGGREGATIONS)


@pytest.mark.parametrize("name", FORMULAS)
def test_aggregations_equal_their_formula(name: str) -> None:
    losses, made = normal(NUM_TOKENS, 1.0, seed=1), tokens()
    episodes = members(made.episode_N, made.num_episodes)
    expected = FORMULAS[name]([[losses[n].item() for n in episode] for episode in episodes])
    torch.testing.assert_close(aggregate(name, losses, made), torch.tensor(expected).double())


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("name", FORMULAS)
def test_micro_batches_add_up_to_the_whole(name: str, split: int) -> None:
    """In value and in gradient, wherever the episodes are cut apart."""
    losses, made = normal(NUM_TOKENS, 1.0, seed=2).requires_grad_(), tokens()
    whole = aggregate(name, losses, made)
    (gradient,) = torch.autograd.grad(whole, losses)
    num = sum(n for turns in LENGTHS[:split] for n in turns)
    parts = (losses[:num], tokens(LENGTHS[:split])), (losses[num:], tokens(LENGTHS[split:]))
    added = sum(aggregate(name, own, inside, totals_of(made)) for own, inside in parts)
    torch.testing.assert_close(added, whole)
    torch.testing.assert_close(torch.autograd.grad(added, losses)[0], gradient)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_pass_without_tokens_adds_nothing(name: str) -> None:
    """Ranks run as many passes as each other, some of them empty."""
    empty = float64([]).requires_grad_()
    for totals in (totals_of(tokens()), Totals(num_tokens=0, num_steps=0, num_episodes=0)):
        loss = aggregate(name, empty, tokens([]), totals)
        loss.backward()
        assert loss.item() == 0


def test_value_loss_is_half_the_mean_squared_error() -> None:
    values, targets = normal(7, 1.0, seed=3).requires_grad_(), normal(7, 1.0, seed=4)
    totals = Totals(num_tokens=99, num_steps=7, num_episodes=9)
    loss = squared_error(values_K=values, targets_K=targets, totals=totals)
    loss.backward()
    pairs = list(zip(values.tolist(), targets.tolist(), strict=True))
    assert loss.item() == pytest.approx(mean([(v - t) ** 2 / 2 for v, t in pairs]), rel=1e-12)
    torch.testing.assert_close(values.grad, float64([(v - t) / 7 for v, t in pairs]))


def test_value_losses_of_parts_add_up() -> None:
    values, targets = normal(7, 1.0, seed=3), normal(7, 1.0, seed=4)
    totals = Totals(num_tokens=99, num_steps=7, num_episodes=9)
    whole, *parts = (
        squared_error(values_K=values[own], targets_K=targets[own], totals=totals)
        for own in (slice(7), slice(3), slice(3, 3), slice(3, 7))
    )
    torch.testing.assert_close(sum(parts), whole)


def test_the_table_has_the_names_of_the_config() -> None:
    assert tuple(table.ESTIMATORS) == algorithm.GROUP_ESTIMATORS
    assert tuple(table.CRITICS) == algorithm.CRITIC_ESTIMATORS
    assert tuple(table.CORRECTIONS) == algorithm.CORRECTIONS
    assert tuple(table.OBJECTIVES) == algorithm.OBJECTIVES
    assert tuple(table.AGGREGATIONS) == algorithm.AGGREGATIONS
    proximal = algorithm.AlgorithmConfig.model_json_schema()["properties"]["proximal"]
    assert list(table.PROXIMAL) == proximal["enum"]


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the table as it was."""
    tables = table.ESTIMATORS, table.CRITICS, table.CORRECTIONS, table.OBJECTIVES
    before = [dict(parts) for parts in (*tables, table.AGGREGATIONS)]
    yield
    for parts, kept in zip((*tables, table.AGGREGATIONS), before, strict=True):
        parts.clear()
        parts.update(kept)


PLUGIN = """
import torch

from learner.trainer.losses.table import (
    PolicyLoss, Targets, register_aggregation, register_correction, register_critic,
    register_estimator, register_objective,
)

@register_estimator("mine")
def estimator(groups):
    return [rewards * 2 for rewards in groups]

@register_critic("mine")
def critic(*, log_ratios_K, values_K, end_values_E, steps, config):
    return Targets(advantages_K=values_K, values_K=values_K)

@register_correction("mine")
def correction(*, log_ratios_N, tokens, config):
    return log_ratios_N * 3

@register_objective("mine")
def objective(
    *, logprobs_N, proximal_logprobs_N, advantages_N, weights_N, tokens, config
):
    return PolicyLoss(losses_N=-logprobs_N, clipped_N=torch.zeros_like(logprobs_N).bool())

@register_aggregation("mine")
def aggregation(*, losses_N, tokens, totals, config):
    return losses_N.max()
"""


@pytest.mark.usefixtures("_restored")
def test_a_file_registers_parts_of_its_own(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "losses_plugin.py").write_text(PLUGIN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("losses_plugin")
    made, ones = tokens(), torch.ones(NUM_TOKENS)
    weights = table.CORRECTIONS["mine"](log_ratios_N=ones, tokens=made, config=config())
    assert torch.equal(weights, 3 * ones)
    found = table.OBJECTIVES["mine"](
        logprobs_N=-ones,
        proximal_logprobs_N=ones,
        advantages_N=ones,
        weights_N=ones,
        tokens=made,
        config=config(),
    )
    assert isinstance(found, PolicyLoss)
    assert aggregate("mine", found.losses_N, made).item() == 1
    assert "mine" in table.ESTIMATORS
    assert "mine" in table.CRITICS
    with pytest.raises(ValueError, match="'mine' is registered already"):
        table.register_objective("mine")(table.OBJECTIVES["clip"])


def test_names_that_are_taken_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="'clip' is registered already; take another name"):
        table.register_objective("clip")(table.OBJECTIVES["policy_gradient"])


def test_kl_loss_has_the_gradient_of_the_divergence() -> None:
    """Over all tokens of a small vocabulary, each weighted by its probability."""
    generator = torch.Generator().manual_seed(3)
    logits, reference = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    probabilities = torch.softmax(logits, 0)
    difference = torch.log_softmax(logits, 0) - torch.log_softmax(reference, 0)
    (exact,) = torch.autograd.grad((probabilities * difference).sum(), logits)
    losses = reverse_kl(
        logprobs=torch.log_softmax(logits, 0),
        reference_logprobs=torch.log_softmax(reference, 0),
        weights=torch.ones(7, dtype=torch.float64),
    )
    (found,) = torch.autograd.grad((probabilities.detach() * losses).sum(), logits)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_kl_weights_correct_for_the_sampling_policy() -> None:
    """Tokens of another policy, weighted by pi / mu, give the same gradient."""
    generator = torch.Generator().manual_seed(4)
    logits, reference, other = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    pi, mu = torch.softmax(logits.detach(), 0), torch.softmax(other, 0)

    def gradient(weights: torch.Tensor, sampling: torch.Tensor) -> torch.Tensor:
        losses = reverse_kl(
            logprobs=torch.log_softmax(logits, 0),
            reference_logprobs=torch.log_softmax(reference, 0),
            weights=weights,
        )
        return torch.autograd.grad((sampling * losses).sum(), logits)[0]

    torch.testing.assert_close(gradient(pi / mu, mu), gradient(torch.ones_like(pi), pi))


def test_kl_estimate_is_the_divergence_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(5)
    logits, other = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    pi = torch.softmax(logits, 0)
    log_ratio = torch.log_softmax(other, 0) - torch.log_softmax(logits, 0)
    values = kl_values(log_ratio)
    assert (values >= 0).all()
    torch.testing.assert_close((pi * values).sum(), -(pi * log_ratio).sum())


def test_kl_estimate_of_extreme_ratios_is_finite() -> None:
    assert kl_values(torch.tensor([1e4, -1e4])).isfinite().all()
