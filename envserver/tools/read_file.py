"""Text of files, parsed in the sandbox: a parser is code that others' bytes have power over."""

from pathlib import PurePosixPath
from typing import Any

from envserver.sandbox import Outcome, Workspace
from envserver.tools.tool import Observation, Tool, describe

PART_CHARS = 12_000
KINDS = {
    ".csv": "csv",
    ".docx": "docx",
    ".htm": "html",
    ".html": "html",
    ".json": "json",
    ".md": "txt",
    ".pdf": "pdf",
    ".pptx": "pptx",
    ".tsv": "csv",
    ".txt": "txt",
    ".xlsx": "xlsx",
    ".xml": "xml",
    ".zip": "zip",
    **dict.fromkeys((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"), "image"),
}
"""Suffix -> the reader in envserver/sandbox/inside/readers.py."""


class ReadFile(Tool):
    """Reads files of the workspace, and members of archives, part by part."""

    spec = describe(
        "read_file",
        "Read a file as text. A file within an archive is named archive.zip/name.",
        file="Name of the file",
        optional={"part": {"type": "integer", "description": "Which part of a long text, from 1"}},
    )

    def __init__(self, workspace: Workspace) -> None:
        """Take the episode's workspace, whose files these are."""
        self._workspace = workspace

    async def call(self, **arguments: Any) -> Observation:
        """One part of the text, and how many there are."""
        file, part = arguments["file"], arguments.get("part", 1)
        kind = KINDS.get(PurePosixPath(file).suffix.lower())
        if kind is None:
            raise ValueError(f"Unknown kind of file; use one of {', '.join(KINDS)}.")
        start = (part - 1) * PART_CHARS
        reply = await self._workspace.call(
            "read", path=file, kind=kind, start=start, size=PART_CHARS
        )
        if reply.ended:
            text = self._workspace.pool.limits.explain(reply.outcome)
            return Observation(text=text, outcome=reply.outcome)
        if not isinstance(reply.value, dict):
            lines = reply.output.strip().splitlines() or ["no reason given"]
            return Observation(text=f"Cannot be read: {lines[-1]}", outcome=Outcome.ERROR)
        text, total = str(reply.value.get("text")), reply.value.get("total")
        num_parts = -(-total // PART_CHARS) if isinstance(total, int) else 1
        if not 1 <= part <= max(num_parts, 1):
            raise ValueError(f"No such part; there are {num_parts}.")
        note = f"[part {part} of {num_parts}]\n" if num_parts > 1 else ""
        return Observation(text=note + (text or "(empty)"))
