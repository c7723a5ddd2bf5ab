"""The policy's log-probabilities against transformers' own logits."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.trainer import logprobs as logprobs_module
from learner.trainer.logprobs import chosen_logprobs
from learner.trainer.model import Policy, frozen_output
from learner.trainer.optimizer import NonFiniteGradientError, Optimizer, cosine, warmed_up
from learner.trainer.packing import pack
from learner.trainer.ranks import Ranks, joined
from learner.trainer.report import Clock
from understudy.config import TrainConfig
from understudy.errors import ConfigError
from understudy.v1 import batch_pb2

from trainer_helpers import (  # isort: skip
    config_of,
    episodes,
    load,
    samples,
    tiny_bundle,
    updater_of,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("model") / "bundle")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as only:
        yield only


@pytest.fixture
def policy(folder: Path, ranks: Ranks) -> Policy:
    return load(folder, ranks)


def test_logprobs_equal_those_of_each_sequence_by_itself(policy: Policy, folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = samples(5, plain.config.vocab_size)
    found = frozen_output(policy, pack(made, CPU), temperature=0.7).logprobs_N
    expected = []
    for sample in made:
        tokens = torch.tensor(sample.token_ids, dtype=torch.long)
        with torch.no_grad():
            logits = plain(tokens[None]).logits[0, :-1].double() / 0.7
        chosen = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        expected.append(chosen[torch.tensor(sample.loss_mask[1:])])
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_chunks_give_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(50, 8), torch.randn(30, 8)
    targets = torch.randint(30, (50,))
    gradients = []
    for chunk in (4096, 16):
        monkeypatch.setattr(logprobs_module, "CHUNK", chunk)
        inputs = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        logprobs, entropies = chosen_logprobs(*inputs, targets, 1.3, with_entropy=True)
        (logprobs.square() + entropies).sum().backward()
        gradients.append([x.grad for x in inputs])
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, pieces)


def test_a_step_that_follows_a_frozen_pass_is_seen_by_the_next(policy: Policy) -> None:
    packed = pack(samples(4, policy.language_model.config.vocab_size), CPU)
    optimizer = Optimizer(list(policy.parameters()), TrainConfig())
    before = frozen_output(policy, packed).logprobs_N
    (-policy(packed).logprobs_N.mean()).backward()
    optimizer.step(1e-3)
    after = frozen_output(policy, packed).logprobs_N
    assert after.mean() > before.mean() + 0.01


def test_a_batch_in_several_updates_clips_the_later_ones(policy: Policy, ranks: Ranks) -> None:
    train = {"updates_per_batch": 3, "learning_rate": 1e-2, "warmup_steps": 0}
    config = config_of(Path("unused"), train=train)
    made = episodes(12, policy.language_model.config.vocab_size)
    header = batch_pb2.BatchHeader(num_sampled_tokens=sum(e.num_sampled for e in made))
    optimizer = Optimizer(list(policy.parameters()), config.learner.train)
    figures = updater_of(policy, optimizer, config, ranks).update(made, header, Clock())
    assert figures["trained_tokens"] == header.num_sampled_tokens
    assert figures["clip_share"] > 0


def test_the_kl_term_pulls_back_to_the_reference(folder: Path, ranks: Ranks) -> None:
    """Without advantages the term is all that acts: the distance from the reference shrinks."""
    train = {"learning_rate": 1e-3, "warmup_steps": 0}
    config = config_of(folder, train=train, algorithm={"kl_coefficient": 1.0})
    policy = load(folder, ranks)
    made = [
        replace(episode, advantage=0.0)
        for episode in episodes(12, policy.language_model.config.vocab_size)
    ]
    header = batch_pb2.BatchHeader(num_sampled_tokens=sum(e.num_sampled for e in made))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.to_local().add_(torch.randn_like(parameter.to_local()), alpha=0.02)
    packed = pack([sample for episode in made for sample in episode.samples], CPU)
    current = frozen_output(policy, packed).logprobs_N.numpy()
    ends = np.cumsum([episode.num_sampled for episode in made])[:-1]
    made = [
        replace(e, samples=(replace(e.samples[0], behaviour_logprobs=logprobs),))
        for e, logprobs in zip(made, np.split(current, ends), strict=True)
    ]
    optimizer = Optimizer(list(policy.parameters()), config.learner.train)
    updater = updater_of(policy, optimizer, config, ranks)
    distances = [updater.update(made, header, Clock())["kl_reference"] for _ in range(20)]
    assert distances[0] > 0.01
    assert distances[-1] < 0.5 * distances[0]


def test_a_batch_of_uniform_groups_changes_nothing(policy: Policy, ranks: Ranks) -> None:
    config = config_of(Path("unused"))
    optimizer = Optimizer(list(policy.parameters()), config.learner.train)
    before = [p.detach().to_local().clone() for p in policy.parameters()]
    updater = updater_of(policy, optimizer, config, ranks)
    figures = updater.update([], batch_pb2.BatchHeader(), Clock())
    assert figures["trained_tokens"] == 0
    for old, parameter in zip(before, policy.parameters(), strict=True):
        assert torch.equal(old, parameter.detach().to_local())


def test_a_gradient_that_is_not_finite_changes_nothing(policy: Policy) -> None:
    packed = pack(samples(2, policy.language_model.config.vocab_size), CPU)
    optimizer = Optimizer(list(policy.parameters()), TrainConfig())
    before = [p.detach().to_local().clone() for p in policy.parameters()]
    (policy(packed).logprobs_N.sum() * float("nan")).backward()
    with pytest.raises(NonFiniteGradientError, match="gradient norm is nan"):
        optimizer.step(1e-3)
    assert all(parameter.grad is None for parameter in policy.parameters())
    for old, parameter in zip(before, policy.parameters(), strict=True):
        assert torch.equal(old, parameter.detach().to_local())


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen3", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}'
    )
    with pytest.raises(ConfigError, match="auto_map"):
        load(tmp_path, ranks)


def test_rates_rise_hold_and_fall() -> None:
    assert [round(warmed_up(step, 1.0, 3), 2) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    rates = [cosine(step, 100, 2.0, 10, 0.1) for step in range(100)]
    assert max(rates) == rates[10] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
