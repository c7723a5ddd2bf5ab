"""The intake's epoch: a fence that rises at each start and is durable before the port opens."""

import os
from pathlib import Path

from understudy.errors import ConfigError


def raise_epoch(folder: Path) -> int:
    """Add 1 to the number in `<folder>/epoch` and return it.

    Raises:
        ConfigError: the file cannot be written, or holds no number.
    """
    path = folder / "epoch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        epoch = 1 + (int(path.read_text(encoding="ascii")) if path.exists() else 0)
        _replace(path, f"{epoch}\n")
    except ValueError:
        raise ConfigError(
            f"{path} holds no epoch; restore it, or choose another run.name"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"run.directory: {path} cannot be written ({error.strerror}); choose another"
        ) from None
    return epoch


def _replace(path: Path, text: str) -> None:
    """Write a file so that after a power loss it has the old or the new content."""
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
