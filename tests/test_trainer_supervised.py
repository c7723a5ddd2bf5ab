"""The supervised stage, from demonstrations to a model folder."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from envserver.suites.practice.demonstrate import demonstrations
from learner.trainer.checkpoints import list_checkpoints, step_of
from learner.trainer.supervised import learning_rates
from understudy.config import SupervisedConfig

from trainer_helpers import ROOT, run_python, tiny_bundle, torchrun  # isort: skip

STEPS, MORE_STEPS = 20, 40
LAST = STEPS + MORE_STEPS


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supervised")
    for name, carelessness in (("exact", 0.0), ("careless", 0.3)):
        lines = demonstrations(200, 1, carelessness, mix=(1, 0, 0))
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    file = folder / "run.toml"
    file.write_text(
        f"""
        [model]
        path = "{tiny_bundle(folder / "bundle")}"
        dtype = "float32"
        tools = "signatures"
        [learner]
        train = {{ tokens_per_microbatch = 512 }}
        [learner.supervised]
        batch_size = 8
        warmup_steps = 5
        [[learner.supervised.phases]]
        data = "{folder}/exact.jsonl"
        steps = {STEPS}
        learning_rate = 3e-3
        [[learner.supervised.phases]]
        data = "{folder}/careless.jsonl"
        steps = {MORE_STEPS}
        learning_rate = 1e-3
        """
    )
    return file


@pytest.fixture(scope="module")
def lines(config: Path) -> list[dict]:
    """Progress of a run of one rank under plain python."""
    done = run_python(*stage(config, config.parent / "one"))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def stage(config: Path, out: Path) -> list[str]:
    module = ("-m", "learner.trainer.main", "--stage", "supervised")
    return [*module, "--config", str(config), "--out", str(out)]


def test_loss_falls(lines: list[dict], config: Path) -> None:
    assert [line["step"] for line in lines] == list(range(10, LAST + 1, 10))
    assert all(line["stage"] == "supervised" and line["steps"] == LAST for line in lines)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert (config.parent / "one" / "model.safetensors").exists()


def test_two_ranks_lose_what_one_does(lines: list[dict], config: Path) -> None:
    printed = torchrun(2, *stage(config, config.parent / "two"))
    other = [json.loads(line) for line in printed.splitlines()]
    assert [x["loss"] for x in other] == pytest.approx([x["loss"] for x in lines], rel=1e-2)
    assert other[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-4)


def test_a_stage_that_was_cut_off_goes_on_from_its_checkpoint(
    lines: list[dict], config: Path
) -> None:
    """Killed after its checkpoint of step 20; the rest is what it would have been."""
    out = config.parent / "resumed"
    words = [sys.executable, *stage(config, out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        folder = out.with_name("resumed.checkpoints") / "step-00000020"
        while process.poll() is None and not folder.exists():
            time.sleep(0.005)
        process.kill()
    assert not out.exists(), "it was too fast to be killed"
    first = step_of(list_checkpoints(folder.parent)[0])
    assert 20 <= first < LAST
    other = run_python(*stage(config, out), "--set", "run.seed=5")
    assert "is of a stage with another learner.supervised, run.seed or data" in other.stderr
    done = run_python(*stage(config, out))
    assert done.returncode == 0, done.stderr
    rest = [json.loads(line) for line in done.stdout.splitlines()]
    assert [x["loss"] for x in rest] == [x["loss"] for x in lines if x["step"] > first]
    one, other = (load_file(path / "model.safetensors") for path in (config.parent / "one", out))
    assert all((one[name] == other[name]).all() for name in one)
    assert not folder.parent.exists()


def test_a_missing_file_is_named(config: Path) -> None:
    phases = 'learner.supervised.phases=[{data="none.jsonl", steps=1, learning_rate=1.0}]'
    done = run_python(*stage(config, config.parent / "none"), "--set", phases)
    assert done.returncode == 1
    assert "demonstrations none.jsonl: No such file" in done.stderr


def test_a_phase_that_names_a_rate_begins_a_schedule() -> None:
    phases = [
        {"data": "a", "steps": 3, "learning_rate": 1.0},
        {"data": "b", "steps": 2},
        {"data": "c", "steps": 3, "learning_rate": 0.5},
    ]
    config = SupervisedConfig.model_validate({"phases": phases, "warmup_steps": 1})
    rates = list(learning_rates(config))
    assert len(rates) == 8
    assert rates[0] == 0.5
    assert rates[1] == 1.0
    assert rates[4] == pytest.approx(0.1)
    assert rates[5] == 0.25
    assert rates[6] == 0.5
    assert rates[7] == pytest.approx(0.05)


def test_the_first_phase_needs_a_rate() -> None:
    with pytest.raises(ValueError, match=r"phases\[0\].learning_rate"):
        SupervisedConfig.model_validate({"phases": [{"data": "a", "steps": 1}]})
