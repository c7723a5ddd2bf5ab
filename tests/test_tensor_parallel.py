"""Real gloo ranks in grids of data x tensor do what one rank does. This file is also their program.

In each layout the ranks take a supervised step and one of RL with a value head, dump what they hold
and would publish, save a checkpoint, and load those that other layouts have saved.
"""

import faulthandler
import itertools
import json
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from learner.trainer.checkpoints import Checkpoints, Saved, TrainerState, load_latest
from learner.trainer.main import leave
from learner.trainer.model import Policy, frozen_output, load_policy
from learner.trainer.model_folder import save_model
from learner.trainer.optimizer import Optimizer
from learner.trainer.packing import pack
from learner.trainer.ranks import Ranks, joined
from learner.trainer.report import Clock
from learner.trainer.shards import checkpoint_tensors, shard_slices
from learner.trainer.supervised import Batch, accumulate
from learner.trainer.tensor_parallel import parallelize
from understudy.config import Config
from understudy.errors import ConfigError
from understudy.v1 import batch_pb2

from publishing import SIZES, VOCAB_SIZE, Case  # isort: skip
from trainer_helpers import (  # isort: skip
    config_of,
    episodes,
    load,
    run_python,
    samples,
    updater_of,
)

pytestmark = pytest.mark.timeout(500)  # of which the grids take most, in a fixture
NUM_SAMPLES, MAX_TOKENS, RATE = 13, 128, 1e-4
# Halves of the inner width have 21 rows, of which two data ranks get 11 and 10; data ranks have 13
# rows of what is cut by columns, of which tensor ranks get 7 and 6.
ODD = {"hidden_size": 26, "intermediate_size": 42}
CASES = (
    Case(model_type="qwen3", tied=True, dtype="float32", sizes=ODD),
    Case(model_type="qwen3", tied=False, dtype="float32"),
    Case(model_type="llama", tied=False, dtype="float32"),
    Case(model_type="qwen2", tied=True, dtype="float32"),
    Case(model_type="qwen3_moe", tied=False, dtype="float32", num_experts=5),
)
LAYOUTS = {"1x1": 1, "1x2": 2, "2x1": 2, "2x2": 4}
"""Data x tensor ranks -> ranks."""
SOME = (CASES[0], CASES[-1])
"""Cases of the layouts other than one rank and one tensor group."""


@dataclass(frozen=True, kw_only=True)
class Unfit:
    """A model that two tensor ranks cannot share."""

    model_type: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, str] | None = None
    """Instead of the model's own."""
    said: str


UNFIT = {
    "heads": Unfit(
        model_type="qwen3",
        sizes={"num_attention_heads": 3, "num_key_value_heads": 1},
        said="does not divide the model's num_attention_heads = 3",
    ),
    "kv": Unfit(
        model_type="llama",
        sizes={"num_attention_heads": 2, "num_key_value_heads": 1},
        said="does not divide the model's num_key_value_heads = 1",
    ),
    "width": Unfit(
        model_type="qwen3",
        sizes={"intermediate_size": 41},
        said="does not divide the model's intermediate_size = 41",
    ),
    "bias": Unfit(
        model_type="llama",
        sizes={"attention_bias": True},
        said="layers.0.self_attn.o_proj has a bias",
    ),
    "experts": Unfit(
        model_type="qwen3_moe",
        sizes={"moe_intermediate_size": 24},
        said="moe_intermediate_size = 24 into multiples of 8",
    ),
    "no-plan": Unfit(model_type="qwen3", plan={}, said="plan for qwen3 has no layers"),
    "other-plan": Unfit(
        model_type="qwen3",
        plan={"model.layers.*.mlp": "sequence_parallel"},
        said="plan for qwen3 has styles not known here (sequence_parallel)",
    ),
}
PASSES = ("passes", "tokens", "length_mean")
"""What depends on how a batch is cut: an empty pack has two tokens."""


def config(bundle: Path, **train: Any) -> Config:
    train = {"tokens_per_microbatch": MAX_TOKENS, "learning_rate": RATE, "warmup_steps": 0, **train}
    algorithm = {"name": "vtrace", "entropy_coefficient": 0.01}
    return config_of(bundle, train=train, algorithm=algorithm)


