"""A rank's part of a training checkpoint: one safetensors file of flat runs of elements.

Per parameter `name` that the rank holds rows of:

    weight/name, exp_avg/name, exp_avg_sq/name    [num_elements] float32, rows one after another
    step/name                                     [1] float32, AdamW's count
    generator/cpu, generator/cuda                 [num_bytes] uint8, states of torch's generators

The file's metadata gives each name's first element in the flattened whole tensor. Runs of all files
cover each tensor once, so that any number of ranks can take its own runs out of them.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.trainer.checkpoints.manifest import (
    Checkpoint,
    DamagedCheckpointError,
    FileRecord,
    file_name,
    sync,
)
from learner.trainer.model import Policy
from learner.trainer.optimizer import Optimizer
from learner.trainer.ranks import Ranks
from learner.trainer.shards import shard_slices


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What this rank holds of one parameter, as views of the tensors that training changes."""

    name: str
    start: int
    """First element in the flattened whole tensor."""
    runs: Mapping[str, Tensor]
    """`weight`, `exp_avg` and `exp_avg_sq`, [num_elements] each."""
    step: Tensor
    """[1]"""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A copy of all that a rank saves, in host memory."""

    tensors: Mapping[str, Tensor]
    starts: Mapping[str, str]
    """First elements by parameter, in decimal, as safetensors' metadata has them."""


def copy_part(policy: Policy, optimizer: Optimizer, ranks: Ranks) -> Part:
    """Copy this rank's weights, optimizer state and generators; training may go on at once."""
    tensors, starts = _generators(ranks.device), {}
    for held in _held(policy, optimizer, ranks):
        starts[held.name] = str(held.start)
        for kind, values in {**held.runs, "step": held.step}.items():
            tensors[f"{kind}/{held.name}"] = values.to("cpu", copy=True)
    return Part(tensors=tensors, starts=starts)


def write_part(folder: Path, rank: int, part: Part) -> FileRecord:
    """Write a rank's durable file, in a folder that is made if it is missing.

    Raises:
        OSError: it could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(rank)
    try:
        save_file(dict(part.tensors), path, metadata=dict(part.starts))
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    sync(path)
    return record_of(path)


def record_of(path: Path) -> FileRecord:
    """Size and digest of a file as it is now."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(num_bytes=path.stat().st_size, sha256=digest)


def restore(checkpoint: Checkpoint, policy: Policy, optimizer: Optimizer, ranks: Ranks) -> None:
    """Fill this rank's weights, optimizer state and generators from the files that hold them.

    Raises:
        DamagedCheckpointError: elements are missing.
    """
    world_size = checkpoint.manifest.world_size
    with ExitStack() as stack:
        files = [
            _File(stack.enter_context(safe_open(checkpoint.folder / file_name(rank), "pt")))
            for rank in range(world_size)
        ]
        for held in _held(policy, optimizer, ranks):
            for kind, values in held.runs.items():
                if _fill(files, kind, held, values) != values.numel():
                    what = f"elements of {kind}/{held.name} are missing"
                    raise DamagedCheckpointError(checkpoint.folder, what)
            held.step.copy_(next(f.tensor("step", held) for f in files if held.name in f.starts))
        _restore_generators(files[ranks.rank % world_size], ranks.device)


class _File:
    """An open safetensors file; tensors are read in slices."""

    def __init__(self, opened: Any) -> None:
        self.opened = opened
        self.starts: Mapping[str, str] = opened.metadata() or {}

    def tensor(self, kind: str, held: _Held) -> Tensor:
        tensor: Tensor = self.opened.get_tensor(f"{kind}/{held.name}")
        return tensor


def _fill(files: Sequence[_File], kind: str, held: _Held, values: Tensor) -> int:
    """Copy what the files have of a run and return how many elements that was."""
    num_filled, end = 0, held.start + values.numel()
    for file in files:
        if held.name not in file.starts:
            continue
        first = int(file.starts[held.name])
        source = file.opened.get_slice(f"{kind}/{held.name}")
        low, high = max(held.start, first), min(end, first + source.get_shape()[0])
        if low < high:
            found: Tensor = source[low - first : high - first]
            values[low - held.start : high - held.start].copy_(found)
            num_filled += high - low
    return num_filled


def _held(policy: Policy, optimizer: Optimizer, ranks: Ranks) -> Iterator[_Held]:
    parameters = dict(policy.checkpoint_parameters())
    for piece in shard_slices(policy, ranks):
        moments = optimizer.moments(parameters[piece.name])
        yield _Held(
            name=piece.name,
            start=piece.start,
            runs={
                "weight": piece.values,
                "exp_avg": _flat(moments["exp_avg"]),
                "exp_avg_sq": _flat(moments["exp_avg_sq"]),
            },
            step=moments["step"].view(1),
        )


def _flat(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    local: Tensor = tensor.to_local()
    return local.view(-1)


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"generator/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["generator/cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_generators(file: _File, device: torch.device) -> None:
    torch.set_rng_state(file.opened.get_tensor("generator/cpu"))
    if device.type == "cuda" and "generator/cuda" in file.opened.keys():  # noqa: SIM118
        torch.cuda.set_rng_state(file.opened.get_tensor("generator/cuda"), device)
