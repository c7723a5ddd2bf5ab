"""Training checkpoints: bit-equal after any restart, whole after any crash. Also their programs.

A trainer without an intake takes updates, saves, and goes on; what a resumed one holds and does is
compared with what the first held and did, bit by bit.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.distributed.tensor import DTensor

from learner.trainer.checkpoints import (
    Checkpoint,
    Checkpoints,
    DamagedCheckpointError,
    Failed,
    Saved,
    TrainerState,
    list_checkpoints,
    load,
    load_latest,
    read_checkpoint,
)
from learner.trainer.checkpoints.parts import copy_part
from learner.trainer.main import leave
from learner.trainer.model import load_policy
from learner.trainer.optimizer import Optimizer
from learner.trainer.ranks import Ranks, joined
from learner.trainer.report import Clock
from understudy import failpoints
from understudy.errors import ConfigError
from understudy.v1 import batch_pb2

from trainer_helpers import (  # isort: skip
    config_of,
    episodes,
    run_python,
    tiny_bundle,
    torchrun,
    updater_of,
)

SAVED_STEP, LAST_STEP, SAMPLES_A_STEP = 2, 5, 6
FAILPOINTS = {
    "checkpoint.after_shards": 1,
    "checkpoint.after_manifest": 1,
    "checkpoint.after_rename": 2,
}
"""-> the step to resume from, when step 2 was being saved and step 1 had been."""


class Training:
    """A policy that learns from made-up batches, the same at every rank count."""

    def __init__(self, bundle: Path, ranks: Ranks, dtype: str = "float32", **train: Any) -> None:
        train = {"tokens_per_microbatch": 128, "learning_rate": 1e-3, **train}
        config = config_of(bundle, dtype, train=train, algorithm={"name": "vtrace"})
        self.ranks = ranks
        self.policy = load_policy(config, ranks, critic=True)
        self.optimizer = Optimizer(list(self.policy.parameters()), config.learner.train)
        self.updater = updater_of(self.policy, self.optimizer, config, ranks)
        self.episodes = episodes(
            LAST_STEP * SAMPLES_A_STEP, self.policy.language_model.config.vocab_size
        )

    def update(self, step: int) -> None:
        made = self.episodes[step * SAMPLES_A_STEP : (step + 1) * SAMPLES_A_STEP]
        header = batch_pb2.BatchHeader(num_sampled_tokens=sum(e.num_sampled for e in made))
        share = made[self.ranks.rank :: self.ranks.world_size]
        self.updater.update(share, header, Clock())

    def state(self) -> TrainerState:
        return TrainerState(
            num_updates=self.updater.num_updates,
            num_failures=self.updater.num_failures,
            last_version=7,
            trainer_epoch=3,
            run="test",
            ledger_digest="ab" * 32,
        )

    def save(self, checkpoints: Checkpoints, step: int) -> Saved | Failed | None:
        return checkpoints.save(step, self.policy, self.optimizer, self.state())

    def load_latest(self, folder: Path) -> Checkpoint | None:
        checkpoint = load_latest(folder, self.policy, self.optimizer, self.ranks)
        if checkpoint:
            self.updater.num_updates = checkpoint.manifest.state.num_updates
        return checkpoint

    def whole(self) -> dict[str, np.ndarray]:
        """Weights and optimizer state, gathered."""
        found = {}
        for name, parameter in self.policy.trained_parameters():
            for kind, value in {"weight": parameter, **self.optimizer.moments(parameter)}.items():
                tensor = value.detach()
                tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
                found[f"{kind}/{name}"] = tensor.numpy().copy()
        return found


def run_and_resume(bundle: Path, out: Path, ranks: Ranks) -> None:
    """Save in the middle of a run; then resume in its place. Leaves what each held in `out`."""
    torch.manual_seed(100 + ranks.rank)
    first = Training(bundle, ranks)
    checkpoints = Checkpoints(out / "checkpoints", ranks, keep=2)
    for step in range(SAVED_STEP):
        first.update(step)
    first.save(checkpoints, SAVED_STEP)
    random = torch.rand(8).numpy()
    dump(out / "saved", first.whole(), ranks)
    polled = []
    for step in range(SAVED_STEP, LAST_STEP):
        polled.append(checkpoints.poll())
        first.update(step)
    outcomes = [outcome for outcome in [*polled, checkpoints.finish()] if outcome]
    assert [type(outcome) for outcome in outcomes] == [Saved]
    assert checkpoints.poll() is None
    dump(out / "end", first.whole(), ranks)

    torch.manual_seed(5)
    second = Training(bundle, ranks)
    loaded = second.load_latest(out / "checkpoints")
    assert loaded is not None
    assert loaded.digest == outcomes[0].manifest_digest
    assert loaded.manifest.state == first.state().model_copy(update={"num_updates": SAVED_STEP})
    np.testing.assert_array_equal(torch.rand(8).numpy(), random)
    dump(out / "loaded", second.whole(), ranks)
    for step in range(SAVED_STEP, LAST_STEP):
        second.update(step)
    dump(out / "resumed", second.whole(), ranks)


def load_elsewhere(bundle: Path, folder: Path, out: Path, ranks: Ranks) -> None:
    """Load the checkpoint of another number of ranks."""
    training = Training(bundle, ranks)
    assert training.load_latest(folder) is not None
    dump(out, training.whole(), ranks)


def fail_on_one_rank(bundle: Path, out: Path, ranks: Ranks) -> None:
    """A rank cannot write its file: no rank's checkpoint counts, and the next one succeeds."""
    training = Training(bundle, ranks)
    checkpoints = Checkpoints(out, ranks, keep=2)
    obstacle = out / "step-00000001.tmp" / "rank-00001.safetensors"
    obstacle.mkdir(parents=True, exist_ok=True)
    ranks.max([0])
    training.save(checkpoints, 1)
    failed = checkpoints.finish()
    assert isinstance(failed, Failed)
    assert ("directory" in failed.reason) == (ranks.rank == 1)
    assert list(out.iterdir()) == []
    ranks.max([0])
    training.save(checkpoints, 1)
    assert isinstance(checkpoints.finish(), Saved)