def train_and_save(bundle: Path, out: Path, ranks: Ranks) -> None:
    """Leaves in `out` what was computed, what the ranks hold, and a checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    settings = config(bundle, activation_checkpointing=ranks.tensor_size == ranks.world_size)
    policy = load_policy(settings, ranks, critic=True)
    optimizer = Optimizer(list(policy.parameters()), settings.learner.train)
    made = samples(NUM_SAMPLES, VOCAB_SIZE)
    output = frozen_output(policy, pack(made[:3], ranks.device))
    found = {"logprobs": output.logprobs_N.numpy()}
    measured = accumulate(policy, Batch(sequences=made, learning_rate=RATE), MAX_TOKENS, ranks)
    for name, parameter in policy.checkpoint_parameters():
        found[f"gradient/{name}"] = parameter.grad.full_tensor().numpy().copy()
    figures = {"supervised_loss": measured.loss, "supervised_norm": optimizer.step(RATE)}
    # The shares differ in size, and with them the numbers of micro-batches.
    played = episodes(NUM_SAMPLES, VOCAB_SIZE)
    share = (played[:9], played[9:])[ranks.data_rank] if ranks.data_size == 2 else played
    header = batch_pb2.BatchHeader(num_sampled_tokens=sum(e.num_sampled for e in played))
    updater = updater_of(policy, optimizer, settings, ranks)
    figures |= updater.update(share, header, Clock())
    found |= state_of(policy, optimizer)
    np.savez(out / f"found{ranks.rank}.npz", **found)
    (out / f"figures{ranks.rank}.json").write_text(json.dumps(figures))
    slices = {f"{s.name}@{s.start}": s.values.numpy() for s in shard_slices(policy, ranks)}
    np.savez(out / f"shard{ranks.rank}.npz", **slices)
    checkpoints = Checkpoints(out / "checkpoints", ranks, keep=1)
    state = TrainerState(
        num_updates=2,
        num_failures=0,
        last_version=1,
        trainer_epoch=1,
        run="test",
        ledger_digest="00" * 32,
    )
    checkpoints.save(2, policy, optimizer, state)
    assert isinstance(checkpoints.finish(), Saved)


def state_of(policy: Policy, optimizer: Optimizer) -> dict[str, np.ndarray]:
    """Weights and moments, gathered, and the weights as the checkpoint's tensors."""
    found = {}
    for name, parameter in policy.trained_parameters():
        for kind, value in {"weight": parameter, **optimizer.moments(parameter)}.items():
            tensor = value.detach()
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found[f"{kind}/{name}"] = whole.numpy().copy()
    for name, parameter in policy.checkpoint_parameters():
        whole = parameter.detach().full_tensor().contiguous()
        for tensor_name, tensor in checkpoint_tensors(policy, name, whole).items():
            found[f"published/{tensor_name}"] = tensor.numpy().copy()
    return found


def load_from(bundle: Path, theirs: Path, out: Path, ranks: Ranks) -> None:
    """Load a checkpoint of another layout; leaves in `out` what the ranks hold then."""
    settings = config(bundle)
    policy = load_policy(settings, ranks, critic=True)
    optimizer = Optimizer(list(policy.parameters()), settings.learner.train)
    assert load_latest(theirs / "checkpoints", policy, optimizer, ranks)
    state = state_of(policy, optimizer)
    if ranks.rank == 0:
        np.savez(out / f"from-{theirs.name}.npz", **state)


