"""Saves the policy as a Hugging Face folder, whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.trainer.checkpoints.manifest import sync
from learner.trainer.model import Policy
from learner.trainer.ranks import Ranks

MAX_FILE_BYTES = 4 * 2**30
"""Largest safetensors file; rank 0 holds one at a time in memory."""


def save_model(
    policy: Policy, bundle: Path, out: Path, dtype: Literal["float32", "bfloat16"], ranks: Ranks
) -> None:
    """Write the weights and the bundle's other files to the folder `out`.

    Every rank calls it: parameters are gathered one at a time and rank 0 writes. The folder
    appears at once; an older one stays until then, for a moment beside it as `<out>.old`.
    """
    staging = out.with_name(f"{out.name}.tmp")
    if ranks.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _copy_bundle(bundle, staging)
    _write_weights(policy, staging, getattr(torch, dtype), ranks)
    if ranks.rank == 0:
        _replace(staging, out)


def _write_weights(policy: Policy, folder: Path, dtype: torch.dtype, ranks: Ranks) -> None:
    parameters = dict(policy.checkpoint_parameters())
    sizes = {name: p.numel() * dtype.itemsize for name, p in parameters.items()}
    files = _plan(sizes)
    for file, names in files.items():
        tensors: dict[str, Tensor] = {}
        for name in names:
            parameter = parameters[name].detach()
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if ranks.rank == 0:
                tensors[name] = whole.to("cpu", dtype).contiguous()
        if ranks.rank == 0:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if ranks.rank == 0 and len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _plan(sizes: dict[str, int]) -> dict[str, list[str]]:
    """File names -> the tensors that go there, in order."""
    pieces: list[list[str]] = [[]]
    room = MAX_FILE_BYTES
    for name, size in sizes.items():
        if pieces[-1] and size > room:
            pieces.append([])
            room = MAX_FILE_BYTES
        pieces[-1].append(name)
        room -= size
    if len(pieces) == 1:
        return {"model.safetensors": pieces[0]}
    return {
        f"model-{number:05d}-of-{len(pieces):05d}.safetensors": names
        for number, names in enumerate(pieces, start=1)
    }


def _copy_bundle(bundle: Path, folder: Path) -> None:
    for file in bundle.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)


def _replace(staging: Path, out: Path) -> None:
    for file in staging.iterdir():
        sync(file)
    sync(staging)
    old = out.with_name(f"{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)
