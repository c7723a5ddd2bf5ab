"""What guards a step: gradients that are not finite, collapse, memory."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import proto

from learner.trainer.experience import Episode
from learner.trainer.intake_client import BatchShare
from learner.trainer.memory import OutOfMemoryError, noting_what_fits, token_limit
from learner.trainer.model import Policy, load_policy
from learner.trainer.optimizer import Optimizer
from learner.trainer.ranks import Ranks, joined
from learner.trainer.report import Clock
from learner.trainer.untrainable import save_share
from learner.trainer.update import UntrainableBatchError, Updater
from understudy.v1 import batch_pb2

from trainer_helpers import config_of, episodes, run_python, tiny_bundle, updater_of  # isort: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("update") / "bundle")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as only:
        yield only


class Learner:
    """An updater and what it changes."""

    def __init__(self, bundle: Path, ranks: Ranks, train: dict, algorithm: str = "dapo") -> None:
        train = {"learning_rate": 1e-3, "warmup_steps": 0, **train}
        config = config_of(bundle, train=train, algorithm={"name": algorithm})
        self.policy: Policy = load_policy(config, ranks, critic=algorithm == "vtrace")
        optimizer = Optimizer(list(self.policy.parameters()), config.learner.train)
        self.updater: Updater = updater_of(self.policy, optimizer, config, ranks)
        self.made = episodes(8, self.policy.language_model.config.vocab_size)

    def update(self, made: list[Episode] | None = None) -> dict[str, float]:
        made = made or self.made
        header = batch_pb2.BatchHeader(num_sampled_tokens=sum(e.num_sampled for e in made))
        return self.updater.update(made, header, Clock())

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().to_local().flatten() for p in self.policy.parameters()])


def broken(made: list[Episode]) -> list[Episode]:
    return [replace(made[0], advantage=float("nan")), *made[1:]]


def test_an_update_without_a_finite_gradient_is_skipped(bundle: Path, ranks: Ranks) -> None:
    learner = Learner(bundle, ranks, {"max_skipped_updates": 2})
    before = learner.weights()
    figures = learner.update(broken(learner.made))
    assert figures["skipped_updates"] == 1
    assert torch.equal(learner.weights(), before)
    assert learner.updater.num_updates == 0
    assert learner.update()["skipped_updates"] == 0
    assert not torch.equal(learner.weights(), before)
    learner.update(broken(learner.made))  # the count begins anew
    with pytest.raises(UntrainableBatchError, match="2 updates in a row were skipped"):
        learner.update(broken(learner.made))


def far_off(made: list[Episode]) -> list[Episode]:
    """One token in the batch was all but impossible when it was sampled."""
    sample = made[0].samples[0]
    logprobs = sample.behaviour_logprobs.copy()
    logprobs[0] = -60
    return [replace(made[0], samples=(replace(sample, behaviour_logprobs=logprobs),)), *made[1:]]


def test_a_small_effective_sample_is_skipped(bundle: Path, ranks: Ranks) -> None:
    train = {"min_effective_sample_size": 0.05, "small_sample": "skip"}
    learner = Learner(bundle, ranks, train)
    before = learner.weights()
    figures = learner.update(far_off(learner.made))
    assert figures["effective_sample_size"] < 0.05
    assert figures["skipped_updates"] == 1
    assert torch.equal(learner.weights(), before)


def test_a_small_effective_sample_shrinks_the_step(bundle: Path, ranks: Ranks) -> None:
    learner = Learner(bundle, ranks, {"min_effective_sample_size": 0.05})
    figures = learner.update(far_off(learner.made))
    share = figures["effective_sample_size"] / 0.05
    assert 0 < share < 1
    assert figures["learning_rate"] == pytest.approx(1e-3 * share)
    assert figures["skipped_updates"] == 0


def test_how_a_batch_is_cut_changes_nothing(bundle: Path, ranks: Ranks) -> None:
    """Packs of all episodes, and of one each, for every aggregation and with a value head."""
    for algorithm in ("grpo", "dapo", "dr_grpo", "vtrace"):
        found = []
        for limit in (16_384, 1):
            learner = Learner(bundle, ranks, {"tokens_per_microbatch": limit}, algorithm)
            figures = learner.update()
            found.append((figures["passes"], figures["grad_norm"], figures["loss"]))
        (one, *whole), (many, *pieces) = found
        assert (one, many) == (1, len(learner.made))
        assert pieces == pytest.approx(whole, rel=1e-5), algorithm


def test_a_value_head_learns_what_states_are_worth(bundle: Path, ranks: Ranks) -> None:
    """Every episode is rewarded: values rise from 0 towards 1."""
    learner = Learner(bundle, ranks, {"learning_rate": 3e-3}, "vtrace")
    made = [
        replace(episode, turn_rewards=np.array([0, 1], "f4"), truncated=False)
        for episode in learner.made
    ]
    losses = [learner.update(made)["value_loss"] for _ in range(25)]
    assert losses[0] > 0.1
    assert losses[-1] < 0.1 * losses[0]


def test_a_share_is_kept_as_it_came(tmp_path: Path) -> None:
    share = BatchShare(
        header=batch_pb2.BatchHeader(step=7, head_version=3),
        trajectories=(batch_pb2.BatchTrajectory(group_index=1, reward_index=2),),
    )
    path = save_share(tmp_path / "untrainable", 1, share)
    assert path.name == "step-00000007-rank-1.pb"
    stream, kept = io.BytesIO(path.read_bytes()), []
    while (message := proto.parse_length_prefixed(batch_pb2.NextBatchResponse, stream)) is not None:
        kept.append(message)
    assert [message.WhichOneof("response") for message in kept] == ["header", "trajectory"]
    assert kept[0].header == share.header
    assert kept[1].trajectory == share.trajectories[0]


def test_what_does_not_fit_halves_the_next_starts_limit(tmp_path: Path, ranks: Ranks) -> None:
    assert token_limit(tmp_path, 1000, ranks) == 1000
    with pytest.raises(OutOfMemoryError, match="at most 1000 tokens do not fit .* takes 500"):
        with noting_what_fits(tmp_path, 1000, ranks):
            torch.empty(2**60)  # the allocator's own complaint
    assert token_limit(tmp_path, 1000, ranks) == 500
    assert token_limit(tmp_path, 300, ranks) == 300


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path, ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match="shape"), noting_what_fits(tmp_path, 1000, ranks):
        torch.zeros(2).view(3)
    assert token_limit(tmp_path, 1000, ranks) == 1000


def test_a_step_that_does_not_fit_is_noted(tmp_path: Path) -> None:
    """In a process whose address space ends a little above what it has."""
    done = run_python(__file__, str(tiny_bundle(tmp_path / "bundle")), str(tmp_path))
    assert done.stdout.split() == ["OutOfMemoryError", "32768"], done.stderr


if __name__ == "__main__":
    import resource
    import sys

    with joined() as only_rank:
        learner = Learner(Path(sys.argv[1]), only_rank, {"tokens_per_microbatch": 65_536})
        learner.update()
        status = Path("/proc/self/status").read_text().splitlines()
        [size] = [line for line in status if line.startswith("VmSize")]
        limit = (int(size.split()[1]) + 100 * 1024) * 1024
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
        try:
            with noting_what_fits(Path(sys.argv[2]), 65_536, only_rank):
                learner.update(learner.made * 200)
        except OutOfMemoryError as error:
            print(type(error).__name__)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        print(token_limit(Path(sys.argv[2]), 65_536, only_rank))
