"""Shadows: a replica's host copies of the weights, in checkpoint layout, in shared memory.

One anonymous shared-memory file (memfd) holds all tensors behind each other. Engine workers map it
through its path, `/proc/<pid>/fd/<n>`, so nothing is copied between processes and nothing is
pickled. Unlike a name in /dev/shm it has no size limit in containers, and it is gone when the
process is, however it ends.
"""

import contextlib
import logging
import mmap
import os
from collections.abc import Collection, Iterator

import numpy as np

from understudy.weights.layout import ByteArray, Layout, TensorEntry, end_of

_log = logging.getLogger(__name__)
MAX_SHADOWS = 3
"""Shadows of one replica: one is served, one is filled, and while a peer reads one a third."""


class Shadow:
    """Weights of one version. Writable here, mapped by engine workers.

    Raises:
        OSError, OverflowError, ValueError: no memory for so much.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.checked: dict[str, bytes] = {}
        """As WeightBuffer has it: stays while the shadow waits to be filled again."""
        self.version = 0
        """Version whose values it has; 0 while they are being written."""
        self.base_digest = b""
        """Over the digests of all tensors but adapters', once it has its version's values: shadows
        in which it is equal have equal ones."""
        self.num_readers = 0
        """Streams that read it."""
        self._entries = {entry.name: entry for entry in layout}
        size = max(end_of(layout), 1)
        self._file = os.memfd_create("understudy-shadow", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._file, size)
            self._map = mmap.mmap(self._file, size)
        except (OSError, OverflowError, ValueError):
            self.close()
            raise

    @property
    def path(self) -> str:
        """Path under which processes of the same user can map the file."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def tensor_bytes(self, name: str) -> ByteArray:
        """The tensor's bytes: a writable view."""
        entry = self._entries[name]
        return np.frombuffer(self._map, np.uint8, entry.num_bytes, entry.offset)

    def __iter__(self) -> Iterator[tuple[TensorEntry, ByteArray]]:
        for entry in self.layout:
            yield entry, self.tensor_bytes(entry.name)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Rather not be overwritten meanwhile; `version` tells whether it was."""
        self.num_readers += 1
        try:
            yield
        finally:
            self.num_readers -= 1

    def close(self) -> None:
        """Give the memory back once nobody maps it. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class ShadowPool:
    """The shadows of one replica, which take turns. Host memory is twice the model, or three times
    while a peer reads a version that is not the newest any more."""

    def __init__(self) -> None:
        self._shadows: list[Shadow] = []

    def take(self, layout: Layout, needed: Collection[Shadow]) -> Shadow:
        """A shadow to write to; one that peers read only if there would be too many.

        Args:
            layout: of what is to be written.
            needed: shadows that have to stay as they are, two at most.

        Raises:
            OSError, OverflowError, ValueError: no memory for so much.
        """
        assert len(needed) < MAX_SHADOWS
        for shadow in [one for one in self._shadows if one not in needed]:
            if shadow.layout != layout:
                self._drop(shadow)
        free = [shadow for shadow in self._shadows if shadow not in needed]
        free.sort(key=lambda shadow: shadow.num_readers)
        for surplus in [one for one in free[1:] if not one.num_readers]:
            self._drop(surplus)
        if free and (not free[0].num_readers or len(self._shadows) >= MAX_SHADOWS):
            taken = free[0]
        else:
            taken = Shadow(layout)
            self._shadows.append(taken)
        if taken.num_readers:
            _log.warning("version %d ends for %d readers", taken.version, taken.num_readers)
        taken.version = 0
        return taken

    def _drop(self, shadow: Shadow) -> None:
        shadow.version = 0
        shadow.close()
        self._shadows.remove(shadow)
