"""The whole loop with real parts: vLLM, two FSDP ranks, practice, four roles as processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.tail import Tail

STEPS = 3
CONFIG = """
[run]
name = "e2e"
directory = "{folder}"

[model]
path = "{folder}/model"
dtype = "float32"
tools = "signatures"

[network]
learner = "127.0.0.1:27000"
inference = ["127.0.0.1:27100"]
envservers = ["127.0.0.1:27200"]

[envserver]
listen = "127.0.0.1:27200"
metrics_listen = "127.0.0.1:27201"

[inference]
listen = "127.0.0.1:27100"
metrics_listen = "127.0.0.1:27101"
max_model_len = 256
max_running = 32
enforce_eager = true
cpu_kv_cache_gib = 0.25

[actor]
metrics_listen = "127.0.0.1:27301"
concurrency = 32

[learner]
listen = "127.0.0.1:27000"
metrics_listen = "127.0.0.1:27001"
trainer_metrics_listen = "127.0.0.1:27002"
ranks = 2

[learner.tasks]
group_size = 4
groups_per_batch = 4
max_new_tokens = 8
max_turns = 2
max_tokens = 200

[learner.train]
steps = {steps}
"""


def run_module(*words: str) -> None:
    subprocess.run([sys.executable, "-m", *words], check=True, timeout=120)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's TOML, with an untrained model made from scratch beside it."""
    folder = tmp_path_factory.mktemp("e2e")
    demonstrations = str(folder / "demonstrations.jsonl")
    run_module("envserver.suites.practice.demonstrate", "--num", "300", "--out", demonstrations)
    run_module(
        *("learner.trainer.scratch", "--text", demonstrations, "--out", str(folder / "model"))
    )
    path = folder / "run.toml"
    path.write_text(CONFIG.format(folder=folder, steps=STEPS))
    return path


def start(config_file: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "understudy.cli", "run", "--config", str(config_file), *words],
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(config_file: Path, kind: str, name: str = "e2e") -> list[dict[str, float]]:
    lines = Tail(config_file.parent / name / "metrics.jsonl").new_lines()
    return [line for line in lines if line["kind"] == kind]


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def assert_all_end(processes: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, timeout=5)
    assert left == []


@pytest.mark.timeout(280)
def test_a_run_trains_to_its_last_step_and_leaves_nothing_behind(config_file: Path) -> None:
    run = start(config_file)
    try:
        _, errors = run.communicate(timeout=270)
    finally:
        run.kill()
    assert run.returncode == 0, errors[-4000:]
    steps = lines_of(config_file, "step")
    assert [step["step"] for step in steps] == list(range(STEPS))
    assert all(step["staleness_max"] <= 1 for step in steps)
    assert len(lines_of(config_file, "version")) == STEPS + 1
    replicas = lines_of(config_file, "replica")
    assert replicas[-1]["version"] >= STEPS
    # fp32 on both sides: trainer and engine agree to rounding.
    assert max(line["mismatch_max"] for line in replicas) < 1e-3
    saved = config_file.parent / "e2e" / "model"
    assert (saved / "model.safetensors").exists()
    assert json.loads((saved / "config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.timeout(200)
def test_ctrl_c_ends_every_process_within_ten_seconds(config_file: Path) -> None:
    run = start(config_file, "--set", "run.name=interrupted", "--set", "learner.train.steps=1000")
    try:
        deadline = time.monotonic() + 150
        while not lines_of(config_file, "step", "interrupted"):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        family = descendants(run.pid)
        assert len(family) >= 6  # envserver, inference and its core, intake, trainer ranks, actor
        os.kill(run.pid, signal.SIGINT)
        sent = time.monotonic()
        run.communicate(timeout=30)
        assert time.monotonic() - sent < 10
        assert run.returncode == 130
        assert_all_end(family)
    finally:
        run.kill()
    assert lines_of(config_file, "step", "interrupted")


@pytest.mark.timeout(280)
def test_a_killed_run_goes_on_where_it_was_and_replays_bit_for_bit(config_file: Path) -> None:
    steps = 6
    words = ["--set", "run.name=killed", "--set", f"learner.train.steps={steps}"]
    words += ["--set", "learner.checkpoint_every_steps=2"]
    run = start(config_file, *words)
    deadline = time.monotonic() + 150
    while len(lines_of(config_file, "step", "killed")) < 3:
        assert run.poll() is None, run.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = [psutil.Process(run.pid), *descendants(run.pid)]
    # vLLM's own processes are left to see by themselves that nobody is there any more.
    engines = [process for process in family if "VLLM" in process.name()]
    assert engines
    for process in family:
        if process not in engines:
            process.kill()
    assert_all_end(family)
    run.communicate()

    run = start(config_file, *words)
    _, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors[-4000:]
    taken = [line["step"] for line in lines_of(config_file, "step", "killed")]
    assert taken[:3] == [0, 1, 2]
    assert taken[-1] == steps - 1
    assert set(taken) == set(range(steps))
    assert 0 < taken.count(2) <= 2
    versions = [line["version"] for line in lines_of(config_file, "version", "killed")]
    assert versions == sorted(set(versions))
    assert versions[-1] <= len(versions) + 1  # the kill may have come before the line of one

    folder = config_file.parent / "killed"
    replayed = subprocess.run(
        [sys.executable, "-m", "understudy.cli", "replay", str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert replayed.returncode == 0, replayed.stderr[-4000:]
    assert "equal, bit for bit" in replayed.stdout
