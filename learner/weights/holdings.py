"""What the store holds: the newest version in memory, and the links that lead to it on disk.

A new full copy takes the place of a long chain of deltas. It is written from memory, while commits
wait.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable

from learner.weights.head import Head
from learner.weights.publication import Publication
from learner.weights.recovery import Recovered
from understudy import failpoints
from understudy.v1 import weight_pb2
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import Layout
from understudy.weights.links import LinkSet
from understudy.weights.manifest import check_slices, seal

_log = logging.getLogger(__name__)

Issue = Callable[[weight_pb2.IssueVersionRequest], Awaitable[int]]
"""Gives a number to verified weights, durably, before anybody can fetch them: whoever samples with
them must find it known when the tokens come back. Raises WeightsRefusedError."""


class Holdings:
    """Changes by one commit or compaction at a time.

    Args:
        recovered: what the disk has.
        keep_deltas: longest chain of deltas before a new full copy is written.
    """

    def __init__(self, recovered: Recovered, keep_deltas: int) -> None:
        self.links = LinkSet(keep_deltas)
        self.head = recovered.head
        """The newest version; None before the first."""
        self._disk = recovered.disk
        self._keep_deltas = keep_deltas
        self._changing = asyncio.Lock()
        self._broken = False
        for link in recovered.links:
            self.links.add(link)

    @property
    def newest_version(self) -> int:
        """Number of the newest version that can be fetched; 0 before the first."""
        return self.links.newest_version

    def close(self) -> None:
        """Let go of the disk."""
        self._disk.close()

    async def commit(self, publication: Publication, issue: Issue) -> int:
        """Make verified parts the newest version, and return its number.

        Raises:
            WeightsRefusedError: what check_slices and `issue` refuse; STORE_FAILED. What is held is
                as before.
        """
        async with self._changing:
            manifest = _manifest_of(publication, self.newest_version)
            layout = await asyncio.to_thread(
                check_slices,
                manifest.slices,
                self.head.layout if self.head else None,
                based=bool(manifest.base_version),
            )
            head = self.head or _new_head(layout)
            manifest.version = await self._number(manifest, publication.started, issue)
            seal(manifest)
            failpoints.hit("weights.after_issue")
            await self._take(head, manifest, publication)
            return manifest.version

    async def _number(
        self, manifest: weight_pb2.WeightManifest, started: float, issue: Issue
    ) -> int:
        if self._broken:
            raise WeightsRefusedError("STORE_FAILED", "a commit failed; start the store again")
        number = await issue(
            weight_pb2.IssueVersionRequest(
                run_id=manifest.run_id,
                epoch=manifest.epoch,
                step=manifest.step,
                payload_bytes=manifest.payload_bytes,
                publish_seconds=time.perf_counter() - started,
            )
        )
        if number <= self.newest_version:
            raise WeightsRefusedError(
                "STORE_FAILED",
                f"version {number} was issued, {self.newest_version} is held: the log is not that "
                f"of {self._disk.folder}; restore the log, or delete the folder",
            )
        return number

    async def _take(
        self, head: Head, manifest: weight_pb2.WeightManifest, publication: Publication
    ) -> None:
        uploads = publication.uploads
        payload = [upload.payload.data for upload in uploads]
        try:
            link = await asyncio.to_thread(self._disk.write, manifest, payload)
        except OSError as error:
            raise WeightsRefusedError(
                "STORE_FAILED", f"{error.filename}: {error.strerror}; free space, or mend the disk"
            ) from error
        failpoints.hit("weights.after_write")
        bodies = itertools.chain.from_iterable(upload.bodies for upload in uploads)
        self._broken = True  # until the values are the new ones; the link is on disk by now
        await asyncio.to_thread(head.apply, manifest, bodies)
        self._broken = False
        self.head = head
        await asyncio.to_thread(self._disk.remove, self.links.add(link))
        failpoints.hit("weights.after_remove")

    async def compact(self) -> None:
        """Write a full copy if the chain of deltas is long, by number or by bytes."""
        async with self._changing:
            if self.head is None or not self._chain_is_long():
                return
            manifest, payload = self.head.full_copy()
            try:
                link = await asyncio.to_thread(self._disk.write, manifest, payload)
            except OSError as error:  # the chain serves as well; the next commit tries again
                _log.warning("no new full copy: %s: %s", error.filename, error.strerror)
                return
            failpoints.hit("weights.after_full_copy")
            _log.info("version %d is the new full copy", link.version)
            await asyncio.to_thread(self._disk.remove, self.links.add(link))

    def _chain_is_long(self) -> bool:
        full, links = self.links.full, self.links
        too_large = full is not None and 2 * links.chain_bytes > full.num_bytes
        return too_large or links.chain_length > self._keep_deltas


def _manifest_of(publication: Publication, newest: int) -> weight_pb2.WeightManifest:
    """What the parts lead to, without its number."""
    parts = [upload.part for upload in publication.uploads]
    return weight_pb2.WeightManifest(
        run_id=parts[0].run_id,
        base_version=newest if any(part.base_version for part in parts) else 0,
        step=publication.step,
        epoch=publication.epoch,
        slices=[piece for part in parts for piece in part.slices],
        probe=parts[0].probe,
        payload_bytes=sum(len(upload.payload) for upload in publication.uploads),
    )


def _new_head(layout: Layout) -> Head:
    try:
        return Head(layout)
    except (MemoryError, ValueError):
        raise WeightsRefusedError("BAD_MANIFEST", "no memory for so many values") from None
