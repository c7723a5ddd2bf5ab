"""The lock of a log's folder: one process at a time writes there."""

import fcntl
import os
from pathlib import Path

from understudy.errors import ConfigError


def lock_folder(folder: Path, run_id: str, owner: str = "intake") -> int:
    """Take a folder for this process, as long as the descriptor that is returned stays open.

    Raises:
        ConfigError: another process has it.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(descriptor, 20).decode().strip()
        os.close(descriptor)
        raise ConfigError(
            f"run.name = {run_id!r}: another {owner} (pid {pid}) serves this run from {folder}; "
            "stop it, or choose another name"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
