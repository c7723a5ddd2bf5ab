"""Batches that do not fit the memory: split finer, and tried again.

A pass that runs out of memory leaves ranks half-way through collectives, from which there is no way
back. So the trainer notes a smaller limit in the run's folder and ends; torchrun starts it again,
and it gets the same batch.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from learner.trainer.ranks import Ranks
from understudy.errors import UnderstudyError
from understudy.files import write_durably

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


class OutOfMemoryError(UnderstudyError):
    """A pass did not fit."""


def token_limit(folder: Path, configured: int, ranks: Ranks) -> int:
    """Most tokens of a pass: what is configured, or less if that did not fit before."""
    path = _file(folder, ranks)
    noted = int(path.read_text()) if path.exists() else configured
    return int(-ranks.max([-min(noted, configured)])[0])


def _file(folder: Path, ranks: Ranks) -> Path:
    return folder / f"tokens-per-microbatch-rank-{ranks.rank}"


@contextlib.contextmanager
def noting_what_fits(folder: Path, limit: int, ranks: Ranks) -> Iterator[None]:
    """Halve the run's limit if the body runs out of memory.

    Raises:
        OutOfMemoryError: it did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not any(sign in text for sign in _SIGNS):
            raise
        half = max(limit // 2, 1)
        write_durably(_file(folder, ranks), [f"{half}\n".encode()])
        raise OutOfMemoryError(
            f"passes of at most {limit} tokens do not fit the memory; the next start takes {half}. "
            "An episode is never cut: if one alone does not fit, set learner.train."
            "activation_checkpointing = true, or lower learner.tasks.max_tokens"
        ) from error
