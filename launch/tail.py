"""Reads JSON lines as another process writes them."""

import json
import os
from pathlib import Path
from typing import Any


class Tail:
    """The lines of a growing file, each given once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new_lines(self) -> list[dict[str, Any]]:
        """Whole lines that were written since the last call; other output between is skipped.

        A file that has become shorter was begun again, and is read from its start.
        """
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:
                self._offset = 0
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [line for text in whole.splitlines() for line in _objects(text)]


def _objects(text: bytes) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError:
        return []
    return [value] if isinstance(value, dict) else []
