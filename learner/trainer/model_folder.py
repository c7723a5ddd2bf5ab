"""Saves the policy as a Hugging Face folder, whole or not at all.

<out>            the model; adapters, where those learned, are merged into it
<out>/adapter    the adapters alone, as peft and vLLM load them beside the model they belong to

One folder, so that one change of names brings both: nobody ever finds the adapters of another step.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.trainer.model import Policy
from learner.trainer.ranks import Ranks
from learner.trainer.shards import checkpoint_tensors
from understudy.files import replace_folder, sync
from understudy.weights.adapter import CONFIG_FILE, describe_adapter, is_adapter

ADAPTER_FOLDER = "adapter"
"""Folder in the model's that has the adapters alone."""
MAX_FILE_BYTES = 4 * 2**30
"""Largest safetensors file; rank 0 holds one at a time in memory."""


def save_model(
    policy: Policy, bundle: Path, out: Path, dtype: Literal["float32", "bfloat16"], ranks: Ranks
) -> None:
    """Write the weights and the bundle's other files to the folder `out`.

    Every rank calls it: parameters are gathered one at a time and rank 0 writes. The folder takes
    the place of an older one at once, when all of it is on disk. Where adapters learned, the model
    is saved with them in it, and they are saved alone as well.
    """
    torch_dtype = getattr(torch, dtype)
    adapter = _gather_adapter(policy)
    staging = out.with_name(f"{out.name}.tmp")
    if ranks.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _copy_bundle(bundle, staging)
    _write_weights(policy, adapter, staging, torch_dtype, ranks)
    if ranks.rank:
        return
    if policy.adapter:
        served = {name: whole.to("cpu", torch_dtype) for name, whole in adapter.items()}
        description = describe_adapter(policy.adapter.config, str(bundle.resolve()))
        _write_adapter(served, description, staging / ADAPTER_FOLDER)
    for path in (*staging.rglob("*"), staging):
        sync(path)
    replace_folder(staging, out)


def _write_adapter(tensors: dict[str, Tensor], description: bytes, folder: Path) -> None:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_bytes(description)


def _gather_adapter(policy: Policy) -> dict[str, Tensor]:
    """Whole adapter tensors by their published names, on all ranks: they are small."""
    parameters = policy.checkpoint_parameters()
    return {name: _whole(p.detach()) for name, p in parameters if is_adapter(name)}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write_weights(
    policy: Policy,
    adapter: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype,
    ranks: Ranks,
) -> None:
    parameters = policy.checkpoint_parameters()
    sources: dict[str, Tensor] = {n: p for n, p in parameters if n not in adapter}
    sources |= policy.checkpoint_buffers()
    sizes = {name: source.numel() * dtype.itemsize for name, source in sources.items()}
    weight_map: dict[str, str] = {}
    for file, names in _plan(sizes).items():
        tensors: dict[str, Tensor] = {}
        for name in names:
            whole = _whole(sources[name].detach())
            if ranks.rank == 0:
                if policy.adapter:
                    whole = policy.adapter.merged(name, whole, adapter)
                tensors |= checkpoint_tensors(policy, name, whole.to("cpu", dtype).contiguous())
        if ranks.rank == 0:
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _plan(sizes: dict[str, int]) -> dict[str, list[str]]:
    """File names -> the parameters and buffers that go there, in order."""
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
