"""A rank's shard in host memory, as it is published."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.trainer.architectures import ShardSlice
from understudy.weights.layout import ByteArray, plan_layout

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class HostSlice:
    """A run of elements of one checkpoint tensor."""

    name: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """First element in the flattened tensor."""
    values: ByteArray
    """The values' bytes, little-endian: a view."""


class HostCopy:
    """One copy of the rank's slices, filled anew for version after version.

    Args:
        slices: what is to be copied, of which values only the number counts; every `fill` brings
            the same ones.
        dtype: type in which weights are served, `F32` or `BF16`.
        device: on which the slices' values are.
    """

    def __init__(self, slices: Sequence[ShardSlice], dtype: str, device: torch.device) -> None:
        self.dtype = dtype
        self._device = device
        layout = plan_layout((piece.name, dtype, (piece.values.numel(),)) for piece in slices)
        end = layout[-1].offset + layout[-1].num_bytes if layout else 0
        # Pinned: a GPU copies into it several times as fast.
        memory = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        runs = [memory[entry.offset :][: entry.num_bytes] for entry in layout]
        self._targets = [run.view(TORCH_DTYPES[dtype]) for run in runs]
        self.slices = tuple(
            HostSlice(
                name=piece.name,
                shape=piece.shape,
                start=piece.start,
                values=run.numpy(),
            )
            for piece, run in zip(slices, runs, strict=True)
        )

    @torch.no_grad()
    def fill(self, slices: Iterable[ShardSlice]) -> None:
        """Copy the values as they are now; they may change as soon as this returns."""
        for target, piece in zip(self._targets, slices, strict=True):
            target.copy_(self._served(piece.values), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _served(self, values: Tensor) -> Tensor:
        # Values go over the bus in the served type. On the host the copy itself converts.
        return values.to(TORCH_DTYPES[self.dtype]) if values.is_cuda else values