def work(folder: Path, cases: tuple[Case, ...], layout: str, ranks: Ranks) -> None:
    """All of one layout, after those before it."""
    for case in cases:
        bundle, out = folder / "bundles" / case.name, folder / case.name / layout
        train_and_save(bundle, out, ranks)
        for other in list(LAYOUTS)[: list(LAYOUTS).index(layout)]:
            load_from(bundle, out.with_name(other), out, ranks)
        if layout == "1x2":
            save_model(load(bundle, ranks), bundle, out / "model", "float32", ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what each layout left of each case."""
    root = tmp_path_factory.mktemp("tensor")
    for case in CASES:
        case.make_bundle(root / "bundles")
    with joined() as ranks:
        work(root, CASES, "1x1", ranks)
    done = run_python(__file__, str(root), seconds=400)
    assert done.returncode == 0, done.stdout + done.stderr
    with joined() as ranks:
        for case, layout in layouts():
            out = root / case.name / "1x1"
            load_from(root / "bundles" / case.name, out.with_name(layout), out, ranks)
    return root


def refuse_all(folder: Path, ranks: Ranks) -> None:
    """Leaves what each model that cannot be divided is refused with."""
    (folder / "refused").mkdir(exist_ok=True)
    for name, unfit in UNFIT.items():
        sizes = {**SIZES, **unfit.sizes}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(unfit.model_type, **sizes))
        if unfit.plan is not None:
            model.tp_plan = dict(unfit.plan)
        assert ranks.tensor_mesh is not None
        try:
            parallelize(model, ranks.tensor_mesh)
        except ConfigError as error:
            (folder / "refused" / f"{name}-{ranks.rank}").write_text(str(error))


def layouts() -> list[tuple[Case, str]]:
    """All but one rank."""
    return [*((case, "1x2") for case in CASES), *itertools.product(SOME, ("2x1", "2x2"))]


def named(cases: list[tuple[Case, str]]) -> Any:
    """Parametrise over cases and layouts."""
    ids = [f"{case.name}-{layout}" for case, layout in cases]
    return pytest.mark.parametrize(("case", "layout"), cases, ids=ids)


def found_by(folder: Path, case: Case, layout: str, rank: int = 0) -> Mapping[str, np.ndarray]:
    return dict(np.load(folder / case.name / layout / f"found{rank}.npz"))


def assert_near(one: np.ndarray, other: np.ndarray, name: str, least: float = 0.0) -> None:
    """Within 1e-5 of the tensor's size: rounding differs where sums are taken in another order."""
    apart, size = np.linalg.norm(one - other), np.linalg.norm(one)
    assert apart <= max(1e-5 * size, least * one.size**0.5), f"{name}: {apart / size:.1e}"


@named(layouts())
def test_a_grid_computes_and_learns_what_one_rank_does(
    folder: Path, case: Case, layout: str
) -> None:
    one, grid = (found_by(folder, case, name) for name in ("1x1", layout))
    assert one.keys() == grid.keys()
    for name, expected in one.items():
        if name.startswith(("logprobs", "gradient/")):
            assert_near(expected, grid[name], name)
        if name.startswith("weight/"):
            # AdamW moves a bias from 0 by its rate, be the gradient nothing but rounding.
            assert_near(expected, grid[name], name, least=1e-3 * RATE)
    start = load_start(folder, case)
    moved = [np.abs(one[f"published/{name}"] - start[name]).max() for name in start]
    assert min(moved) > 0


def load_start(folder: Path, case: Case) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "bundles" / case.name / "model.safetensors")


