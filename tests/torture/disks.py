"""What a crash leaves of a run's folder.

| disk   | a crash is                     | what is left                                       |
|--------|--------------------------------|----------------------------------------------------|
| plain  | kill -9                        | everything that was written                        |
| image  | a copy of a loop-mounted ext4  | what ext4 had sent to its device: what was synced, |
|        | image while the intake stands  | and what the kernel wrote back by itself           |
| strict | kill -9, then a rewrite        | file contents up to the last fsync, names up to    |
|        |                                | the folder's last fsync: all that POSIX grants     |

ext4 makes a new file's name durable with its contents, so that a missing fsync of the folder never
shows on it; hence the strict disk.
"""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.torture.target import RoleProcess

IMAGE_BYTES = 96 * 2**20


class PlainDisk:
    """A folder; a crash is kill -9."""

    arguments: tuple[str, ...] = ()
    """What the stand-in of the intake is to be told."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.folder = base / "disk"
        """Where runs live."""

    async def open(self) -> None:
        """Have an empty folder."""
        self.folder.mkdir(parents=True)

    async def crash(self, intake: RoleProcess) -> None:
        """Crash the intake, and leave what the next start finds."""
        await intake.kill()

    async def close(self) -> None:
        """Let go of what is not a plain file."""


class ImageDisk(PlainDisk):
    """An ext4 image on a loop device; a crash is a copy of the image, used from then on."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self._images = (base / f"disk-{number}.ext4" for number in range(10**9))
        self._image = next(self._images)
        self._mounted = False

    async def open(self) -> None:
        self.folder.mkdir(parents=True)
        with self._image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        await _run("mkfs.ext4", "-q", "-F", str(self._image))
        await self._mount()

    async def crash(self, intake: RoleProcess) -> None:
        await intake.hold()  # a copy takes a while: nothing may be synced during it
        copy = next(self._images)
        await _run("cp", "--reflink=never", "--sparse=always", str(self._image), str(copy))
        await intake.kill()
        await self._unmount()
        self._image.unlink()
        self._image = copy
        await self._mount()

    async def close(self) -> None:
        """Put what the disk has into a plain folder, and unmount."""
        if self._mounted:
            kept = self.base / "kept"
            await asyncio.to_thread(shutil.copytree, self.folder, kept)
            await self._unmount()
            self._image.unlink()
            self.folder.rmdir()
            kept.rename(self.folder)

    async def _mount(self) -> None:
        # The kernel commits by itself rarely, so that little is durable that nobody synced.
        await _run("mount", "-o", "loop,commit=300", str(self._image), str(self.folder))
        self._mounted = True

    async def _unmount(self) -> None:
        await _run("umount", str(self.folder))
        self._mounted = False


def images_work(base: Path) -> str:
    """Why ext4 images cannot be mounted here; empty if they can."""
    if os.geteuid():
        return "only root may mount"
    if not shutil.which("mkfs.ext4"):
        return "mkfs.ext4 is not installed"

    async def attempt() -> None:
        disk = ImageDisk(base / "attempt")
        try:
            await disk.open()
        finally:
            await disk.close()

    try:
        asyncio.run(attempt())
    except (OSError, subprocess.CalledProcessError) as error:
        return f"an ext4 image cannot be mounted: {error}"
    return ""


class StrictDisk(PlainDisk):
    """A folder of which a crash leaves what was synced, as `buggy_intake --note-syncs` noted."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self._notes = base / "syncs.jsonl"
        self._sizes: dict[int, int] = {}
        self._names: dict[str, dict[str, int]] = {}
        self.lost_names = self.lost_bytes = 0
        """What crashes took so far."""
        self.arguments = ("--note-syncs", str(self._notes))

    async def crash(self, intake: RoleProcess) -> None:
        await intake.kill()
        self._read_notes()
        await asyncio.to_thread(self._rewrite)

    def _read_notes(self) -> None:
        if not self._notes.exists():
            return
        for line in self._notes.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            note = json.loads(line)
            if "folder" in note:
                self._names[note["folder"]] = note["names"]
            else:
                self._sizes[note["file"]] = note["size"]
        self._notes.unlink()

    def _rewrite(self) -> None:
        files = {path.lstat().st_ino: path for path in _walk(self.folder)}
        strict = self.base / "strict"
        self._copy(self.folder, strict, files)
        shutil.rmtree(self.folder)
        strict.rename(self.folder)
        # All of it is on the disk now; what follows is noted anew.
        self._sizes = {p.lstat().st_ino: p.stat().st_size for p in _walk(self.folder)}
        self._names = {}
        for folder in (self.folder, *(p for p in _walk(self.folder) if p.is_dir())):
            self._names[str(folder)] = {p.name: p.lstat().st_ino for p in folder.iterdir()}

    def _copy(self, source: Path, target: Path, files: dict[int, Path]) -> None:
        target.mkdir()
        names = self._names.get(str(source), {})
        self.lost_names += len({path.name for path in source.iterdir()} - names.keys())
        for name, inode in names.items():
            path = files.get(inode)
            if path is None:  # removed since; whether that was durable does not matter here
                continue
            if path.is_dir():
                self._copy(path, target / name, files)
                continue
            data = path.read_bytes()
            synced = min(self._sizes.get(inode, 0), len(data))
            self.lost_bytes += len(data) - synced
            (target / name).write_bytes(data[:synced])


def _walk(folder: Path) -> Iterator[Path]:
    yield from folder.rglob("*")


async def _run(*command: str) -> None:
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
