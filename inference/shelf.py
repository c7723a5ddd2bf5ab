"""What a replica holds for other nodes: model bundle, newest version in full, and deltas to it.

    fetched and verified -> Shelf -> WatchVersions, FetchWeights of nodes further down

Deltas are kept as the bytes that came. The full copy is not kept a second time: it is read from the
shadow.
"""

import asyncio
import bisect
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator

from inference.fetch import HeldVersion
from inference.weights import Shadow
from understudy.client.bundle import ModelBundle
from understudy.v1 import weight_pb2
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.links import Link, LinkSet
from understudy.weights.manifest import full_manifest, slice_bytes

_MAX_DELTAS = 32
"""Deltas that are kept, if they are no more bytes than the model."""


class ShelfClosedError(Exception):
    """The process ends."""


class Shelf:
    """Holds the newest version that is verified, whether it is served yet or not."""

    def __init__(self) -> None:
        self.bundle: ModelBundle | None = None
        self.links = LinkSet(_MAX_DELTAS)
        self._shadow: Shadow | None = None
        self._changed = asyncio.Event()
        self._is_closed = False

    def put(self, version: HeldVersion) -> None:
        """Hold a version, and announce it."""
        for delta in version.weights.deltas:
            if delta.base_version == self.links.newest_version:
                self.links.add(delta)
        manifest = full_manifest(version.weights.manifest)
        self.links.add(Link(manifest=manifest, payload=ShadowPayload(version.shadow, manifest)))
        self._shadow = version.shadow
        self._wake()

    def close(self) -> None:
        """End all watches."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def watch(self) -> AsyncIterator[weight_pb2.WeightManifest]:
        """The newest version, then each newer one. Raises ShelfClosedError."""
        seen = 0
        while not self._is_closed:
            newest = self.links.newest
            if newest is not None and newest.version > seen:
                seen = newest.version
                yield newest.manifest
            else:
                await self._changed.wait()
        raise ShelfClosedError

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep the newest version's shadow from being overwritten, as far as there is memory."""
        with self._shadow.reading() if self._shadow else contextlib.nullcontext():
            yield


class ShadowPayload:
    """The payload of a full copy, read from a shadow for as long as that has it."""

    def __init__(self, shadow: Shadow, manifest: weight_pb2.WeightManifest) -> None:
        self._shadow = shadow
        self._manifest = manifest
        self._ends = list(itertools.accumulate(piece.num_bytes for piece in manifest.slices))
        self.num_bytes = manifest.payload_bytes

    async def read(self, offset: int, num_bytes: int) -> bytes:
        """So many bytes from an offset on. Raises WeightsRefusedError: UNKNOWN_VERSION if gone."""
        if self._shadow.version != self._manifest.version:
            raise WeightsRefusedError(
                "UNKNOWN_VERSION",
                f"version {self._manifest.version} had to make room during the transfer; ask for "
                "the newest",
            )
        pieces, index = [], bisect.bisect_right(self._ends, offset)
        while num_bytes and index < len(self._ends):
            piece = self._manifest.slices[index]
            start = offset - (self._ends[index] - piece.num_bytes)
            found = slice_bytes(piece, self._shadow)[start : start + num_bytes]
            pieces.append(found.data)
            offset, num_bytes, index = offset + len(found), num_bytes - len(found), index + 1
        return b"".join(pieces)