@named(layouts())
def test_a_grid_measures_what_one_rank_does(folder: Path, case: Case, layout: str) -> None:
    def read(name: str, rank: int) -> dict[str, float]:
        figures: dict[str, float] = json.loads(
            (folder / case.name / name / f"figures{rank}.json").read_text()
        )
        return figures

    one, grid = read("1x1", 0), read(layout, 0)
    assert one.keys() == grid.keys()
    for name in one.keys() - {*PASSES}:
        assert grid[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
    assert one["value_loss"] > 0
    for rank in range(1, LAYOUTS[layout]):  # by which ranks decide alike
        assert read(layout, rank) == grid


@named(layouts())
def test_published_slices_cover_each_tensor_once(folder: Path, case: Case, layout: str) -> None:
    state = found_by(folder, case, layout)
    tensors = {k.removeprefix("published/"): v for k, v in state.items() if "published/" in k}
    assert tensors.keys() == load_start(folder, case).keys()
    covered = {name: np.zeros(tensor.size, int) for name, tensor in tensors.items()}
    for rank in range(LAYOUTS[layout]):
        for key, values in np.load(folder / case.name / layout / f"shard{rank}.npz").items():
            name, _, start = key.rpartition("@")
            here = slice(int(start), int(start) + values.size)
            covered[name][here] += 1
            np.testing.assert_array_equal(tensors[name].ravel()[here], values, err_msg=key)
    assert all((times == 1).all() for times in covered.values())


@named(layouts())
def test_slices_of_a_rank_are_one_a_tensor(folder: Path, case: Case, layout: str) -> None:
    """Not one a row, where tensor ranks have columns."""
    for rank in range(LAYOUTS[layout]):
        shard = np.load(folder / case.name / layout / f"shard{rank}.npz")
        names = [key.rpartition("@")[0] for key in shard]
        assert len(names) == len({*names})


def loads() -> list[tuple[Case, str, str]]:
    """Case, layout that saved, layout that loaded."""
    pairs = [("1x1", "1x2"), ("1x2", "1x1")]
    more = [("1x1", "2x1"), ("1x2", "2x1"), ("2x1", "1x2"), ("2x1", "1x1")]
    more += [("1x1", "2x2"), ("1x2", "2x2"), ("2x1", "2x2"), ("2x2", "1x1")]
    return [(c, *p) for c in CASES for p in pairs] + [(c, *p) for c in SOME for p in more]


@pytest.mark.parametrize(
    ("case", "saved", "loaded"), loads(), ids=[f"{c.name}-{s}-{to}" for c, s, to in loads()]
)
def test_a_checkpoint_is_the_same_in_any_layout(
    folder: Path, case: Case, saved: str, loaded: str
) -> None:
    theirs = found_by(folder, case, saved)
    ours = np.load(folder / case.name / loaded / f"from-{saved}.npz")
    for name in ours:
        np.testing.assert_array_equal(theirs[name], ours[name], err_msg=name)
    assert any(name.startswith("exp_avg_sq/") for name in ours)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_saved_model_is_the_one_that_was_loaded(folder: Path, case: Case) -> None:
    from safetensors.numpy import load_file

    start = load_start(folder, case)
    saved = load_file(folder / case.name / "1x2" / "model" / "model.safetensors")
    assert saved.keys() == start.keys()
    for name in saved:
        np.testing.assert_array_equal(saved[name], start[name], err_msg=name)


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_cannot_be_divided_is_refused_by_name(folder: Path, name: str) -> None:
    for rank in range(2):
        refusal = (folder / "refused" / f"{name}-{rank}").read_text()
        assert refusal.startswith("learner.train.tensor_parallel = 2")
        assert UNFIT[name].said in refusal
        assert "set it to 1" in refusal


@pytest.mark.parametrize(
    ("learner", "said"),
    [
        ({"ranks": 3}, "does not divide ranks = 3; set ranks to a multiple"),
        ({"ranks": 2, "train": {"offload": True}}, "train.offload = true do not go together"),
        ({"ranks": 2, "train": {"compile": True}}, "train.compile = true do not go together"),
    ],
)
def test_a_configuration_that_does_not_work_is_refused(learner: dict[str, Any], said: str) -> None:
    train = {"tensor_parallel": 2, **learner.get("train", {})}
    with pytest.raises(ValueError, match=said):
        Config.model_validate({"model": {"path": "m"}, "learner": {**learner, "train": train}})


def test_ranks_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide the 1 ranks that were started"):
        joined(2).__enter__()


def be_ranks(num: int, root: Path) -> None:
    """Fork ranks, which have all imports behind them, and wait for them."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_WORLD_SIZE": "1"}
    children = []
    for rank in range(num):
        if not (child := os.fork()):
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num)}
            be_rank(root)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise SystemExit(f"the ranks ended with the wait statuses {statuses}")


def be_rank(root: Path) -> None:
    """One rank of a grid with tensor groups of two, and of one without. Never returns."""
    code = 1
    try:
        with joined(2) as ranks:
            if ranks.world_size == 2:
                refuse_all(root, ranks)
                work(root, CASES, "1x2", ranks)
                work(root, SOME, "2x1", replace(ranks, grid=None))
                for case in SOME:
                    out = root / case.name / "1x2"
                    load_from(root / "bundles" / case.name, out.with_name("2x1"), out, ranks)
            else:
                work(root, SOME, "2x2", ranks)
        code = 0
    except BaseException:
        traceback.print_exc()
    leave(code)


if __name__ == "__main__":
    faulthandler.enable()
    for size in (2, 4):
        be_ranks(size, Path(sys.argv[1]))
