"""Saves checkpoints beside the training loop.

Ranks agree in `poll`, on the main thread; the writer threads never talk to each other.
"""

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from learner.trainer.checkpoints.commit import Saved, commit, prepare
from learner.trainer.checkpoints.loading import setup_of
from learner.trainer.checkpoints.manifest import (
    FileRecord,
    Manifest,
    Setup,
    TrainerState,
    file_name,
    staging_folder,
)
from learner.trainer.checkpoints.parts import copy_part, write_part
from learner.trainer.model import Policy
from learner.trainer.optimizer import Optimizer
from learner.trainer.ranks import Ranks

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A checkpoint could not be written, and nothing of it is left. The next one may succeed."""

    step: int
    reason: str
    """For people; ranks other than the one that failed do not know more than that."""


@dataclass(frozen=True, kw_only=True)
class _Saving:
    """A save that has not ended."""

    step: int
    state: TrainerState
    setup: Setup
    staging: Path
    written: Future[FileRecord]
    """This rank's file."""
    committed: Future[Saved] | None = None
    """From when all ranks have written. Ranks other than the first have nothing to do for it."""

    @property
    def job(self) -> "Future[FileRecord] | Future[Saved]":
        """What this rank's writer is at, or has just done."""
        return self.committed or self.written


class Checkpoints:
    """Saves a run's checkpoints. All ranks make it and call each method together.

    Args:
        folder: of all checkpoints of the run.
        ranks: all trainer ranks.
        keep: how many of the newest to keep, at least 1.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        assert keep >= 1
        self._folder = folder
        self._ranks = ranks
        self._keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._saving: _Saving | None = None
        if ranks.rank == 0:
            prepare(folder)
        ranks.max([0])  # nobody writes before leftovers are gone

    def save(
        self, step: int, policy: Policy, optimizer: Optimizer, state: TrainerState
    ) -> Saved | Failed | None:
        """Copy this rank's shard and begin to write it.

        Returns:
            What became of the save before, if it had to be waited for.
        """
        earlier = self.finish()
        part = copy_part(policy, optimizer, self._ranks)
        staging = staging_folder(self._folder, step)
        self._saving = _Saving(
            step=step,
            state=state,
            setup=setup_of(policy, optimizer),
            staging=staging,
            written=self._writer.submit(write_part, staging, self._ranks.rank, part),
        )
        return earlier

    def poll(self) -> Saved | Failed | None:
        """Bring a save in progress forward, without waiting for any file.

        Returns:
            What became of it, once and on all ranks at the same call; None if nothing ended.
        """
        saving = self._saving
        if saving is None:
            return None
        busy, failed = self._ranks.max(_progress(saving.job))
        if busy:
            return None
        if failed:
            return self._give_up(saving)
        if saving.committed is None:
            self._saving = self._commit(saving)
            return None
        digest, *_ = self._gather(_bytes(saving.committed.result().manifest_digest))
        self._saving = None
        return Saved(step=saving.step, manifest_digest=_hex(digest))

    def finish(self) -> Saved | Failed | None:
        """Wait for a save in progress and say what became of it."""
        outcome = None
        while self._saving is not None:
            self._saving.job.exception()  # waits
            outcome = self.poll()
        return outcome

    def _commit(self, saving: _Saving) -> _Saving:
        """Tell rank 0 what each rank has written, and let it write the manifest."""
        record = saving.written.result()
        records = self._gather([record.num_bytes, *_bytes(record.sha256)])
        committed: Future[Saved] = Future()
        if self._ranks.rank == 0:
            manifest = Manifest(
                step=saving.step,
                world_size=self._ranks.world_size,
                state=saving.state,
                setup=saving.setup,
                files={
                    file_name(rank): FileRecord(num_bytes=int(size), sha256=_hex(digest))
                    for rank, (size, *digest) in enumerate(records)
                },
            )
            committed = self._writer.submit(commit, saving.staging, manifest, self._keep)
        else:
            committed.set_result(Saved(step=saving.step, manifest_digest="00" * 32))
        return replace(saving, committed=committed)

    def _give_up(self, saving: _Saving) -> Failed:
        error = saving.job.exception()
        reason = str(error) if error else "another rank failed"
        _log.error("checkpoint of step %d was not saved: %s", saving.step, reason)
        if self._ranks.rank == 0:
            shutil.rmtree(saving.staging, ignore_errors=True)
        self._ranks.max([0])  # nobody writes there again before it is gone
        self._saving = None
        return Failed(step=saving.step, reason=reason)

    def _gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of each rank, 0 or more, in order of the ranks."""
        num = len(values)
        row = [0.0] * (num * self._ranks.world_size)
        row[num * self._ranks.rank : num * (self._ranks.rank + 1)] = values
        row = self._ranks.max(row)
        return [row[i : i + num] for i in range(0, len(row), num)]


def _progress(job: Future[FileRecord] | Future[Saved]) -> tuple[bool, bool]:
    """Whether a job runs, and whether it failed as files can; all else is a mistake of ours."""
    if not job.done():
        return True, False
    error = job.exception()
    if error is not None and not isinstance(error, OSError):
        raise error
    return False, error is not None


def _bytes(digest: str) -> list[float]:
    return [float(byte) for byte in bytes.fromhex(digest)]


def _hex(values: Sequence[float]) -> str:
    return bytes(int(value) for value in values).hex()
