"""The folder of a run's weights. Everything here blocks: call it on a thread.

<run>/weights/full-00000040.weights     a full copy of version 40
              delta-00000041.weights    what leads from 40 to 41
              *.new                     not finished; removed at the next start
              *.damaged                 set aside; nobody reads it again
"""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from learner.log.lock import lock_folder
from learner.weights.link_file import (
    SUFFIX,
    DamagedLinkError,
    link_path,
    read_link,
    write_link,
)
from understudy.errors import ConfigError
from understudy.files import NEW_SUFFIX, make_folder
from understudy.v1 import weight_pb2
from understudy.weights.links import Link

DAMAGED_SUFFIX = ".damaged"
_log = logging.getLogger(__name__)


class WeightDisk:
    """Files of links, of one run, for one process at a time; made by `open`."""

    def __init__(self, folder: Path, run_id: str, lock: int) -> None:
        self.folder = folder
        self.run_id = run_id
        self.lost_any = False
        """Whether a link was set aside: there may be newer versions than those that are held."""
        self._lock = lock

    @classmethod
    def open(cls, folder: Path, run_id: str) -> Self:
        """Take the folder for this process, and remove what was not finished.

        Raises:
            ConfigError: another process has it, or it cannot be written.
        """
        try:
            make_folder(folder)
            lock = lock_folder(folder, run_id, "weight store")
            for path in folder.glob(f"*{NEW_SUFFIX}"):
                path.unlink()
        except OSError as error:
            raise ConfigError(
                f"run.directory: {folder} cannot be written ({error.strerror}); choose another"
            ) from None
        return cls(folder, run_id, lock)

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._lock)

    def write(self, manifest: weight_pb2.WeightManifest, payload: Iterable[memoryview]) -> Link:
        """Write a link, durably. Raises OSError; there is no such link then."""
        return write_link(self.folder, manifest, payload)

    def remove(self, links: Iterable[Link]) -> None:
        """Delete links' files; whoever reads one goes on reading."""
        for link in links:
            path = link_path(self.folder, link.manifest)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # the next start finds it again
                _log.warning("%s was not removed: %s", path, error)

    def read_links(self) -> list[Link]:
        """All links whose manifests are sound and of this run; others are set aside."""
        links = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                link = read_link(path)
                if link.manifest.run_id != self.run_id:
                    raise DamagedLinkError(f"{path}: of run {link.manifest.run_id!r}")
            except (DamagedLinkError, OSError) as error:
                self._set_aside(path, str(error))
            else:
                links.append(link)
        return links

    def set_aside(self, link: Link, why: str) -> None:
        """Keep a link's file for people to look at."""
        self._set_aside(link_path(self.folder, link.manifest), why)

    def _set_aside(self, path: Path, why: str) -> None:
        self.lost_any = True
        _log.error("%s is set aside as %s%s: %s", path, path.name, DAMAGED_SUFFIX, why)
        path.replace(path.with_name(f"{path.name}{DAMAGED_SUFFIX}"))
