"""What a log refuses, and how it says so."""

import errno
from pathlib import Path

from understudy.errors import UnderstudyError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Errors that pass once somebody frees bytes. What was to be written is written then."""


class LogFailedError(UnderstudyError):
    """The log cannot be trusted to write any more. Only a new start, which recovers, helps."""


class BadEntryError(UnderstudyError):
    """An entry is not, or not any more, what was written at its place."""


def failure(path: Path, error: OSError) -> str:
    """One line about a failed call on a file, for people."""
    name = errno.errorcode.get(error.errno or 0, "OSError")
    remedy = (
        "free space" if error.errno in NO_SPACE else "check the disk, or move the run to another"
    )
    return (
        f"{error.filename or path}: {name} ({error.strerror or error}); nothing more is stored; "
        f"{remedy}, then start the intake again"
    )
