"""The model bundle: the files that a process needs beside the weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from understudy.config import LoraConfig
from understudy.errors import ConfigError
from understudy.weights.adapter import CONFIG_FILE, describe_adapter

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
    def read(cls, folder: Path, lora: LoraConfig) -> Self:
        """Read the bundle of a model folder, and describe the adapters that learn, if they do.

        Raises:
            ConfigError: the folder has no config.json, or a file cannot be read.
        """
        refuse_adapter(folder)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path = '{folder}': no config.json there; name a model folder")
        files = []
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in SUFFIXES and not path.name.endswith(_INDEX):
                files.append(_read(path))
        if lora.rank:
            files.append(_file(CONFIG_FILE, describe_adapter(lora)))
        over_all = hashlib.sha256()
        for file in files:
            over_all.update(f"{file.name}\0".encode() + file.digest)
        return cls(files=tuple(files), digest=over_all.hexdigest())


def refuse_adapter(folder: Path) -> None:
    """Raise ConfigError if a folder holds an adapter, which is no model by itself."""
    if (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"model.path = '{folder}': {CONFIG_FILE} says that it is an adapter; name the "
            "folder of a model, into which an adapter was merged"
        )


def _read(path: Path) -> BundleFile:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(f"model.path: {path} has {size} bytes; at most {MAX_FILE_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"model.path: {path} cannot be read ({error.strerror})") from None
    return _file(path.name, content)


def _file(name: str, content: bytes) -> BundleFile:
    return BundleFile(name=name, content=content, digest=hashlib.sha256(content).digest())
