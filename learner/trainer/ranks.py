"""The trainer's ranks: how they find each other, and the few numbers that they exchange."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TIMEOUT = timedelta(hours=1)
"""Longest that a rank waits for another one in a collective; saving a large model takes minutes."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place among the data-parallel ranks."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Largest of each value over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op)
        return tensor.tolist()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or be the only one under plain python."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = _device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        _use_loopback_if_alone()
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("data",))
        yield Ranks(rank=rank, world_size=world_size, device=device, mesh=mesh)
        # Only after an orderly end: a rank that failed must not wait for the others.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _use_loopback_if_alone() -> None:
    # Else gloo listens on the address that the host's name resolves to, which need not exist.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
