"""A training checkpoint's folder, and what its manifest says.

    <run>/checkpoints/step-00000040/        rank-00000.safetensors ... manifest.json
    <run>/checkpoints/step-00000045.tmp/    one that is being written

A folder under its final name was durable as a whole when it got that name.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from understudy.errors import ConfigError, UnderstudyError
from understudy.files import sync

FORMAT = 3
MANIFEST = "manifest.json"
STAGING_SUFFIX = ".tmp"
_FOLDER = re.compile(r"step-\d{8,}")


class DamagedCheckpointError(UnderstudyError):
    """A checkpoint whose files are not those that were written."""

    def __init__(self, folder: Path, what: str) -> None:
        remedy = "remove the folder to resume from the checkpoint before it"
        super().__init__(f"checkpoint {folder}: {what}; {remedy}")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainerState(_Part):
    """Where training stands, tensors apart. Rank 0's is what the manifest gets."""

    num_updates: int
    """Optimizer steps taken, which the learning rate's schedule goes by."""
    num_failures: int
    """Updates in a row, up to here, without a finite gradient, too many of which end training."""
    last_version: int
    """Newest policy version that was known to be committed."""
    trainer_epoch: int
    """Epoch of the trainer that saved."""
    run: str
    """Name of the run."""
    ledger_digest: str
    """Of the batches that the weights have behind them, as the intake gave it, in hexadecimal."""


class Setup(_Part):
    """What has to be equal where a checkpoint is loaded: tensors would not fit, or not mean it."""

    architecture: str
    """Model type, as config.json names it."""
    dtype: str
    """Type in which the passes compute. What is saved is float32 always."""
    betas: tuple[float, float]
    weight_decay: float
    parameters: dict[str, tuple[int, ...]]
    """Shapes of the whole tensors by their names in the model folder, or in an adapter's."""
    lora: str
    """Adapters that learned, for people; empty if all weights did."""
    base: str
    """Digest of the weights that the adapters belong to, in hexadecimal; empty without adapters."""


class FileRecord(_Part):
    """A file of tensors, as it was when it was written."""

    num_bytes: int
    sha256: str


class Manifest(_Part):
    """All that a checkpoint is, except the tensors."""

    format: int = FORMAT
    step: int
    """Batches that the run has learned from."""
    world_size: int
    """Ranks that saved it."""
    state: TrainerState
    setup: Setup
    files: dict[str, FileRecord]
    """By name, one a rank, in order of the ranks."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose manifest was read; its tensors were not looked at."""

    folder: Path
    manifest: Manifest
    digest: str
    """SHA-256 of the manifest, in hexadecimal."""


def staging_folder(folder: Path, step: int) -> Path:
    """Where a step's checkpoint is written; without the suffix, where it goes."""
    return folder / f"step-{step:08d}{STAGING_SUFFIX}"


def file_name(rank: int) -> str:
    """File of one rank's tensors."""
    return f"rank-{rank:05d}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of all checkpoints, newest first, damaged ones among them."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write a durable manifest.json and return the manifest's digest."""
    body = manifest.model_dump(mode="json")
    digest = _digest(body)
    with (folder / MANIFEST).open("w", encoding="ascii") as stream:
        json.dump({"manifest": body, "sha256": digest}, stream, indent=1, allow_nan=False)
        stream.write("\n")
    sync(folder / MANIFEST)
    return digest


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest.

    Raises:
        DamagedCheckpointError: it is missing or not what was written.
        ConfigError: another version of this program wrote it.
    """
    try:
        sealed = json.loads((folder / MANIFEST).read_text(encoding="ascii"))
        body, digest = sealed["manifest"], sealed["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(folder, f"{MANIFEST} cannot be read ({error})") from None
    if not isinstance(body, dict) or _digest(body) != digest:
        raise DamagedCheckpointError(folder, f"{MANIFEST} is damaged (its SHA-256 differs)")
    if body.get("format") != FORMAT:
        raise ConfigError(
            f"checkpoint {folder} has format {body.get('format')}, known is {FORMAT}; resume with "
            "the version of understudy that saved it, or choose another run.name to start anew"
        )
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        raise DamagedCheckpointError(folder, f"{MANIFEST} is not a manifest ({error})") from None
    return Checkpoint(folder=folder, manifest=manifest, digest=digest)


def _digest(body: Any) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
