"""What changed between two shadows, for engines that can change weights in place.

    patch file: for each tensor that changed, positions, then the new values

It is made while generation goes on. In the pause only the patch travels to the device, not the
model.
"""

import logging
import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inference.weights import Shadow
from understudy.weights.encoding import find_changes, words
from understudy.weights.layout import ALIGNMENT

_log = logging.getLogger(__name__)
MAX_SHARE = 0.25
"""Share of changed values above which the whole model is loaded rather than patched."""


class TensorPatch(NamedTuple):
    """One tensor's part of a patch file; travels to the workers as a list."""

    name: str
    dtype: str
    """`F32` or `BF16`."""
    shape: list[int]
    """Of the whole tensor."""
    num_changed: int
    position_bytes: int
    """4 or 8, of each position in the flattened tensor."""
    positions_offset: int
    """First byte of the positions."""
    values_offset: int
    """First byte of the values."""


class Patch:
    """A patch file in shared memory; gone once it is closed and nobody maps it."""

    def __init__(self) -> None:
        self.tensors: list[TensorPatch] = []
        self._file = os.memfd_create("understudy-patch", os.MFD_CLOEXEC)
        self._end = 0

    @property
    def path(self) -> str:
        """Path under which processes of the same user can map the file."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def write(self, data: npt.NDArray[np.generic]) -> int:
        """Write an array; returns its first byte's offset."""
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        left = data.view(np.uint8).data
        while left:
            left = left[os.pwrite(self._file, left, offset + data.nbytes - len(left)) :]
        self._end = offset + data.nbytes
        return offset

    def close(self) -> None:
        """Give the memory back."""
        os.close(self._file)


def make_patch(old: Shadow, new: Shadow) -> Patch | None:
    """What leads from one shadow to another of the same layout; None if too much changed, or if
    there is no memory for it.

    Takes a second for some gigabytes: run it on a thread.
    """
    patch = None
    try:
        patch = Patch()
        if _fill(patch, old, new):
            return patch
    except (OSError, MemoryError) as error:
        _log.warning("no memory for a patch of the weights (%s); loading all of them", error)
    if patch is not None:
        patch.close()
    return None


def _fill(patch: Patch, old: Shadow, new: Shadow) -> bool:
    """Write what changed; False if that is too much."""
    room = MAX_SHARE * sum(entry.num_elements for entry in new.layout)
    for entry, data in new:
        before, after = words(entry.dtype, old.tensor_bytes(entry.name)), words(entry.dtype, data)
        changed, _, values = find_changes(before, after)
        room -= len(changed)
        if room < 0:
            return False
        if len(changed):
            positions = changed if len(after) >= 2**31 else changed.astype(np.int32)
            patch.tensors.append(
                TensorPatch(
                    name=entry.name,
                    dtype=entry.dtype,
                    shape=list(entry.shape),
                    num_changed=len(changed),
                    position_bytes=positions.itemsize,
                    positions_offset=patch.write(positions),
                    values_offset=patch.write(values),
                )
            )
    return True
