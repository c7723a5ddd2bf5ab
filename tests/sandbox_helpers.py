"""What tests of the sandbox share."""

import shutil
import warnings
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from envserver.sandbox import Layout, Limits, Pool, Workspace

LIMITS = Limits(call_seconds=30.0, memory_bytes=512 * 2**20, processes=32)
"""Generous in time, for busy machines."""

needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="bwrap is not installed")
if not shutil.which("bwrap"):
    warnings.warn(
        "bwrap is not installed: the sandbox is NOT TESTED; apt-get install bubblewrap",
        stacklevel=1,
    )


@asynccontextmanager
async def open_pool(limits: Limits = LIMITS, layout: Layout | None = None) -> AsyncIterator[Pool]:
    """A pool with one warm box."""
    pool = Pool(layout or Layout.find(), limits, 1)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


@asynccontextmanager
async def open_workspace(files: Mapping[str, bytes] | None = None) -> AsyncIterator[Workspace]:
    """An episode's workspace with files, over a pool of its own."""
    async with open_pool() as pool:
        workspace = Workspace(pool, files)
        yield workspace
        await workspace.close()
