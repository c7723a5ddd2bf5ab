"""What tensors a model has and where each lies in one run of bytes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

ByteArray = npt.NDArray[np.uint8]

ALIGNMENT = 64
"""Tensors start at multiples of this many bytes."""
ITEM_BYTES = {"F32": 4, "BF16": 2}
"""Bytes of an element by dtype, as safetensors names dtypes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where one checkpoint tensor lies."""

    name: str
    """Name in the checkpoint, e.g. `model.norm.weight`."""
    dtype: str
    """`F32` or `BF16`."""
    shape: tuple[int, ...]
    """Shape of the tensor."""
    offset: int
    """First byte."""

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.num_elements * ITEM_BYTES[self.dtype]


Layout = tuple[TensorEntry, ...]
"""All tensors of a model, in the order of their bytes."""


def plan_layout(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> Layout:
    """Place (name, dtype, shape) behind each other."""
    entries, offset = [], 0
    for name, dtype, shape in tensors:
        entry = TensorEntry(name=name, dtype=dtype, shape=tuple(shape), offset=offset)
        entries.append(entry)
        offset += -(-entry.num_bytes // ALIGNMENT) * ALIGNMENT
    return tuple(entries)


def end_of(layout: Layout) -> int:
    """Bytes that a layout takes."""
    return max((entry.offset + entry.num_bytes for entry in layout), default=0)


class WeightBuffer(Protocol):
    """The values of all tensors of a layout, writable."""

    layout: Layout
    checked: dict[str, bytes]
    """By tensor: the digests that its bytes were found to have, since they were last written. Who
    writes to a tensor removes its entry first."""

    def tensor_bytes(self, name: str) -> ByteArray:
        """The tensor's bytes: a view."""


class HostBuffer:
    """A WeightBuffer in this process's memory.

    Raises:
        MemoryError, ValueError: no memory for so much.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.checked: dict[str, bytes] = {}
        self._entries = {entry.name: entry for entry in layout}
        self._bytes: ByteArray = np.empty(end_of(layout), np.uint8)

    def tensor_bytes(self, name: str) -> ByteArray:
        """The tensor's bytes: a view."""
        entry = self._entries[name]
        return self._bytes[entry.offset : entry.offset + entry.num_bytes]
