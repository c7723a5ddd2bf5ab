"""Turns the files that all ranks have written into a checkpoint, and removes old ones: rank 0."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from learner.trainer.checkpoints.manifest import (
    STAGING_SUFFIX,
    Manifest,
    list_checkpoints,
    write_manifest,
)
from understudy import failpoints
from understudy.errors import ConfigError
from understudy.files import sync

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint is durable."""

    step: int
    manifest_digest: str
    """SHA-256 in hexadecimal, as `Checkpoint.digest`."""


def prepare(folder: Path) -> None:
    """Make the folder of all checkpoints and remove what a crash left in it.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)
        for leftover in folder.glob(f"*{STAGING_SUFFIX}"):
            shutil.rmtree(leftover)
    except OSError as error:
        raise ConfigError(
            f"run.directory: {folder} cannot be written ({error.strerror}); choose another"
        ) from None


def commit(staging: Path, manifest: Manifest, keep: int) -> Saved:
    """Make a checkpoint of what all ranks have written, durably."""
    failpoints.hit("checkpoint.after_shards")
    for name, record in manifest.files.items():
        if (staging / name).stat().st_size != record.num_bytes:
            raise OSError(f"{staging / name} does not have {record.num_bytes} bytes")
    digest = write_manifest(staging, manifest)
    sync(staging)
    failpoints.hit("checkpoint.after_manifest")
    final = staging.with_suffix("")
    if final.exists():  # a damaged one that the run went back behind
        _remove(final)
    staging.rename(final)
    failpoints.hit("checkpoint.after_rename")
    sync(final.parent)
    _remove_others(final, keep)
    return Saved(step=manifest.step, manifest_digest=digest)


def _remove_others(final: Path, keep: int) -> None:
    """Remove what is too old, and what is of later steps, which the run went back behind."""
    everything = list_checkpoints(final.parent)
    index = everything.index(final)
    for path in everything[:index] + everything[index + keep :]:
        _remove(path)


def _remove(checkpoint: Path) -> None:
    doomed = checkpoint.with_name(f"{checkpoint.name}.old{STAGING_SUFFIX}")
    try:
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        _log.warning("old checkpoint %s was not removed: %s", checkpoint, error)
