"""Runs: what a second start finds, and what a signal leaves."""

import fcntl
import signal
import time
from pathlib import Path

import pytest

from conftest import ROOT
from launch.demo import Demo, DemoPlan
from processes import ANY_PORT, finish, started, understudy
from understudy.errors import ConfigError


def test_the_demo_begins_without_an_older_one_s_results(tmp_path: Path) -> None:
    names = ("metrics.jsonl", "eval-base.json", "result.json", "report.html", "warmup.jsonl")
    (tmp_path / "demo").mkdir()
    for name in names:
        (tmp_path / "demo" / name).touch()
    for name in ("log", "checkpoints"):
        (tmp_path / "demo" / name).mkdir()
    (tmp_path / "demo" / "log" / "lock").touch()
    Demo(plan_in(tmp_path))
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["warmup.jsonl"]


def test_the_demo_spares_a_run_that_is_no_demo_and_a_demo_that_runs(tmp_path: Path) -> None:
    lock = tmp_path / "demo" / "log" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with pytest.raises(ConfigError, match="no finished demo; choose another name"):
        Demo(plan_in(tmp_path))
    (tmp_path / "demo" / "result.json").touch()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="this demo is running"):
            Demo(plan_in(tmp_path))
    assert lock.exists()


def plan_in(folder: Path) -> DemoPlan:
    return DemoPlan(
        seed=0,
        minutes=1,
        control=False,
        name="demo",
        config_file=ROOT / "configs" / "demo.toml",
        overrides=(f"run.directory={folder}",),
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_learner_with_its_code_and_one_line(
    tmp_path: Path, bundle: Path, number: signal.Signals, code: int
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f"run = {{ directory = '{tmp_path}' }}\nmodel = {{ path = '{bundle}' }}\n")
    with started(*understudy("learner", "--config", str(config), *ANY_PORT)) as learner:
        log = tmp_path / "run" / "logs" / "intake.log"
        while not log.exists() or not log.stat().st_size:
            assert learner.poll() is None
            time.sleep(0.02)
        learner.send_signal(number)
        output = finish(learner)
        assert learner.returncode == code, output
    assert len(output.splitlines()) == 1
    assert f"interrupted; what was done is in {tmp_path / 'run'}" in output
