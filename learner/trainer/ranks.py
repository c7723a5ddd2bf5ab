"""The trainer's ranks: how they find each other, and the few numbers that they exchange.

Ranks lie in a grid. With six of them and `learner.train.tensor_parallel = 2`:

                    tensor rank 0   tensor rank 1
    data rank 0           0               1         <- a tensor group: one share of every batch,
    data rank 1           2               3            each rank computes a part of each layer
    data rank 2           4               5

Without tensor parallelism a rank is a tensor group by itself.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from understudy.errors import ConfigError

TIMEOUT = timedelta(hours=1)
"""Longest that a rank waits for another one in a collective; saving a large model takes minutes."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place among all ranks, and in their grid."""

    rank: int
    """Among all ranks: who writes files, sends a part of a version, logs."""
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    """All ranks in one dimension."""
    grid: DeviceMesh | None = None
    """All ranks as `data` x `tensor`; None without tensor parallelism."""

    @property
    def tensor_mesh(self) -> DeviceMesh | None:
        """This rank's tensor group; None without tensor parallelism."""
        return None if self.grid is None else self.grid["tensor"]

    @property
    def tensor_size(self) -> int:
        """Ranks of a tensor group."""
        return 1 if self.tensor_mesh is None else self.tensor_mesh.size()

    @property
    def data_size(self) -> int:
        """Tensor groups, which is the shares that a batch is divided into."""
        return self.world_size // self.tensor_size

    @property
    def data_rank(self) -> int:
        """Which share of a batch this rank learns from, with the others of its tensor group."""
        return self.rank // self.tensor_size

    @property
    def tensor_rank(self) -> int:
        """Place in the tensor group."""
        return self.rank % self.tensor_size

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the data ranks, in float64; the same bits on all ranks.

        Values are of a share of the batch. Of a tensor group, whose ranks all have the same share,
        the first rank's count.
        """
        counted = [0.0] * len(values) if self.tensor_rank else values
        return self._reduce(counted, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Largest of each value over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op)
        return tensor.tolist()


@contextlib.contextmanager
def joined(tensor_parallel: int = 1) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or be the only one under plain python.

    Args:
        tensor_parallel: ranks of a tensor group, which follow each other and so share a node.

    Raises:
        ConfigError: the ranks cannot be divided into such groups.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size % tensor_parallel:
        raise ConfigError(
            f"learner.train.tensor_parallel = {tensor_parallel} does not divide the {world_size} "
            "ranks that were started; start a multiple of it"
        )
    device = _device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        _use_loopback_if_alone()
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        mesh, grid = init_device_mesh(device.type, (world_size,), mesh_dim_names=("all",)), None
        if tensor_parallel > 1:
            shape = (world_size // tensor_parallel, tensor_parallel)
            grid = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
        yield Ranks(rank=rank, world_size=world_size, device=device, mesh=mesh, grid=grid)
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
