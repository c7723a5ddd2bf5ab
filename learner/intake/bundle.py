"""The model bundle: the files that a process needs beside the weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from understudy.errors import ConfigError

SUFFIXES = frozenset({".jinja", ".json", ".model", ".txt"})
"""Files of a model folder that may belong to the bundle; none of these holds weights."""
_INDEX = ".index.json"
MAX_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class BundleFile:
    """One file."""

    name: str
    content: bytes
    digest: bytes
    """SHA-256 of the content."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """All files by name, for example config.json and tokenizer.json."""

    files: tuple[BundleFile, ...]
    digest: str
    """SHA-256 over names and file digests, in hex."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the bundle of a model folder.

        Raises:
            ConfigError: the folder has no config.json, or a file cannot be read.
        """
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path = '{folder}': no config.json there; name a model folder")
        files = []
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in SUFFIXES and not path.name.endswith(_INDEX):
                files.append(_read(path))
        over_all = hashlib.sha256()
        for file in files:
            over_all.update(f"{file.name}\0".encode() + file.digest)
        return cls(files=tuple(files), digest=over_all.hexdigest())


def _read(path: Path) -> BundleFile:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(f"model.path: {path} has {size} bytes; at most {MAX_FILE_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"model.path: {path} cannot be read ({error.strerror})") from None
    return BundleFile(name=path.name, content=content, digest=hashlib.sha256(content).digest())
