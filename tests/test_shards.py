"""Which runs of checkpoint tensors a model's parameters and buffers are."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from learner.trainer.architectures import ShardSlice, mapping_of
from learner.trainer.checkpoints import Checkpoints, TrainerState, load_latest
from learner.trainer.model import Policy
from learner.trainer.model_folder import save_model
from learner.trainer.ranks import Ranks, joined
from learner.trainer.shards import shard_slices
from understudy.errors import ConfigError

from publishing import CASES, Case, Published  # isort: skip
from trainer_helpers import load as load_bundle  # isort: skip

DENSE = CASES[0]
[EXPERTS] = [case for case in CASES if case.num_experts > 1]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as only:
        yield only


def load(case: Case, folder: Path, ranks: Ranks) -> Policy:
    return load_bundle(case.make_bundle(folder), ranks)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_slices_are_what_transformers_saves(case: Case, tmp_path: Path, ranks: Ranks) -> None:
    policy = load(case, tmp_path, ranks)
    saved = load_file(tmp_path / case.name / "model.safetensors")
    slices = {piece.name: piece for piece in shard_slices(policy, ranks)}
    assert slices.keys() == saved.keys()
    for name, piece in slices.items():
        assert (piece.shape, piece.start) == (tuple(saved[name].shape), 0)
        assert torch.equal(piece.values.view(piece.shape), saved[name]), name


def test_a_shard_of_experts_has_the_matrices_of_those_experts() -> None:
    """Experts 2 and 3 of 5; gate and up are [3, 2] each."""
    piece = ShardSlice(
        name="model.layers.1.mlp.experts.gate_up_proj",
        shape=(5, 6, 2),
        start=2 * 12,
        values=torch.arange(24, 48.0),
    )
    found = list(mapping_of("qwen3_moe")(piece))
    prefix = "model.layers.1.mlp.experts"
    assert [(item.name, item.values[0].item()) for item in found] == [
        (f"{prefix}.2.gate_proj.weight", 24),
        (f"{prefix}.2.up_proj.weight", 30),
        (f"{prefix}.3.gate_proj.weight", 36),
        (f"{prefix}.3.up_proj.weight", 42),
    ]
    assert {(item.shape, item.start, item.values.numel()) for item in found} == {((3, 2), 0, 6)}


def test_buffers_that_a_checkpoint_has_are_published_and_saved(
    tmp_path: Path, ranks: Ranks
) -> None:
    policy = load(DENSE, tmp_path, ranks)
    norm = policy.language_model.base_model.norm
    norm.register_buffer("scale", torch.arange(6.0).view(2, 3))
    norm.register_buffer("cache", torch.zeros(3), persistent=False)
    slices = {piece.name: piece for piece in shard_slices(policy, ranks)}
    assert torch.equal(slices["model.norm.scale"].values, torch.arange(6.0))
    assert "model.norm.cache" not in slices
    save_model(policy, tmp_path / DENSE.name, tmp_path / "out", "bfloat16", ranks)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == slices.keys()
    assert saved["model.norm.scale"].dtype is torch.bfloat16


def test_a_buffer_of_whole_numbers_is_refused_by_name(tmp_path: Path, ranks: Ranks) -> None:
    policy = load(DENSE, tmp_path, ranks)
    policy.language_model.base_model.norm.register_buffer("count", torch.zeros(1, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"model\.norm\.count is torch\.int64"):
        list(shard_slices(policy, ranks))


def test_an_architecture_that_is_not_known_is_refused_at_the_start(
    tmp_path: Path, ranks: Ranks
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(ConfigError, match="'mixtral' is not supported; known: llama, .*qwen3_moe"):
        load_bundle(tmp_path, ranks)


def test_a_training_checkpoint_restores_experts(tmp_path: Path, ranks: Ranks) -> None:
    bundle = EXPERTS.make_bundle(tmp_path)
    first, second = (Published(bundle, EXPERTS, "127.0.0.1:9", ranks) for _ in range(2))
    first.step(1)
    state = TrainerState(
        num_updates=1,
        num_failures=0,
        last_version=1,
        trainer_epoch=1,
        run="test",
        ledger_digest="00" * 32,
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints", ranks, keep=1)
    checkpoints.save(1, first.policy, first.optimizer, state)
    assert checkpoints.finish() is not None
    assert load_latest(tmp_path / "checkpoints", second.policy, second.optimizer, ranks)
    for run in (first, second):
        run.step(2)
    expected, found = first.state(), second.state()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    first.publisher.close()
    second.publisher.close()
