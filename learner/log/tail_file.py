"""The file of the newest segment, as the one thread that writes it sees it."""

import os
from collections.abc import Sequence
from pathlib import Path

from learner.log.errors import NO_SPACE
from learner.log.segments import segment_path
from understudy import failpoints
from understudy.files import sync

_IOV_MAX = os.sysconf("SC_IOV_MAX")


class TailFile:
    """Writes runs of frames and makes them durable, one run after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._segment = 0
        self._descriptor = -1

    def commit(self, segment: int, offset: int, buffers: Sequence[bytes]) -> None:
        """Write buffers at the end of a segment, creating it at offset 0, and have them on disk.

        Where there is no space, the file is as long as before, and the call may be repeated.

        Raises:
            OSError: with the file's name.
        """
        path = segment_path(self._folder, segment)
        try:
            self._open(segment, path, create=offset == 0)
            self._write(offset, buffers)
        except OSError as error:
            error.filename = path
            raise

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self, segment: int, path: Path, *, create: bool) -> None:
        if segment == self._segment:
            return
        if self._segment:
            failpoints.hit("log.at_roll")
        self.close()
        self._descriptor = os.open(path, os.O_WRONLY | (os.O_CREAT if create else 0), 0o644)
        if create:
            failpoints.hit("log.after_create")
            # Frames in a file whose name a power loss takes away would be lost with it.
            sync(self._folder)
        self._segment = segment

    def _write(self, offset: int, buffers: Sequence[bytes]) -> None:
        try:
            _write_all(self._descriptor, offset, buffers)
            failpoints.hit("log.after_write")
            os.fdatasync(self._descriptor)
            failpoints.hit("log.after_fdatasync")
        except OSError as error:
            if error.errno in NO_SPACE:
                os.ftruncate(self._descriptor, offset)
            raise


def _write_all(descriptor: int, offset: int, buffers: Sequence[bytes]) -> None:
    for start in range(0, len(buffers), _IOV_MAX):
        views = [memoryview(buffer) for buffer in buffers[start : start + _IOV_MAX] if buffer]
        while views:
            num_written = os.pwritev(descriptor, views, offset)
            offset += num_written
            while views and num_written >= len(views[0]):
                num_written -= len(views.pop(0))
            if num_written:
                views[0] = views[0][num_written:]
