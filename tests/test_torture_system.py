"""A whole run on the scripted engine under kills and a stop; `make torture` does it at length."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from learner.cli import prepare_torchrun
from tests.torture import flood, stops, system

RANK = """
import os, signal, time
from learner.trainer.ranks import joined

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with joined() as ranks:
    if ranks.sum([1.0]) == [2.0] and attempt and ranks.rank == 0:
        print(f"joined in attempt {attempt}", flush=True)
    if attempt == 0:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
"""


@pytest.mark.timeout(180)
def test_a_run_survives_the_kill_of_each_role(tmp_path: Path) -> None:
    result = system.torture(32, 3, tmp_path / "system", every=8, assert_goodput=False)
    print(result.line())
    assert result.violations == []
    assert result.kills == 3
    assert result.figures["stored"] > 0


@pytest.mark.timeout(120)
def test_a_run_goes_on_while_an_actor_stands_and_after_the_intake_stood(tmp_path: Path) -> None:
    for result in stops.torture(5, tmp_path, ("actor-0", "intake")):
        print(result.line())
        assert result.violations == []


@pytest.mark.timeout(120)
def test_memory_of_every_role_is_bounded_while_the_trainer_stands(tmp_path: Path) -> None:
    result = flood.torture(30, tmp_path / "flood")
    print(result.line())
    assert result.violations == []


@pytest.mark.timeout(120)
def test_ranks_find_each_other_at_once_after_one_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    prepare_torchrun()
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "joined in attempt 1" in done.stdout, done.stderr[-2000:]
