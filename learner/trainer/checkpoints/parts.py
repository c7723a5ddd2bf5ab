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
from typing import Any, cast

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
)
from learner.trainer.model import Policy
from learner.trainer.optimizer import Optimizer
from learner.trainer.ranks import Ranks
from learner.trainer.shards import Held, owned_run
from understudy.files import sync


@dataclass(frozen=True, kw_only=True)
class _State:
    """What training has of one parameter: the tensors that it changes."""

    name: str
    tensors: Mapping[str, DTensor]
    """`weight`, `exp_avg` and `exp_avg_sq`, all cut as the parameter is."""
    step: Tensor
    """[1]"""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A copy of all that a rank saves, in host memory."""

    tensors: Mapping[str, Tensor]
    starts: Mapping[str, str]
    """First elements by parameter, in decimal, as safetensors' metadata has them."""


def copy_part(policy: Policy, optimizer: Optimizer, ranks: Ranks) -> Part:
    """Copy this rank's weights, optimizer state and generators; training may go on at once.

    The ranks of a tensor group call it together.
    """
    tensors, starts = _generators(ranks.device), {}
    for state in _states(policy, optimizer):
        for kind, tensor in state.tensors.items():
            start, values = owned_run(tensor)
            if values.numel():
                starts[state.name] = str(start)
                tensors[f"{kind}/{state.name}"] = values.to("cpu", copy=True)
                tensors[f"step/{state.name}"] = state.step.to("cpu", copy=True)
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
        for state in _states(policy, optimizer):
            for kind, tensor in state.tensors.items():
                _restore(checkpoint, files, f"{kind}/{state.name}", tensor)
            step = next(file for file in files if state.name in file.starts)
            state.step.copy_(step.opened.get_tensor(f"step/{state.name}"))
        _restore_generators(files[ranks.rank % world_size], ranks.device)


@torch.no_grad()
def _restore(checkpoint: Checkpoint, files: Sequence["_File"], key: str, tensor: DTensor) -> None:
    """Fill this rank's part of a tensor."""
    held, local = Held.of(tensor), tensor.to_local()
    rows = torch.empty(held.num_rows * held.row, dtype=local.dtype)
    if _fill(files, key, held.first_row * held.row, rows) != rows.numel():
        raise DamagedCheckpointError(checkpoint.folder, f"elements of {key} are missing")
    local.copy_(held.of_rows(rows))


class _File:
    """An open safetensors file; tensors are read in slices."""

    def __init__(self, opened: Any) -> None:
        self.opened = opened
        self.starts: Mapping[str, str] = opened.metadata() or {}


def _fill(files: Sequence[_File], key: str, start: int, values: Tensor) -> int:
    """Copy what the files have of a run of elements and return how many that was."""
    num_filled, end = 0, start + values.numel()
    for file in files:
        if (name := key.partition("/")[2]) not in file.starts:
            continue
        first = int(file.starts[name])
        source = file.opened.get_slice(key)
        low, high = max(start, first), min(end, first + source.get_shape()[0])
        if low < high:
            found: Tensor = source[low - first : high - first]
            values[low - start : high - start].copy_(found)
            num_filled += high - low
    return num_filled


def _states(policy: Policy, optimizer: Optimizer) -> Iterator[_State]:
    for name, parameter in policy.trained_parameters():
        moments = optimizer.moments(parameter)
        tensors = {
            "weight": parameter,
            "exp_avg": moments["exp_avg"],
            "exp_avg_sq": moments["exp_avg_sq"],
        }
        yield _State(
            name=name,
            tensors={kind: cast("DTensor", tensor) for kind, tensor in tensors.items()},
            step=moments["step"].view(1),
        )


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"generator/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["generator/cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_generators(file: _File, device: torch.device) -> None:
    torch.set_rng_state(file.opened.get_tensor("generator/cpu"))
    if device.type == "cuda" and "generator/cuda" in file.opened.keys():  # noqa: SIM118
        torch.cuda.set_rng_state(file.opened.get_tensor("generator/cuda"), device)
