"""Losses and advantages against float64 references written from their formulas."""

import numpy as np
import pytest
import torch

from learner.trainer.advantages import group_advantages
from learner.trainer.losses.grpo import grpo
from learner.trainer.losses.kl import kl_values, reverse_kl

CLIP_LOW, CLIP_HIGH, CAP = 0.2, 0.28, 2.0
NUM_TOKENS = 200


def reference(logp: float, old: float, mu: float, advantage: float) -> float:
    """One token's loss, as the papers write it."""
    ratio = np.exp(logp) / np.exp(old)
    weight = min(np.exp(old) / np.exp(mu), CAP)
    clipped = min(max(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH)
    return -weight * min(ratio * advantage, clipped * advantage)


def reference_gradient(logp: float, old: float, mu: float, advantage: float) -> float:
    """d loss / d logp: -w r A, or 0 where the clipped branch is the smaller one."""
    ratio = np.exp(logp - old)
    weight = min(np.exp(old - mu), CAP)
    stopped = (advantage > 0 and ratio > 1 + CLIP_HIGH) or (advantage < 0 and ratio < 1 - CLIP_LOW)
    return 0.0 if stopped else -weight * ratio * advantage


def draw() -> tuple[torch.Tensor, ...]:
    rng = np.random.default_rng(7)
    logp = -rng.exponential(1.0, NUM_TOKENS)
    old = np.minimum(logp + rng.normal(0, 0.4, NUM_TOKENS), 0)
    mu = np.minimum(old + rng.normal(0, 0.6, NUM_TOKENS), 0)
    return tuple(torch.tensor(x) for x in (logp, old, mu, rng.normal(0, 1, NUM_TOKENS)))


def compute(logp: torch.Tensor, old: torch.Tensor, mu: torch.Tensor, adv: torch.Tensor):
    return grpo(
        logprobs=logp,
        old_logprobs=old,
        behaviour_logprobs=mu,
        advantages=adv,
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        importance_cap=CAP,
    )


def test_grpo_equals_its_formula_and_gradient() -> None:
    logp, old, mu, adv = draw()
    logp.requires_grad_()
    tokens = compute(logp, old, mu, adv)
    tokens.losses.sum().backward()
    rows = list(zip(*(x.detach().tolist() for x in (logp, old, mu, adv)), strict=True))
    np.testing.assert_allclose(
        tokens.losses.detach().numpy(), [reference(*row) for row in rows], rtol=1e-12
    )
    expected = np.array([reference_gradient(*row) for row in rows])
    np.testing.assert_allclose(logp.grad.numpy(), expected, rtol=1e-12)
    np.testing.assert_array_equal(tokens.clipped.numpy(), (expected == 0))
    assert 0 < tokens.clipped.sum() < NUM_TOKENS


def test_grpo_gradient_equals_finite_differences() -> None:
    logp, old, mu, adv = draw()
    # Far from the clip's two corners the loss is smooth.
    ratio = torch.exp(logp - old)
    smooth = ((ratio - 0.8).abs() > 0.01) & ((ratio - 1.28).abs() > 0.01)
    logp, old, mu, adv = (x[smooth] for x in (logp, old, mu, adv))
    assert torch.autograd.gradcheck(
        lambda x: compute(x, old, mu, adv).losses, logp.requires_grad_(), eps=1e-6
    )


def test_one_update_a_batch_is_the_weighted_policy_gradient() -> None:
    logp, _, mu, adv = draw()
    logp.requires_grad_()
    tokens = compute(logp, logp.detach(), mu, adv)
    tokens.losses.sum().backward()
    weight = torch.exp(logp.detach() - mu).clamp(max=CAP)
    torch.testing.assert_close(logp.grad, -weight * adv)
    assert not tokens.clipped.any()


def test_no_gradient_flows_through_the_importance_weight() -> None:
    logp, old, mu, adv = draw()
    old.requires_grad_()
    mu.requires_grad_()
    tokens = compute(logp.requires_grad_(), old.detach(), mu, adv)
    assert not tokens.importance.requires_grad
    tokens.losses.sum().backward()
    assert mu.grad is None


def test_advantages_are_rewards_in_deviations_from_their_mean() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5]
    mean = sum(rewards) / 5
    deviation = (sum((r - mean) ** 2 for r in rewards) / 5) ** 0.5
    np.testing.assert_allclose(
        group_advantages(rewards), [(r - mean) / (deviation + 1e-6) for r in rewards], rtol=1e-12
    )


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_uniform_group_has_no_advantage(reward: float) -> None:
    np.testing.assert_allclose(group_advantages([reward] * 8), 0, atol=1e-9)


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