def crash_everywhere(bundle: Path, out: Path) -> None:
    """Let a child of this process die at each failpoint, and print what ended it."""
    for name in FAILPOINTS:
        child = os.fork()
        if child == 0:
            os.environ["UNDERSTUDY_FAILPOINT"] = f"{name}:2"
            importlib.reload(failpoints)
            with joined() as ranks:
                save_twice(bundle, out / name, ranks)
            leave(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status) * -1)


def save_twice(bundle: Path, out: Path, ranks: Ranks) -> None:
    """Leaves checkpoints of steps 1 and 2, and what the trainer held."""
    training = Training(bundle, ranks)
    checkpoints = Checkpoints(out / "checkpoints", ranks, keep=1)
    for step in (1, 2):
        training.update(step)
        dump(out / str(step), training.whole(), ranks)
        training.save(checkpoints, step)
        checkpoints.finish()


def dump(path: Path, arrays: Mapping[str, np.ndarray], ranks: Ranks) -> None:
    if ranks.rank == 0:
        np.savez(path.with_suffix(".npz"), **arrays)


def assert_equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("model") / "bundle")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as only:
        yield only


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, bundle: Path, ranks: Ranks
) -> dict[str, dict[str, Mapping[str, np.ndarray]]]:
    """What runs of one rank, in this process, and of two ranks have held: rank count -> dumps."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = folder / "1", folder / "2"
    one.mkdir()
    two.mkdir()
    run_and_resume(bundle, one, ranks)
    torchrun(2, __file__, "ranks", str(bundle), str(one), str(two))
    load_elsewhere(bundle, two / "checkpoints", one / "elsewhere", ranks)
    return {
        path.name: {"folder": path, **{f.stem: np.load(f) for f in path.glob("*.npz")}}
        for path in (one, two)
    }


@pytest.mark.parametrize("num", ["1", "2"])
def test_a_resumed_run_ends_where_the_other_ended(runs: dict[str, Any], num: str) -> None:
    found = runs[num]
    assert_equal(found["saved"], found["loaded"])
    assert_equal(found["end"], found["resumed"])
    apart = [np.abs(found["end"][name] - found["saved"][name]).max() for name in found["end"]]
    assert min(apart) > 0  # it did learn in between


@pytest.mark.parametrize(("here", "there"), [("1", "2"), ("2", "1")])
def test_another_number_of_ranks_loads_the_same(
    runs: dict[str, Any], here: str, there: str
) -> None:
    assert_equal(runs[there]["saved"], runs[here]["elsewhere"])
    assert {"weight/value_head.weight", "exp_avg/value_head.bias"} <= set(runs[there]["saved"])


@pytest.mark.parametrize("num", [1, 2])
def test_a_checkpoint_is_safetensors_and_json(runs: dict[str, Any], num: int) -> None:
    (folder,) = list_checkpoints(runs[str(num)]["folder"] / "checkpoints")
    files = {path.name: path for path in folder.rglob("*")}
    shards = {f"rank-{rank:05d}.safetensors" for rank in range(num)}
    assert set(files) == {*shards, "manifest.json"}
    assert json.loads(files["manifest.json"].read_text())["manifest"]["world_size"] == num
    for name in shards:
        tensors = load_file(files[name])
        assert {kind.partition("/")[0] for kind in tensors} == {
            *("weight", "exp_avg", "exp_avg_sq", "step"),
            "generator",
        }


def test_what_one_rank_cannot_write_fails_on_all(runs: dict[str, Any]) -> None:
    assert [path.name for path in list_checkpoints(runs["2"]["folder"] / "failing")] == [
        "step-00000001"
    ]


def test_a_crash_leaves_the_old_checkpoint_or_the_new_one(
    bundle: Path, ranks: Ranks, tmp_path: Path
) -> None:
    done = run_python(__file__, "crash", str(bundle), str(tmp_path))
    assert done.stdout.split() == ["9"] * len(FAILPOINTS), done.stderr
    training = Training(bundle, ranks)
    for name, step in FAILPOINTS.items():
        out = tmp_path / name
        left = [path.name for path in (out / "checkpoints").iterdir()]
        assert len(left) == 2, left
        checkpoints = Checkpoints(out / "checkpoints", ranks, keep=1)
        assert not list((out / "checkpoints").glob("*.tmp"))
        loaded = training.load_latest(out / "checkpoints")
        assert loaded is not None
        assert loaded.manifest.step == step, name
        assert_equal(training.whole(), np.load(out / f"{step}.npz"))
        training.save(checkpoints, 3)
        assert isinstance(checkpoints.finish(), Saved)
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.fixture(scope="module")
def two_saved(
    tmp_path_factory: pytest.TempPathFactory, bundle: Path, ranks: Ranks
) -> tuple[Path, Training]:
    """A folder with checkpoints of steps 1 and 2, and who saved them."""
    training = Training(bundle, ranks)
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, ranks, keep=2)
    for step in (1, 2):
        training.update(step)
        training.save(checkpoints, step)
        checkpoints.finish()
    return folder, training


def test_what_is_to_be_written_stays_as_it_was(two_saved: tuple[Path, Training]) -> None:
    training = two_saved[1]
    part = copy_part(training.policy, training.optimizer, training.ranks)
    before = training.whole()
    training.update(3)
    for name, whole in before.items():
        np.testing.assert_array_equal(part.tensors[name].numpy(), whole.ravel(), err_msg=name)


def flip(path: Path, position: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda folder: flip(folder / "rank-00000.safetensors", 0.5), "rank-00000.safetensors"),
        (lambda folder: flip(folder / "rank-00000.safetensors", 0.0), "rank-00000.safetensors"),
        (lambda folder: (folder / "rank-00000.safetensors").unlink(), "rank-00000.safetensors"),
        (lambda folder: os.truncate(folder / "rank-00000.safetensors", 9), "rank-00000"),
        (lambda folder: flip(folder / "manifest.json", 0.5), "manifest.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json"),
    ],
    ids=["bit", "length", "missing", "cut", "manifest-bit", "manifest-missing", "no-manifest"],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_loads(
    two_saved: tuple[Path, Training],
    tmp_path: Path,
    damage: Callable[[Path], object],
    name: str,
) -> None:
    saved, training = two_saved
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    newest, before = list_checkpoints(folder)
    damage(newest)
    with pytest.raises(DamagedCheckpointError, match=rf"step-00000002: {name}.*; remove the"):
        load(read_checkpoint(newest), training.policy, training.optimizer, training.ranks)
    loaded = training.load_latest(folder)
    assert loaded is not None
    assert loaded.folder == before


def test_without_a_checkpoint_nothing_is_loaded(
    two_saved: tuple[Path, Training], tmp_path: Path
) -> None:
    assert two_saved[1].load_latest(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("ours", "refusal"),
    [
        ({"dtype": "bfloat16"}, r"model\.dtype = bfloat16, but .* saved with float32; set"),
        ({"betas": (0.9, 0.99)}, r"learner\.train\.betas = \(0\.9, 0\.99\), but .*\(0\.9, 0\.95\)"),
        ({"weight_decay": 0.1}, r"learner\.train\.weight_decay = 0\.1, but .* saved with 0\.0"),
    ],
)
def test_another_configuration_is_refused(
    two_saved: tuple[Path, Training], bundle: Path, ours: dict[str, Any], refusal: str
) -> None:
    folder, training = two_saved
    other = Training(bundle, training.ranks, **ours)
    with pytest.raises(ConfigError, match=refusal):
        other.load_latest(folder)


@pytest.mark.parametrize(
    ("theirs", "refusal"),
    [
        ({"architecture": "llama"}, r"model\.path: architecture = qwen3, but .* with llama"),
        (
            {"parameters": {"model.norm.weight": (64,)}},
            r"model\.path: shape of model\.embed_tokens\.weight = \(\d+, 128\), but .* None",
        ),
    ],
)
def test_another_model_is_refused(
    two_saved: tuple[Path, Training], theirs: dict[str, Any], refusal: str
) -> None:
    folder, training = two_saved
    checkpoint = read_checkpoint(list_checkpoints(folder)[0])
    setup = checkpoint.manifest.setup.model_copy(update=theirs)
    checkpoint = replace(
        checkpoint, manifest=checkpoint.manifest.model_copy(update={"setup": setup})
    )
    with pytest.raises(ConfigError, match=refusal):
        load(checkpoint, training.policy, training.optimizer, training.ranks)


def test_the_newest_are_kept(two_saved: tuple[Path, Training], tmp_path: Path) -> None:
    training = two_saved[1]
    checkpoints = Checkpoints(tmp_path, training.ranks, keep=2)
    outcomes = [training.save(checkpoints, step) for step in (1, 2, 30, 4)]
    outcomes.append(checkpoints.finish())
    # Each save waits for the one before and tells what became of it.
    assert [outcome and outcome.step for outcome in outcomes] == [None, 1, 2, 30, 4]
    # The run went back behind step 30: its checkpoint must never be resumed from.
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000002"]


def test_a_step_that_is_saved_again_replaces_its_checkpoint(
    two_saved: tuple[Path, Training], tmp_path: Path
) -> None:
    training = two_saved[1]
    checkpoints = Checkpoints(tmp_path, training.ranks, keep=2)
    for _ in range(2):
        training.save(checkpoints, 1)
        assert isinstance(checkpoints.finish(), Saved)
        flip(tmp_path / "step-00000001" / "manifest.json", 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_before_the_first_step_a_checkpoint_is_the_beginning(
    bundle: Path, ranks: Ranks, tmp_path: Path
) -> None:
    first, second = Training(bundle, ranks), Training(bundle, ranks)
    checkpoints = Checkpoints(tmp_path, ranks, keep=1)
    first.save(checkpoints, 0)
    checkpoints.finish()
    plain = Training(bundle, ranks)
    plain.update(0)
    second.load_latest(tmp_path)
    for resumed in (first, second):
        resumed.update(0)
        assert_equal(plain.whole(), resumed.whole())


def test_a_full_disk_costs_one_checkpoint(two_saved: tuple[Path, Training], tmp_path: Path) -> None:
    training = two_saved[1]
    mount(tmp_path, "size=12m")  # room for one checkpoint of 8.6 MB, not for two
    try:
        checkpoints = Checkpoints(tmp_path, training.ranks, keep=1)
        training.save(checkpoints, 1)
        assert isinstance(checkpoints.finish(), Saved)
        training.save(checkpoints, 2)
        failed = checkpoints.finish()
        assert isinstance(failed, Failed)
        assert "No space left" in failed.reason
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        training.update(3)
        mount(tmp_path, "remount,size=64m")
        training.save(checkpoints, 3)
        assert isinstance(checkpoints.finish(), Saved)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"A FULL DISK WAS NOT TESTED: no tmpfs can be mounted here: {done.stderr}")


def main(mode: str, bundle: Path, *folders: Path) -> None:
    """Two ranks, or the process whose children are to die."""
    torch.set_num_threads(1)
    if mode == "crash":
        crash_everywhere(bundle, folders[0])
        return
    one, two = folders
    with joined() as ranks:
        run_and_resume(bundle, two, ranks)
        load_elsewhere(bundle, one / "checkpoints", two / "elsewhere", ranks)
        fail_on_one_rank(bundle, two / "failing", ranks)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
    leave(0)
