"""Files that a power loss leaves as they were before, or as they were to be."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

NEW_SUFFIX = ".new"
"""Ends the name of a file that is not finished. Whose folder it is in removes it at its start."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What systems and file systems say that cannot exchange names."""


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder, and make its name durable."""
    above = [path.parent for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in {folder.parent, *above}:
        sync(path)


def write_durably(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a whole file, or put it in the place of an older one, and have it on disk.

    Raises:
        OSError: with the name of the file that could not be written; an older one is untouched.
    """
    new = path.with_name(f"{path.name}{NEW_SUFFIX}")
    try:
        with new.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = new
        new.unlink(missing_ok=True)
        raise
    new.replace(path)
    sync(path.parent)


def replace_folder(new: Path, out: Path) -> None:
    """Give a folder, all of which is on disk, the name of an older one, which is removed.

    Under that name there is one of them at any time, whatever dies meanwhile. Where names cannot be
    exchanged, as on NFS, there is none for a moment, and the older one is `<out>.old` then.

    Raises:
        OSError: the older one is untouched.
    """
    old = new
    if not out.exists():
        new.rename(out)
    elif not _exchange(new, out):
        old = out.with_name(f"{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        new.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step (renameat2, Linux); False where that cannot be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
