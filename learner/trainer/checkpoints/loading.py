"""Loads a training checkpoint, of any number of ranks, once it is shown to be whole and to fit."""

import logging
from pathlib import Path

from torch.distributed.fsdp import FSDPModule

from learner.trainer.checkpoints.manifest import (
    Checkpoint,
    DamagedCheckpointError,
    FileRecord,
    Setup,
    TrainerState,
    list_checkpoints,
    read_checkpoint,
)
from learner.trainer.checkpoints.parts import record_of, restore
from learner.trainer.model import Policy
from learner.trainer.optimizer import Optimizer
from learner.trainer.ranks import Ranks
from understudy.config import LoraConfig
from understudy.errors import ConfigError

_log = logging.getLogger(__name__)


def load(
    checkpoint: Checkpoint, policy: Policy, optimizer: Optimizer, ranks: Ranks
) -> TrainerState:
    """Take weights, optimizer state and generators from a checkpoint of any number of ranks.

    All ranks call it together. A rank beyond those that saved takes a generator of one of them.

    Raises:
        ConfigError: it is of another model or optimizer; nothing was changed.
        DamagedCheckpointError: on all ranks, when a file is missing or not what was written.
    """
    _refuse_different(checkpoint, setup_of(policy, optimizer))
    _verify(checkpoint, ranks)
    restore(checkpoint, policy, optimizer, ranks)
    return checkpoint.manifest.state


def load_latest(
    folder: Path, policy: Policy, optimizer: Optimizer, ranks: Ranks
) -> Checkpoint | None:
    """Load the newest checkpoint that is not damaged, and say which; None if there is none.

    Raises:
        ConfigError: it is of another model or optimizer, or of another format.
    """
    for path in list_checkpoints(folder):
        try:
            checkpoint = read_checkpoint(path)
            load(checkpoint, policy, optimizer, ranks)
        except DamagedCheckpointError as error:
            _log.error("%s", error)
        else:
            return checkpoint
    return None


def _refuse_different(checkpoint: Checkpoint, setup: Setup) -> None:
    saved = checkpoint.manifest.setup
    fields: dict[str, tuple[object, object]] = {
        "model.path: architecture": (setup.architecture, saved.architecture),
        "model.dtype": (setup.dtype, saved.dtype),
        "learner.train.betas": (setup.betas, saved.betas),
        "learner.train.weight_decay": (setup.weight_decay, saved.weight_decay),
        "learner.lora": (setup.lora or "no adapters", saved.lora or "no adapters"),
        "model.path: digest of the weights that adapters belong to": (setup.base, saved.base),
    }
    for name in sorted({*setup.parameters, *saved.parameters}):
        shapes = setup.parameters.get(name), saved.parameters.get(name)
        fields[f"model.path: shape of {name}"] = shapes
    for field, (ours, theirs) in fields.items():
        if ours != theirs:
            raise ConfigError(
                f"{field} = {ours}, but checkpoint {checkpoint.folder} was saved with {theirs}; "
                "set it back, or choose another run.name to start anew"
            )


def _verify(checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Check all files' digests, each on one rank, and tell every rank of a damaged one."""
    files = checkpoint.manifest.files
    verdicts = [0.0] * len(files)
    for index, (name, record) in enumerate(files.items()):
        if index % ranks.world_size == ranks.rank:
            verdicts[index] = float(_is_damaged(checkpoint.folder / name, record))
    for name, damaged in zip(files, ranks.max(verdicts), strict=True):
        if damaged:
            what = f"{name} is missing or damaged (its SHA-256 is not that of the manifest)"
            raise DamagedCheckpointError(checkpoint.folder, what)


def _is_damaged(path: Path, record: FileRecord) -> bool:
    try:
        return record_of(path) != record
    except OSError as error:
        _log.error("%s", error)
        return True


def setup_of(policy: Policy, optimizer: Optimizer) -> Setup:
    """What a checkpoint has to agree with to be loaded into these."""
    assert isinstance(policy, FSDPModule)
    dtype = policy._get_fsdp_state()._mp_policy.param_dtype  # which nothing public tells
    adapter = policy.adapter
    return Setup(
        architecture=policy.model_type,
        dtype=str(dtype).removeprefix("torch."),
        betas=optimizer.betas,
        weight_decay=optimizer.weight_decay,
        parameters={name: tuple(p.shape) for name, p in policy.trained_parameters()},
        lora=_in_words(adapter.config) if adapter else "",
        base=adapter.base_digest if adapter else "",
    )


def _in_words(lora: LoraConfig) -> str:
    targets = ", ".join(sorted(lora.target_modules))
    return f"rank {lora.rank}, alpha {lora.alpha:g}, on {targets}"
