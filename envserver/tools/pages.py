"""The files of one folder, as answers to a browser that has no other network."""

import mimetypes
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

ORIGIN = "http://pages.test"
"""Where the folder's files seem to be; `.test` names nothing anywhere (RFC 6761)."""
MAX_FILE_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Page:
    """A file's answer."""

    body: bytes
    content_type: str


class Pages:
    """A folder that is only read. Links in it are refused, as is all that lies outside."""

    def __init__(self, folder: Path) -> None:
        """Take the task's folder."""
        self._folder = folder

    def address(self, name: str) -> str:
        """The address of a file in the folder."""
        return f"{ORIGIN}/{quote(name.strip().lstrip('/'))}"

    def name(self, address: str) -> str | None:
        """The file that an address leads to; None if it leads out of the folder."""
        if not address.startswith(f"{ORIGIN}/"):
            return None
        return unquote(urlsplit(address).path).lstrip("/")

    def read(self, address: str) -> Page | None:
        """What lies at an address; None if it is no file of the folder's.

        Each part of the path is opened within the one before it and no link is followed, so that
        nothing that changes meanwhile leads out.
        """
        name = self.name(address)
        parts = name.split("/") if name else []
        if not parts or any(part in ("", ".", "..") or "\0" in part for part in parts):
            return None
        try:
            body = _read(self._folder, parts)
        except (OSError, UnicodeEncodeError):
            return None
        kind = mimetypes.guess_type(parts[-1])[0] or "application/octet-stream"
        charset = "; charset=utf-8" if kind.startswith("text/") else ""
        return Page(body=body, content_type=kind + charset)


def _read(folder: Path, parts: list[str]) -> bytes:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for index, part in enumerate(parts):
            kind = os.O_DIRECTORY if index < len(parts) - 1 else os.O_NONBLOCK
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=fd)
            os.close(fd)
            fd = inner
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode) or state.st_size > MAX_FILE_BYTES:
            raise OSError("no file, or a large one")
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read(MAX_FILE_BYTES)
    finally:
        os.close(fd)
