"""Two real gloo ranks, started by torchrun, do what one rank does. This file is also their program.

The ranks take a supervised step and two of RL on the same data, one by rewards alone and one with a
value head, dump their shards, and save the model.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.distributed.tensor import DTensor

from learner.trainer.main import leave
from learner.trainer.model import Policy, load_policy
from learner.trainer.model_folder import save_model
from learner.trainer.optimizer import Optimizer
from learner.trainer.ranks import Ranks, joined
from learner.trainer.report import Clock
from learner.trainer.shards import shard_slices
from learner.trainer.supervised import Batch, accumulate
from understudy.v1 import batch_pb2

from trainer_helpers import (  # isort: skip
    config_of,
    episodes,
    samples,
    tiny_bundle,
    torchrun,
    updater_of,
)

NUM_SAMPLES, MAX_TOKENS, RATE = 13, 128, 1e-4
PASSES = ("passes", "tokens", "length_mean")
"""What depends on how a batch is cut: an empty pack has two tokens."""


def three_steps(bundle: Path, out: Path, ranks: Ranks) -> None:
    """One supervised and two RL batches; leaves figures, shards and the model in `out`."""
    train = {"tokens_per_microbatch": MAX_TOKENS}
    config = config_of(bundle, train=train)
    policy = load_policy(config, ranks, critic=True)
    optimizer = Optimizer(list(policy.parameters()), config.learner.train)
    made = samples(NUM_SAMPLES, policy.language_model.config.vocab_size)
    measured = accumulate(policy, Batch(sequences=made, learning_rate=RATE), MAX_TOKENS, ranks)
    gradient = {
        name: p.grad.full_tensor().numpy().copy() for name, p in policy.checkpoint_parameters()
    }
    norm = optimizer.step(RATE)
    header = batch_pb2.BatchHeader(num_sampled_tokens=sum(s.num_targets for s in made))
    played = episodes(NUM_SAMPLES, policy.language_model.config.vocab_size, staleness=1)
    # The shares differ in size, and with them the ranks' numbers of micro-batches.
    share = played[:9] if ranks.rank == 0 else played[9:]
    share = played if ranks.world_size == 1 else share
    figures = {}
    for name in ("dapo", "vtrace"):
        config = config_of(bundle, train=train, algorithm={"name": name})
        measured_here = updater_of(policy, optimizer, config, ranks).update(share, header, Clock())
        figures |= {f"{name}_{key}": value for key, value in measured_here.items()}
    gradient |= {name: p.full_tensor().numpy() for name, p in head_of(policy)}
    np.savez(out / "gradient.npz", **gradient)
    slices = {f"{s.name}@{s.start}": s.values.numpy() for s in shard_slices(policy, ranks)}
    np.savez(out / f"shard{ranks.rank}.npz", **slices)
    save_model(policy, bundle, out / "model", "float32", ranks)
    if ranks.rank == 0:
        figures |= {"supervised_loss": measured.loss, "supervised_norm": norm}
        (out / "figures.json").write_text(json.dumps(figures))


def head_of(policy: Policy) -> list[tuple[str, DTensor]]:
    """Parameters of the value head, after the steps."""
    return [(name, p.detach()) for name, p in policy.trained_parameters() if "value_" in name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a run of one rank, in this process, and of one of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    bundle = tiny_bundle(folder / "bundle")
    one, two = folder / "one", folder / "two"
    one.mkdir()
    two.mkdir()
    with joined() as ranks:
        three_steps(bundle, one, ranks)
    torchrun(2, __file__, str(bundle), str(two))
    return one, two


def test_two_ranks_take_the_step_of_one(runs: tuple[Path, Path]) -> None:
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in runs)
    assert one.keys() == two.keys()
    # AdamW moves each weight by about 1e-4, also one whose gradient is nothing but rounding.
    apart = np.concatenate([np.abs(one[name] - two[name]).ravel() for name in one])
    assert np.quantile(apart, 0.9999) < 1e-5
    assert apart.mean() < 1e-7


def test_two_ranks_have_the_gradient_of_one(runs: tuple[Path, Path]) -> None:
    one, two = (np.load(folder / "gradient.npz") for folder in runs)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_two_ranks_measure_what_one_does(runs: tuple[Path, Path]) -> None:
    one, two = (json.loads((folder / "figures.json").read_text()) for folder in runs)
    assert one.keys() == two.keys()
    for name in one.keys() - {f"{name}_{key}" for name in ("dapo", "vtrace") for key in PASSES}:
        assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-6), name
    assert one["dapo_token_staleness_mean"] == 1
    assert one["vtrace_value_loss"] > 0


def test_shards_cover_each_tensor_of_the_checkpoint_once(runs: tuple[Path, Path]) -> None:
    folder = runs[1]
    saved = load_file(folder / "model" / "model.safetensors")
    covered = {name: np.zeros(tensor.size, int) for name, tensor in saved.items()}
    for rank in range(2):
        for key, values in np.load(folder / f"shard{rank}.npz").items():
            name, _, start = key.rpartition("@")
            here = slice(int(start), int(start) + values.size)
            covered[name][here] += 1
            np.testing.assert_array_equal(saved[name].ravel()[here], values)
    assert all((times == 1).all() for times in covered.values())


def test_the_saved_folder_is_a_bundle(runs: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(runs[1] / "model")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (runs[1] / "model" / "chat_template.jinja").exists()
    assert not (runs[1] / "model.tmp").exists()


if __name__ == "__main__":
    torch.manual_seed(0)
    with joined() as these_ranks:
        three_steps(Path(sys.argv[1]), Path(sys.argv[2]), these_ranks)
    leave(0)
