"""The trainer's epoch: a fence that rises with every start, so that an older one is refused."""

import os
from pathlib import Path

from learner.trainer.ranks import Ranks
from understudy.config import RunConfig


def next_epoch(run: RunConfig, ranks: Ranks) -> int:
    """The epoch of this start, durable before it is used. Every rank calls it; rank 0 counts."""
    epoch = _count(run.path / "trainer-epoch") if ranks.rank == 0 else 0
    return int(ranks.max([epoch])[0])


def _count(file: Path) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    epoch = int(file.read_text()) + 1 if file.exists() else 1
    staging = file.with_suffix(".tmp")
    with staging.open("w") as stream:
        stream.write(f"{epoch}\n")
        stream.flush()
        os.fsync(stream.fileno())
    staging.replace(file)
    return epoch
