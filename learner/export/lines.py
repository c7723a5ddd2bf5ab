"""Files of JSON lines, compressed by zstd."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zstandard

from understudy.errors import ConfigError

_LEVEL = 3


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> int:
    """Write a line an object and return their number. The file is there once it is whole.

    Raises:
        ConfigError: it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    number = 0
    try:
        compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
        with unfinished.open("wb") as file:
            with compressor.stream_writer(file, closefd=False) as stream:
                for line in lines:
                    stream.write(json.dumps(line, allow_nan=False).encode() + b"\n")
                    number += 1
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"--out = '{path}': {error.strerror}; choose another file") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return number
