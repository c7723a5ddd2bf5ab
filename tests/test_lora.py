"""Adapters that learn, on one rank and on two; peft itself says what is right. Also their program.

The ranks take supervised and RL steps on the same data, with a term that holds the policy near the
model without adapters, and leave gradients, figures, a checkpoint and the saved folders.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.numpy import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from learner.trainer.checkpoints import Checkpoints, Saved, TrainerState, load_latest
from learner.trainer.main import leave
from learner.trainer.model import Policy, frozen_output, load_policy, load_reference
from learner.trainer.model_folder import save_model
from learner.trainer.optimizer import Optimizer
from learner.trainer.packing import pack
from learner.trainer.ranks import Ranks, joined
from learner.trainer.report import Clock
from learner.trainer.supervised import Batch, accumulate
from understudy.config import Config
from understudy.errors import ConfigError
from understudy.v1 import batch_pb2
from understudy.weights.adapter import describe_adapter, is_adapter

from publishing import Case  # isort: skip
from trainer_helpers import (  # isort: skip
    config_of,
    episodes,
    load,
    samples,
    tiny_bundle,
    torchrun,
    updater_of,
)

NUM_SAMPLES, MAX_TOKENS, RATE = 9, 128, 1e-3
LORA = {"rank": 3, "alpha": 7, "target_modules": ["q_proj", "o_proj", "down_proj"]}
STATE = TrainerState(
    num_updates=3,
    num_failures=0,
    last_version=1,
    trainer_epoch=1,
    run="test",
    ledger_digest="00" * 32,
)


def config(bundle: Path, dtype: str = "float32", **lora: Any) -> Config:
    return config_of(
        bundle,
        dtype,
        train={"tokens_per_microbatch": MAX_TOKENS, "learning_rate": RATE, "warmup_steps": 0},
        algorithm={"name": "vtrace", "kl_coefficient": 0.1},
        lora={**LORA, **lora},
    )


def whole(tensor: torch.Tensor) -> np.ndarray:
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().float().numpy().copy()


def state_of(policy: Policy, optimizer: Optimizer) -> dict[str, np.ndarray]:
    """What learns, with its moments."""
    return {
        f"{kind}/{name}": whole(value)
        for name, parameter in policy.trained_parameters()
        for kind, value in {"weight": parameter, **optimizer.moments(parameter)}.items()
    }


def learn(bundle: Path, out: Path, ranks: Ranks) -> None:
    """Leaves in `out` what was learned and measured, a checkpoint, and the saved folders."""
    settings = config(bundle)
    policy = load_policy(settings, ranks, critic=True)
    optimizer = Optimizer(list(policy.parameters()), settings.learner.train)
    vocab_size = policy.language_model.config.vocab_size
    made, played = samples(NUM_SAMPLES, vocab_size), episodes(NUM_SAMPLES, vocab_size)
    batch = Batch(sequences=made, learning_rate=RATE)
    accumulate(policy, batch, MAX_TOKENS, ranks)
    optimizer.step(RATE)
    updater = updater_of(policy, optimizer, settings, ranks)
    header = batch_pb2.BatchHeader(num_sampled_tokens=sum(e.num_sampled for e in played))
    share = played[ranks.rank :: ranks.world_size]
    figures = [updater.update(share, header, Clock()) for _ in range(2)][-1]
    accumulate(policy, batch, MAX_TOKENS, ranks)
    gradient = {n: whole(p.grad) for n, p in policy.checkpoint_parameters() if is_adapter(n)}
    optimizer.clear()
    state = state_of(policy, optimizer)
    frozen = {n: whole(p) for n, p in policy.checkpoint_parameters() if not p.requires_grad}
    checkpoints = Checkpoints(out / "checkpoints", ranks, keep=1)
    checkpoints.save(3, policy, optimizer, STATE)
    assert isinstance(checkpoints.finish(), Saved)
    save_model(policy, bundle, out / "model", "float32", ranks)
    if ranks.rank == 0:
        np.savez(out / "gradient.npz", **gradient)
        np.savez(out / "state.npz", **state)
        np.savez(out / "frozen.npz", **frozen)
        (out / "figures.json").write_text(json.dumps(figures))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("lora") / "bundle")


@pytest.fixture(scope="module")
def runs(bundle: Path) -> tuple[Path, Path]:
    """Folders of a run of one rank, in this process, and of one of two ranks."""
    one, two = bundle.parent / "one", bundle.parent / "two"
    one.mkdir()
    two.mkdir()
    with joined() as ranks:
        learn(bundle, one, ranks)
    torchrun(2, __file__, str(bundle), str(two))
    return one, two


@pytest.fixture(scope="module")
def theirs(bundle: Path, runs: tuple[Path, Path]) -> PeftModel:
    """What peft makes of the adapters that were saved."""
    base = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32)
    return PeftModel.from_pretrained(base, runs[0] / "model" / "adapter", is_trainable=True)


def logprobs(model: Any, token_ids: np.ndarray) -> torch.Tensor:
    """[T - 1] of each token after the first."""
    ids = torch.from_numpy(token_ids).long()
    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


# --- Learning ---


def test_adapters_and_the_value_head_learn_and_nothing_else(
    bundle: Path, runs: tuple[Path, Path]
) -> None:
    before = load_file(bundle / "model.safetensors")
    state, frozen = np.load(runs[0] / "state.npz"), np.load(runs[0] / "frozen.npz")
    learning = {name.partition("/")[2] for name in state}
    assert all(is_adapter(name) or name.startswith("value_head") for name in learning)
    assert len(learning) == 2 + 2 * len(LORA["target_modules"]) * 3  # layers of the tiny model
    assert set(frozen.files) == before.keys()
    for name in frozen.files:
        np.testing.assert_array_equal(frozen[name], before[name], err_msg=name)
    for name in learning:
        if "lora_B" in name:
            assert np.abs(state[f"weight/{name}"]).max() > 0, name


def test_the_gradient_is_that_of_peft(theirs: PeftModel, runs: tuple[Path, Path]) -> None:
    theirs.zero_grad()
    made = samples(NUM_SAMPLES, theirs.config.vocab_size)
    lost = [logprobs(theirs, s.token_ids)[torch.from_numpy(s.loss_mask[1:])] for s in made]
    (-torch.cat(lost).mean()).backward()
    ours = np.load(runs[0] / "gradient.npz")
    found = {
        name.replace(".default.", "."): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert found.keys() == set(ours.files)
    for name, gradient in found.items():
        np.testing.assert_allclose(ours[name], gradient, rtol=1e-3, atol=1e-6, err_msg=name)


def test_two_ranks_learn_what_one_does(runs: tuple[Path, Path]) -> None:
    for file in ("gradient.npz", "state.npz"):
        one, two = (np.load(folder / file) for folder in runs)
        assert set(one.files) == set(two.files)
        for name in one.files:
            np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=3e-6, err_msg=name)
    one, two = (json.loads((folder / "figures.json").read_text()) for folder in runs)
    for name in ("kl_reference", "grad_norm", "value_loss"):
        assert one[name] == pytest.approx(two[name], rel=1e-3), name
    assert one["kl_reference"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_change_nothing(bundle: Path, dtype: str) -> None:
    with joined() as ranks:
        packed = pack(samples(4, 50), ranks.device)
        plain, adapted = load(bundle, ranks, dtype), load_policy(config(bundle, dtype), ranks)
        expected = frozen_output(plain, packed).logprobs_N
        assert torch.equal(frozen_output(adapted, packed).logprobs_N, expected)


def test_the_reference_is_the_model_without_adapters(bundle: Path, runs: tuple[Path, Path]) -> None:
    with joined() as ranks:
        settings = config(bundle)
        policy = load_policy(settings, ranks, critic=True)
        optimizer = Optimizer(list(policy.parameters()), settings.learner.train)
        assert load_latest(runs[0] / "checkpoints", policy, optimizer, ranks)
        reference = load_reference(settings, policy, ranks)
        assert reference
        packed = pack(samples(4, 50), ranks.device)
        expected = frozen_output(load(bundle, ranks), packed).logprobs_N
        torch.testing.assert_close(reference(packed, 1.0), expected)
        now = frozen_output(policy, packed).logprobs_N
        assert (now - expected).abs().max() > 1e-3  # the adapters are on again


# --- Checkpoints and folders ---


@pytest.mark.parametrize("saved_by", [0, 1])
def test_a_checkpoint_of_any_ranks_resumes_bit_equal(
    bundle: Path, runs: tuple[Path, Path], saved_by: int
) -> None:
    saved = np.load(runs[saved_by] / "state.npz")
    with joined() as ranks:
        settings = config(bundle)
        policy = load_policy(settings, ranks, critic=True)
        optimizer = Optimizer(list(policy.parameters()), settings.learner.train)
        checkpoint = load_latest(runs[saved_by] / "checkpoints", policy, optimizer, ranks)
        assert checkpoint
        assert checkpoint.manifest.state == STATE
        state = state_of(policy, optimizer)
    assert state.keys() == set(saved.files)
    for name, values in state.items():
        np.testing.assert_array_equal(values, saved[name], err_msg=name)
    files = (path for path in (runs[saved_by] / "checkpoints").rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) < 400_000  # without the model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 4}, "rank 4, alpha 7, on down_proj, o_proj, q_proj"),
        ({"rank": 0}, "no adapters"),
        ({"seed": 2}, "digest of the weights that adapters belong to"),
    ],
)
def test_a_checkpoint_of_other_adapters_or_another_model_is_refused(
    tmp_path: Path, runs: tuple[Path, Path], bundle: Path, change: dict[str, int], said: str
) -> None:
    if change.pop("seed", 0):
        base = AutoModelForCausalLM.from_pretrained(bundle)
        base.get_input_embeddings().weight.data[0, 0] += 1
        base.save_pretrained(tmp_path)
        bundle = tmp_path
    with joined() as ranks:
        settings = config(bundle, **change)
        policy = load_policy(settings, ranks, critic=True)
        optimizer = Optimizer(list(policy.parameters()), settings.learner.train)
        with pytest.raises(ConfigError, match=said):
            load_latest(runs[0] / "checkpoints", policy, optimizer, ranks)


def test_the_saved_model_has_the_adapters_in_it(theirs: PeftModel, runs: tuple[Path, Path]) -> None:
    merged = AutoModelForCausalLM.from_pretrained(runs[0] / "model", dtype=torch.float32)
    with torch.no_grad():
        for sample in samples(4, merged.config.vocab_size):
            apart = logprobs(merged, sample.token_ids) - logprobs(theirs, sample.token_ids)
            assert apart.abs().max() < 1e-4
            with theirs.disable_adapter():
                apart = logprobs(merged, sample.token_ids) - logprobs(theirs, sample.token_ids)
            assert apart.abs().max() > 1e-3
    described = json.loads((runs[0] / "model" / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (3, 7.0)


# --- Refusals ---


@pytest.mark.parametrize(
    ("learner", "said"),
    [
        ({"lora": {"rank": 4, "target_modules": []}}, "nothing would learn; name some of q_proj"),
        ({"lora": {"rank": 4, "target_modules": ["lm_head"]}}, "'lm_head', which may be tied"),
        ({"lora": {"rank": 4, "target_modules": ["experts"]}}, "experts of a mixture are fused"),
        ({"lora": {"rank": 513}}, "less than or equal to 512"),
        (
            {"lora": {"rank": 4}, "ranks": 2, "train": {"tensor_parallel": 2}},
            "lora.rank = 4 and train.tensor_parallel = 2 do not go together",
        ),
        (
            {"lora": {"rank": 4}, "weights": {"transport": "nccl"}},
            "lora.rank = 4 and weights.transport = 'nccl' do not go together",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(learner: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config_of(Path(), **learner)


@pytest.mark.parametrize(
    ("case", "target", "said"),
    [
        ("qwen3", "c_attn", "qwen3 has no 'c_attn': target_modules may have down_proj, gate_proj"),
        ("qwen3", "mlp", "'mlp' is a Qwen3MLP"),
        ("qwen3_moe", "up_proj", "its experts are fused and cannot have adapters"),
    ],
)
def test_targets_that_a_model_lacks_are_named(
    tmp_path: Path, case: str, target: str, said: str
) -> None:
    experts = 2 * (case == "qwen3_moe")
    made = Case(model_type=case, tied=True, dtype="float32", num_experts=experts)
    folder = made.make_bundle(tmp_path)
    with joined() as ranks, pytest.raises(ConfigError, match=said):
        load_policy(config(folder, target_modules=[target]), ranks)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    folder = Case(model_type="qwen3", tied=True, dtype="float32").make_bundle(tmp_path)
    (folder / "adapter_config.json").write_bytes(describe_adapter(config(folder).learner.lora))
    with joined() as ranks, pytest.raises(ConfigError, match="says that it is an adapter"):
        load(folder, ranks)


if __name__ == "__main__":
    with joined() as these_ranks:
        learn(Path(sys.argv[1]), Path(sys.argv[2]), these_ranks)
    leave(0)
