"""The weight store: assembles versions from parts, keeps the newest, announces it.

    parts of all ranks -> publication -> verified, all there -> version -> watchers, fetchers
                              |
                              +-> one part fails, ends or is late: discarded whole

| call    | waits for                    | woken by                               |
|---------|------------------------------|----------------------------------------|
| publish | the other parts              | the commit, a discard, `close`         |
| watch   | a version newer than its own | the commit, `close`                    |
| fetch   | nothing                      |                                        |
"""

import asyncio
import contextlib
import logging
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from learner.intake.publication import Part, Publication, Upload, Version
from learner.intake.refusals import RefusedError, draining
from learner.intake.slices import Layout, check_cover, check_slice, check_values
from understudy import metrics

_log = logging.getLogger(__name__)

THREAD_BYTES = 2**20
"""Parts above this are verified on a thread."""

Issue = Callable[[int, int], Awaitable[int]]
"""Gives a version to the weights after a step of a trainer's epoch, durably, before anybody can
fetch it: whoever samples with it must find it known when the tokens come back."""
OnCommit = Callable[[Version, float], None]
"""Told of a version and the seconds since its first part."""


class Announcement(NamedTuple):
    """What watchers are told. Not the version itself: a slow watcher would keep its bytes."""

    version: int
    step: int


class WeightStore:
    """Owns the versions of a run. Full copies only: the newest, and older ones while fetched.

    Args:
        present_epoch: tells the epoch of the trainer that started last; only that one may publish.
        issue: see Issue.
        on_commit: see OnCommit.
    """

    def __init__(self, present_epoch: Callable[[], int], issue: Issue, on_commit: OnCommit) -> None:
        self._present_epoch = present_epoch
        self._issue = issue
        self._on_commit = on_commit
        self._changed = asyncio.Condition()
        self._closed = False
        self._layout: Layout | None = None
        self._publication: Publication | None = None
        self._newest: Version | None = None
        # An older version lives as long as somebody who fetches it holds it.
        self._held: weakref.WeakValueDictionary[int, Version] = weakref.WeakValueDictionary()

    @property
    def newest_version(self) -> int:
        """Number of the newest version that is held; 0 before the first."""
        return self._newest.version if self._newest else 0

    async def close(self) -> None:
        """Refuse what waits and what comes."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    # Publishing.

    @contextlib.asynccontextmanager
    async def upload(self, part: Part) -> AsyncIterator[Upload]:
        """Take part in a publication. If the block ends with an error, or is cancelled because
        its deadline passed, the publication is discarded whole.

        Raises:
            RefusedError: OLD_EPOCH, WRONG_BASE, PART_CONFLICT, BAD_MANIFEST.
        """
        publication = await self._join(part)
        try:
            for piece in part.slices:
                check_slice(piece, self._layout)
            yield Upload(part, publication)
        except BaseException as error:  # also a cancelled call: its part will never come
            await self._discard(publication, f"part {part.index}: {str(error) or 'its call ended'}")
            raise

    async def commit(self, upload: Upload) -> int:
        """Verify a part, wait for the others, and return the version that was issued.

        Raises:
            RefusedError: BAD_MANIFEST, BAD_DIGEST, NON_FINITE, MISSING_TENSOR,
                PUBLICATION_DISCARDED, DRAINING.
        """
        publication = upload.publication
        upload.require_whole()
        if len(upload.payload) > THREAD_BYTES:
            await asyncio.to_thread(check_values, upload.part.slices, upload.payload)
        else:
            check_values(upload.part.slices, upload.payload)
        async with self._changed:
            publication.require_open()
            publication.verified[upload.part.index] = upload
            if len(publication.verified) == publication.num_parts:
                await self._commit(publication)
            await self._changed.wait_for(
                lambda: publication.version or publication.discarded or self._closed
            )
        if publication.version:
            return publication.version
        publication.require_open()
        raise draining()

    async def _join(self, part: Part) -> Publication:
        if part.base_version:
            raise RefusedError(
                "WRONG_BASE", f"base_version {part.base_version}; publish a full copy: 0"
            )
        if not part.index < part.num_parts:
            raise RefusedError("BAD_MANIFEST", f"part {part.index} of {part.num_parts}")
        async with self._changed:
            if self._closed:
                raise draining()
            epoch = self._present_epoch()
            if part.epoch != epoch:
                raise RefusedError(
                    "OLD_EPOCH",
                    f"epoch {part.epoch}; the present trainer's is {epoch}: StartTraining gives a "
                    "new one",
                )
            if self._publication and self._publication.epoch != epoch:
                self._give_up(self._publication, f"epoch {epoch} took over")
            if self._publication:
                self._publication.require_same(part)
            else:
                self._publication = Publication(
                    epoch=part.epoch, step=part.step, num_parts=part.num_parts
                )
            self._publication.announced.add(part.index)
            return self._publication

    async def _discard(self, publication: Publication, reason: str) -> None:
        async with self._changed:
            self._give_up(publication, reason)

    def _give_up(self, publication: Publication, reason: str) -> None:
        if publication.version or publication.discarded:
            return
        _log.error("weights of step %d discarded: %s", publication.step, reason)
        publication.discarded = reason
        publication.verified.clear()
        if self._publication is publication:
            self._publication = None
        self._changed.notify_all()

    async def _commit(self, publication: Publication) -> None:
        slices = tuple(piece for upload in publication.uploads for piece in upload.part.slices)
        self._layout = check_cover(slices, self._layout)
        # Shielded: a call that is cancelled here must not leave a version that is half issued.
        issue = asyncio.ensure_future(self._issue(publication.step, publication.epoch))
        number = await asyncio.shield(issue)
        seconds = time.perf_counter() - publication.started
        version = Version(
            version=number,
            step=publication.step,
            epoch=publication.epoch,
            slices=slices,
            probe=publication.uploads[0].part.probe,
            payloads=[upload.payload for upload in publication.uploads],
        )
        self._newest = version
        self._held[version.version] = version
        self._publication = None
        publication.version = version.version
        publication.verified.clear()
        self._on_commit(version, seconds)
        metrics.WEIGHT_PUBLISH_SECONDS.observe(seconds)
        metrics.POLICY_VERSION.set(version.version)
        self._changed.notify_all()

    # Reading.

    async def watch(self) -> AsyncIterator[Announcement]:
        """The newest version, then the newest each time that there is a newer one.

        Raises:
            RefusedError: DRAINING.
        """
        seen = 0
        while True:
            async with self._changed:
                while not self._closed and self.newest_version <= seen:
                    await self._changed.wait()
                if self._closed or self._newest is None:
                    raise draining()
                announcement = Announcement(self._newest.version, self._newest.step)
            seen = announcement.version
            yield announcement

    def get(self, number: int) -> Version:
        """A version that is held; 0 for the newest.

        Raises:
            RefusedError: UNKNOWN_VERSION.
        """
        version = self._held.get(number) if number else self._newest
        if version is None:
            raise RefusedError(
                "UNKNOWN_VERSION",
                f"version {number} is not held; {self.newest_version} is newest, ask for 0",
            )
        return version
