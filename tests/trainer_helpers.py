"""A tiny bundle and made-up experience for the trainer's tests."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from envserver.suites.practice.demonstrate import demonstrations
from learner.trainer.experience import Sample
from learner.trainer.scratch import make_bundle

ROOT = Path(__file__).parents[1]
NUM_DEMONSTRATIONS = 64


def tiny_bundle(folder: Path) -> Path:
    """A small model with random weights."""
    make_bundle(list(demonstrations(NUM_DEMONSTRATIONS, seed=1)), folder, seed=1)
    return folder


def samples(num: int, vocab_size: int, version: int = 1) -> list[Sample]:
    """Sequences of different lengths in which two runs of tokens were sampled."""
    rng = np.random.default_rng(11)
    made = []
    for _ in range(num):
        length = int(rng.integers(8, 60))
        mask = np.zeros(length, bool)
        mask[3:6] = mask[length // 2 + 2 :] = True
        made.append(
            Sample(
                token_ids=rng.integers(vocab_size, size=length, dtype="i4"),
                loss_mask=mask,
                behaviour_logprobs=-rng.exponential(6.0, int(mask.sum())).astype("f4"),
                versions=np.full(int(mask.sum()), version),
                advantage=float(rng.normal()),
            )
        )
    return made


def torchrun(num_ranks: int, *arguments: str) -> str:
    """Run ranks as the launcher does, and return what they print."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks))
    done = run_python(*launcher, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on one thread, from the repository's root."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
