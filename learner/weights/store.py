"""The weight store: assembles versions from parts, keeps the newest ones, announces them.

| call    | waits for                               | woken by                                 |
|---------|-----------------------------------------|------------------------------------------|
| publish | a commit under way, then the other parts | the commit, a discard, `close`          |
| watch   | a version newer than its own             | the commit, `close`                     |
| fetch   | the disk                                 |                                         |

A commit: number from the intake -> file, synced -> head in memory -> announcement. One that fails
has every part's call told why; a number that was issued by then stays unused.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from typing import NamedTuple

from learner.weights.holdings import Holdings, Issue
from learner.weights.publication import Publication, Upload
from learner.weights.recovery import Recovered
from learner.weights.refusals import draining
from understudy import metrics
from understudy.v1 import weight_pb2
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.links import LinkSet

_log = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0
"""How long a commit that is under way may take at the end."""


class Announcement(NamedTuple):
    """What watchers are told."""

    version: int
    step: int


class WeightStore:
    """Owns the versions of a run.

    Args:
        recovered: what the disk has.
        keep_deltas: longest chain of deltas before a new full copy is written.
        issue: gives versions their numbers.
    """

    def __init__(self, recovered: Recovered, keep_deltas: int, issue: Issue) -> None:
        self._holdings = Holdings(recovered, keep_deltas)
        self._outdated = 0 if recovered.is_newest else self.newest_version
        """The version that the start found, if a newer one may have been lost."""
        self._issue = issue
        self._changed = asyncio.Condition()
        self._closed = False
        self._publication: Publication | None = None
        self._committing = False
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.POLICY_VERSION.set(self.newest_version)

    @property
    def newest_version(self) -> int:
        """Number of the newest version that is held; 0 before the first."""
        return self._holdings.newest_version

    @property
    def version_to_attach(self) -> int:
        """The newest version; 0 for one that has the trainer publish again."""
        return 0 if self.newest_version == self._outdated else self.newest_version

    @property
    def committing(self) -> bool:
        """Whether a version may have its number, but is not held yet."""
        return self._committing

    @property
    def links(self) -> LinkSet:
        """What can be fetched."""
        return self._holdings.links

    async def close(self) -> None:
        """Refuse what waits and what comes, and let go of the disk. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)
        for task in self._tasks:
            task.cancel()
        if self._publication:
            self._give_up(self._publication, draining())
        async with self._changed:
            self._changed.notify_all()
        self._holdings.close()

    # Publishing.

    async def publish(self, part: weight_pb2.PartHeader, chunks: AsyncIterator[bytes]) -> int:
        """Take a part, wait for the others, and return the version that was issued. If this ends
        with an error, or is cancelled, before all parts are there, the publication is discarded.

        Args:
            part: of this run, with a sound probe.
            chunks: its payload.

        Raises:
            WeightsRefusedError: with the reasons of WeightService.PublishWeights.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or not self._committing)
            if self._closed:
                raise draining()
            if version := self._same_as_newest(part):
                return version
            publication = self._join(part)
        try:
            upload = await self._receive(part, publication, chunks)
        except BaseException as error:  # also a cancelled call: its part will never come
            if isinstance(error, WeightsRefusedError):
                publication.require_open()  # what ended it came first
            self._discard(publication, f"part {part.part_index}: {str(error) or 'its call ended'}")
            raise
        return await self._finish(publication, upload)

    def _same_as_newest(self, part: weight_pb2.PartHeader) -> int:
        """The newest version if a part says the same; else 0.

        Of a version after which one was lost, it is 0: what is published again has to be newer, or
        the trainer would be told for ever that the weights are lost.
        """
        head = self._holdings.head
        if head is None or not self.version_to_attach:
            return 0
        if (part.epoch, part.step) != (head.manifest.epoch, head.manifest.step):
            return 0
        return head.version if all(map(head.holds, part.slices)) else 0

    def _join(self, part: weight_pb2.PartHeader) -> Publication:
        head = self._holdings.head
        newest = head.manifest.epoch if head else 0
        running = self._publication
        if part.epoch < max(newest, running.epoch if running else 0):
            raise WeightsRefusedError(
                "OLD_EPOCH", f"epoch {part.epoch}; a later trainer has published: start anew"
            )
        if part.base_version not in (0, self.newest_version):
            raise WeightsRefusedError(
                "WRONG_BASE",
                f"base_version {part.base_version}; {self.newest_version} is newest: publish all "
                "values, base 0",
            )
        if running and part.epoch > running.epoch:
            self._discard(running, f"epoch {part.epoch} took over")
        if self._publication is None:
            self._publication = Publication(part)
        self._publication.join(part)
        return self._publication

    async def _receive(
        self, part: weight_pb2.PartHeader, publication: Publication, chunks: AsyncIterator[bytes]
    ) -> Upload:
        # On a thread: a part may have tens of thousands of slices, and others are served meanwhile.
        upload = await asyncio.to_thread(Upload, part, self._holdings.head)
        try:
            async for chunk in chunks:
                publication.require_open()
                upload.write(chunk)
            await upload.finish()
        finally:
            upload.close()
        publication.require_open()
        return upload

    async def _finish(self, publication: Publication, upload: Upload) -> int:
        """Wait for the commit, which the last part begins."""
        publication.verified[upload.part.part_index] = upload
        if publication.whole:
            self._committing = True
            self._start(self._commit(publication))
        try:
            # Shielded: a call that is cancelled must not leave a version that is half committed.
            return await asyncio.shield(publication.outcome)
        except asyncio.CancelledError:
            if not publication.whole:
                self._discard(publication, f"part {upload.part.part_index}: its call ended")
            raise

    def _discard(self, publication: Publication, reason: str) -> None:
        self._give_up(
            publication,
            WeightsRefusedError(
                "PUBLICATION_DISCARDED",
                f"step {publication.step} of epoch {publication.epoch}: {reason}; publish it again",
            ),
        )

    def _give_up(self, publication: Publication, error: Exception) -> None:
        if publication.outcome.done():
            return
        _log.error("weights of step %d discarded: %s", publication.step, error)
        publication.end(error)
        if self._publication is publication:
            self._publication = None

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Committing.

    async def _commit(self, publication: Publication) -> None:
        try:
            version = await self._holdings.commit(publication, self._issue)
        except Exception as error:  # whatever it is, the parts' calls are told
            self._give_up(publication, error)
        else:
            metrics.WEIGHT_PUBLISH_SECONDS.observe(time.perf_counter() - publication.started)
            metrics.POLICY_VERSION.set(version)
            publication.verified.clear()
            self._publication = None
            publication.outcome.set_result(version)
            self._start(self._holdings.compact())
        finally:
            self._committing = False
            async with self._changed:
                self._changed.notify_all()

    # Reading.

    async def watch(self) -> AsyncIterator[Announcement]:
        """The newest version, then the newest each time that there is a newer one.

        Raises:
            WeightsRefusedError: DRAINING.
        """
        seen = 0
        while True:
            async with self._changed:
                while not self._closed and self.newest_version <= seen:
                    await self._changed.wait()
                newest = self.links.newest
                if self._closed or newest is None:
                    raise draining()
                announcement = Announcement(newest.version, newest.manifest.step)
            seen = announcement.version
            yield announcement
