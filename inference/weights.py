"""The shadow: a replica's host copy of the weights, in checkpoint layout, in shared memory.

One anonymous shared-memory file (memfd) holds all tensors behind each other. Engine workers map it
through its path, `/proc/<pid>/fd/<n>`, so nothing is copied between processes and nothing is
pickled. Unlike a name in /dev/shm it has no size limit in containers, and it is gone when the
process is, however it ends.
"""

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64
"""Tensors start at multiples of this many bytes."""
ITEM_BYTES = {"F32": 4, "BF16": 2}
"""Bytes of an element by dtype, as safetensors names dtypes."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one checkpoint tensor lies in a shadow."""

    name: str
    """Name in the checkpoint, e.g. `model.norm.weight`."""
    dtype: str
    """`F32` or `BF16`."""
    shape: tuple[int, ...]
    """Shape of the tensor."""
    offset: int
    """First byte in the file."""

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64))

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


class Shadow:
    """Weights of one version. Writable here, mapped by engine workers."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._entries = {entry.name: entry for entry in layout}
        end = max((entry.offset + entry.num_bytes for entry in layout), default=0)
        self._file = os.memfd_create("understudy-shadow", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._file, max(end, 1))
            self._map = mmap.mmap(self._file, max(end, 1))
        except (OSError, OverflowError, ValueError):
            self.close()
            raise

    @property
    def path(self) -> str:
        """Path under which processes of the same user can map the file."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def tensor_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes: a writable view."""
        entry = self._entries[name]
        return np.frombuffer(self._map, np.uint8, entry.num_bytes, entry.offset)

    def __iter__(self) -> Iterator[tuple[TensorEntry, npt.NDArray[np.uint8]]]:
        for entry in self.layout:
            yield entry, self.tensor_bytes(entry.name)

    def close(self) -> None:
        """Give the memory back once nobody maps it. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def all_finite(dtype: str, data: npt.NDArray[np.uint8]) -> bool:
    """Whether no value is infinite or NaN."""
    if dtype == "F32":
        return bool(np.isfinite(data.view("<f4")).all())
    exponent = data.view("<u2") & np.uint16(0x7F80)
    return bool((exponent != 0x7F80).all())
