"""What a configured algorithm is put together to."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from learner.trainer.algorithm import Algorithm, Loss
from learner.trainer.losses.tokens import Outputs, Steps, Tokens, Totals
from understudy.config import AlgorithmConfig
from understudy.config.algorithm import ROWS
from understudy.errors import ConfigError

TOKENS = Tokens(
    behaviour_logprobs_N=torch.tensor([-1.0, -2.0, -0.5, -0.7, -3.0, -0.2]),
    staleness_N=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 2.0]),
    step_N=torch.tensor([0, 0, 1, 2, 2, 2]),
    episode_N=torch.tensor([0, 0, 0, 1, 1, 1]),
    steps=Steps(
        first_K=torch.tensor([0, 2, 3]),
        episode_K=torch.tensor([0, 0, 1]),
        rewards_K=torch.tensor([0.25, 1.0, 0.0]),
        truncated_E=torch.tensor([False, True]),
    ),
)
TOTALS = Totals(num_tokens=6, num_steps=3, num_episodes=2)
ADVANTAGES = torch.tensor([1.5, -0.5])


def outputs() -> Outputs:
    return Outputs(
        logprobs_N=torch.tensor([-1.1, -1.2, -0.6, -0.7, -2.0, -0.9], requires_grad=True),
        values_N=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], requires_grad=True),
        end_values_E=torch.tensor([5.0, 0.5]),
    )


def loss_of(config: AlgorithmConfig, new: Outputs) -> Loss:
    return Algorithm(config).loss(new, new.detached(), TOKENS, ADVANTAGES, TOTALS)


@pytest.mark.parametrize("name", ROWS)
def test_every_named_algorithm_has_a_finite_loss_and_gradient(name: str) -> None:
    new = outputs()
    loss = loss_of(AlgorithmConfig(name=name), new)
    assert loss.total.isfinite()
    loss.total.backward()
    assert new.logprobs_N.grad is not None
    assert new.logprobs_N.grad.isfinite().all()
    assert new.logprobs_N.grad.abs().sum() > 0
    assert (new.values_N.grad is not None) == (name in ("ppo", "vtrace"))


def test_the_default_is_the_truncated_clipped_surrogate_in_the_mean_over_tokens() -> None:
    new = outputs()
    loss = loss_of(AlgorithmConfig(), new)
    weights = torch.exp(new.logprobs_N.detach() - TOKENS.behaviour_logprobs_N).clamp(max=2.0)
    advantages = ADVANTAGES[TOKENS.episode_N]
    torch.testing.assert_close(loss.total, -(weights * advantages).mean())
    (gradient,) = torch.autograd.grad(loss.total, new.logprobs_N)
    torch.testing.assert_close(gradient, -weights * advantages / 6)


def test_vtrace_weighs_a_turn_by_the_ratio_that_its_trace_has() -> None:
    """By hand: turns of ratios exp(0.35), exp(-0.1), exp(0.1), with values .1, .3, .4."""
    new = outputs()
    loss = loss_of(AlgorithmConfig(name="vtrace"), new)
    rho = torch.tensor([1.0, float(torch.tensor(-0.1).exp()), 1.0])
    last = 0.3 + rho[1] * (1.0 - 0.3)  # terminated: nothing comes after
    first = 0.1 + 0.25 + 0.3 - 0.1 + last - 0.3
    cut_short = torch.tensor(0.4) + 0.5 - 0.4  # goes on with the value of its last state
    targets = torch.stack([first, last, cut_short])
    torch.testing.assert_close(loss.targets_K, targets)
    advantages = torch.stack([0.25 + last - 0.1, torch.tensor(1.0 - 0.3), torch.tensor(0.1)])
    torch.testing.assert_close(loss.advantages_N, advantages[TOKENS.step_N])
    torch.testing.assert_close(loss.weights_N, rho[TOKENS.step_N])
    values = torch.tensor([0.1, 0.3, 0.4])
    expected = (
        -(rho * advantages)[TOKENS.step_N].mean() + 0.5 * (values - targets).square().mean() / 2
    )
    torch.testing.assert_close(loss.total, expected)


def test_old_outputs_bound_what_several_updates_do() -> None:
    new, old = outputs(), outputs()
    shifted = Outputs(
        logprobs_N=old.logprobs_N.detach() - 1.0,
        values_N=old.values_N,
        end_values_E=old.end_values_E,
    )
    loss = Algorithm(AlgorithmConfig()).loss(new, shifted.detached(), TOKENS, ADVANTAGES, TOTALS)
    assert loss.clipped_N.tolist() == [True] * 3 + [False] * 3  # r = e, up only where A > 0


def test_entropy_is_rewarded() -> None:
    entropies = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], requires_grad=True)
    plain = outputs()
    new = Outputs(logprobs_N=plain.logprobs_N, entropies_N=entropies)
    config = AlgorithmConfig(entropy_coefficient=0.1)
    loss = loss_of(config, new)
    (gradient,) = torch.autograd.grad(loss.total, entropies)
    torch.testing.assert_close(gradient, -0.1 * loss.weights_N / 6)


def test_the_kl_term_is_weighed_as_its_tokens_are() -> None:
    new = outputs()
    reference = new.logprobs_N.detach() - 0.5
    config = AlgorithmConfig(kl_coefficient=0.2)
    loss = Algorithm(config).loss(
        new, new.detached(), TOKENS, torch.zeros(2), TOTALS, reference_logprobs_N=reference
    )
    torch.testing.assert_close(loss.total, 0.2 * (loss.weights_N * 0.125).mean())


def test_what_is_set_beside_a_name_counts() -> None:
    config = AlgorithmConfig(name="grpo", aggregation="token")
    assert (config.aggregation, config.clip_high) == ("token", 0.2)
    assert AlgorithmConfig.model_validate(config.model_dump()) == config
    assert AlgorithmConfig.model_validate_json(config.model_dump_json()) == config


def test_another_name_can_be_set_on_what_was_written() -> None:
    written = AlgorithmConfig(name="dapo", kl_coefficient=0.2).model_dump()
    assert written == {"name": "dapo", "kl_coefficient": 0.2}
    other = AlgorithmConfig.model_validate({**written, "name": "vtrace"})
    assert (other.estimator, other.kl_coefficient) == ("vtrace", 0.2)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "trpo"}, "name = 'trpo' is no algorithm; known: reinforce, grpo"),
        ({"estimator": "gea"}, "estimator = 'gea' is not known; take one of group_normalized"),
        ({"proximal": "behaviour"}, "correction = 'token' has nothing to correct"),
        ({"mask_low": 3.0}, "mask_low = 3.0 is not below mask_high = 2.0"),
    ],
)
def test_what_cannot_be_is_refused_at_load(values: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match="Value error") as raised:
        AlgorithmConfig.model_validate(values)
    assert says in str(raised.value)


def test_a_part_that_no_plug_in_registers_is_refused() -> None:
    with pytest.raises(ConfigError, match="objective = 'mine': neither here nor registered"):
        Algorithm(AlgorithmConfig(objective="mine", plugins=("json",)))
    with pytest.raises(ConfigError, match="'no_such_module' cannot be imported"):
        Algorithm(AlgorithmConfig(plugins=("no_such_module",)))


def test_the_documents_own_loss_works(tmp_path: Path) -> None:
    """docs/algorithms.md's file, in a process of its own, since it registers a name for good."""
    root = Path(__file__).parents[1]
    page = (root / "docs" / "algorithms.md").read_text()
    [code] = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    (tmp_path / "my_losses.py").write_text(code)
    (tmp_path / "use.py").write_text(
        "from learner.trainer.algorithm import Algorithm\n"
        "from test_algorithm import loss_of, outputs, AlgorithmConfig\n"
        "config = AlgorithmConfig(objective='squared', plugins=('my_losses',))\n"
        "print(float(loss_of(config, outputs()).total))\n"
    )
    done = subprocess.run(
        [sys.executable, "use.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{root}:{root / 'tests'}:{tmp_path}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    weights = torch.exp(outputs().logprobs_N - TOKENS.behaviour_logprobs_N).clamp(max=2.0)
    expected = (weights * ADVANTAGES[TOKENS.episode_N].square() / 2).mean()
    assert float(done.stdout) == pytest.approx(float(expected))
