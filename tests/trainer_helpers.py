"""A tiny bundle and made-up experience for the trainer's tests."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from envserver.suites.practice.demonstrate import demonstrations
from learner.trainer.algorithm import Algorithm
from learner.trainer.experience import Episode, Sample
from learner.trainer.model import Policy, load_policy, load_reference
from learner.trainer.optimizer import Optimizer
from learner.trainer.ranks import Ranks
from learner.trainer.scratch import make_bundle
from learner.trainer.update import Updater
from understudy.config import Config

ROOT = Path(__file__).parents[1]
NUM_DEMONSTRATIONS = 64


def tiny_bundle(folder: Path) -> Path:
    """A small model with random weights."""
    make_bundle(list(demonstrations(NUM_DEMONSTRATIONS, seed=1)), folder, seed=1)
    return folder


def samples(num: int, vocab_size: int, staleness: int = 0) -> list[Sample]:
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
                staleness=np.full(int(mask.sum()), staleness),
            )
        )
    return made


def episodes(num: int, vocab_size: int, staleness: int = 0) -> list[Episode]:
    """Episodes of two turns in one segment, the second one rewarded."""
    rng = np.random.default_rng(12)
    return [
        Episode(
            samples=(sample,),
            advantage=float(rng.normal()),
            token_turns=(np.arange(sample.num_targets) >= 3).astype("i4"),
            turn_rewards=np.array([0, rng.integers(2)], "f4"),
            truncated=bool(rng.integers(2)),
        )
        for sample in samples(num, vocab_size, staleness)
    ]


def config_of(bundle: Path, dtype: str = "float32", **learner: Any) -> Config:
    """A run's config with sections of [learner]."""
    raw = {"model": {"path": bundle, "dtype": dtype}, "learner": learner}
    return Config.model_validate(raw)


def load(bundle: Path, ranks: Ranks, dtype: str = "float32") -> Policy:
    """The policy of a bundle."""
    return load_policy(config_of(bundle, dtype), ranks)


def updater_of(policy: Policy, optimizer: Optimizer, config: Config, ranks: Ranks) -> Updater:
    """An updater as a run makes it."""
    return Updater(
        policy,
        optimizer,
        load_reference(config, policy, ranks),
        Algorithm(config.learner.algorithm),
        config,
        ranks,
        config.learner.train.tokens_per_microbatch,
    )


def torchrun(num_ranks: int, *arguments: str) -> str:
    """Run ranks as the launcher does, and return what they print."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks))
    done = run_python(*launcher, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_python(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Python on one thread, from the repository's root, for so many seconds at most."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
