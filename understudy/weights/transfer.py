"""The receiving side of FetchWeights: a chain of links, applied while it comes, then verified.

    manifest -> lineage, slices -> buffer (the base's values, or none)
    chunks   -> a thread: each slice's bytes, once whole, are applied
    end      -> a thread: every digest of the version that the last link leads to

A buffer knows what its tensors were checked against since they were last written. What no link has
written to, as the model beside adapters that learn, is neither copied nor digested again.

A transfer that breaks goes on in the link and at the byte where it broke. Memory beyond the buffer:
the slice that is on its way, some chunks, and the deltas themselves where they are to be kept.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from understudy.v1 import weight_pb2, weight_pb2_grpc
from understudy.weights.cores import map_slices
from understudy.weights.encoding import DENSE, apply, require_finite
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import ByteArray, Layout, WeightBuffer, end_of
from understudy.weights.lineage import Lineage
from understudy.weights.links import Link, MemoryPayload
from understudy.weights.manifest import check_seal, check_slices, check_values, slice_bytes

_log = logging.getLogger(__name__)
_BATCH_BYTES = 4 * 2**20
"""Payload bytes that a thread is given at a time."""
_MAX_IDLE_RESUMES = 3
"""Transfers that may break behind each other without a byte in between."""
_MAX_KEPT = 64
"""Most deltas of a chain that are kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldWeights:
    """A whole version, verified."""

    manifest: weight_pb2.WeightManifest
    """The last link's."""
    buffer: WeightBuffer
    deltas: tuple[Link, ...] = ()
    """The deltas that came on the way, if they were to be kept and no more than a model's bytes."""

    @property
    def lineage(self) -> Lineage:
        """Run, epoch and version."""
        return Lineage.of(self.manifest)


Prepare = Callable[[Layout, HeldWeights | None], Awaitable[WeightBuffer]]
"""Makes a buffer of this layout with the values of a base; with any values where there is none."""


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """What is asked for."""

    current: HeldWeights | None
    """What is held, and what has to be followed; None for nothing."""
    whole: bool = False
    """Ask for a full copy although something is held."""
    target_version: int = 0
    """Version that is wanted; 0 for the newest."""
    keep_deltas: bool = False
    """Whether the deltas are wanted too, to pass them on."""
    timeout_seconds: float = 3600.0
    """Deadline of each call."""

    @property
    def base_version(self) -> int:
        """Version that a delta may start from; 0 for none."""
        return self.current.manifest.version if self.current and not self.whole else 0


def copy_values(source: WeightBuffer, target: WeightBuffer) -> None:
    """Copy between buffers of one layout what is not known to be equal; run it on a thread."""

    def copy(name: str) -> None:
        digests = source.checked.get(name)
        if digests is None or target.checked.get(name) != digests:
            target.checked.pop(name, None)
            target.tensor_bytes(name)[:] = source.tensor_bytes(name)

    map_slices(copy, (entry.name for entry in source.layout))


def check_written(slices: Iterable[weight_pb2.TensorSlice], buffer: WeightBuffer) -> None:
    """Check the digests of a whole version, but of tensors that were checked against the same ones
    since they were last written. Run it on a thread.

    Raises:
        WeightsRefusedError: BAD_DIGEST.
    """
    by_name: dict[str, list[weight_pb2.TensorSlice]] = defaultdict(list)
    for piece in slices:
        by_name[piece.name].append(piece)

    def check(name: str) -> None:
        pieces = sorted(by_name[name], key=lambda piece: piece.start)
        digests = b"".join(piece.start.to_bytes(8, "little") + piece.digest for piece in pieces)
        if buffer.checked.get(name) != digests:
            # All that was written on the way is finite: left to see is whether it is right.
            check_values(pieces, buffer, finite=False)
            buffer.checked[name] = digests

    map_slices(check, by_name)


async def fetch_weights(
    stub: "weight_pb2_grpc.WeightServiceAsyncStub", fetch: Fetch, prepare: Prepare
) -> HeldWeights | None:
    """Fetch a version and check all of it. What is held is not touched.

    Returns:
        The version, or None if the peer has nothing beyond what is held.

    Raises:
        WeightsRefusedError: with the reason.
        grpc.aio.AioRpcError: the peer is away, has no such version, or broke off too often.
    """
    chain = _Chain(fetch, prepare)
    request = weight_pb2.FetchWeightsRequest(
        base_version=fetch.base_version, target_version=fetch.target_version
    )
    breaks = _Breaks()
    try:
        while error := await _drain(stub, request, fetch.timeout_seconds, chain):
            breaks.count(chain.num_bytes, error)
            request = await chain.resume()
            _log.warning("transfer of version %d broke; resuming", request.resume_version)
        return await chain.finish()
    finally:
        await chain.close()


async def _drain(
    stub: "weight_pb2_grpc.WeightServiceAsyncStub",
    request: weight_pb2.FetchWeightsRequest,
    timeout: float,
    chain: "_Chain",
) -> grpc.aio.AioRpcError | None:
    """One call to its end, or to the break that is returned."""
    # What is begun is worth waiting for; the first call says at once that nobody is there.
    call: Any = stub.FetchWeights(request, timeout=timeout, wait_for_ready=chain.is_begun)
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            if response is None:  # grpc's word for bytes that are no message
                raise WeightsRefusedError("BAD_PAYLOAD", "a message that cannot be read")
            await chain.take(response)
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.UNAVAILABLE or not chain.is_begun:
            raise
        return error
    finally:
        call.cancel()
    return None


class _Breaks:
    """Gives up on a transfer that breaks again and again and does not get on."""

    def __init__(self) -> None:
        self._num_bytes, self._num_idle = 0, 0

    def count(self, num_bytes: int, error: grpc.aio.AioRpcError) -> None:
        self._num_idle = self._num_idle + 1 if num_bytes == self._num_bytes else 0
        self._num_bytes = num_bytes
        if self._num_idle > _MAX_IDLE_RESUMES:
            raise error


class _Chain:
    """The links of one fetch as they come."""

    def __init__(self, fetch: Fetch, prepare: Prepare) -> None:
        self._fetch = fetch
        self._prepare = prepare
        self._buffer: WeightBuffer | None = None
        self._link: LinkWriter | None = None
        self._received = 0
        """Payload bytes of this link that came."""
        self._again = False
        """This link's manifest comes a second time."""
        self._keeps = fetch.keep_deltas
        self._kept: list[Link] = []
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._pending: asyncio.Future[None] | None = None
        self.num_bytes = 0
        """Payload bytes of all links that came."""

    @property
    def is_begun(self) -> bool:
        """Whether there is something to resume."""
        return self._link is not None

    async def resume(self) -> weight_pb2.FetchWeightsRequest:
        """What to ask for after a break."""
        assert self._link is not None
        self._again = True
        return weight_pb2.FetchWeightsRequest(
            base_version=self._link.manifest.base_version,
            resume_version=self._link.manifest.version,
            offset=self._received,
            target_version=self._fetch.target_version,
        )

    async def take(self, response: weight_pb2.FetchWeightsResponse) -> None:
        """Take the next message. Raises WeightsRefusedError."""
        if response.HasField("manifest"):
            await self._take_manifest(response.manifest)
        else:
            await self._take_chunk(response.chunk)

    async def _take_manifest(self, manifest: weight_pb2.WeightManifest) -> None:
        check_seal(manifest)
        if self._again:
            assert self._link is not None
            if manifest != self._link.manifest:
                raise WeightsRefusedError("BAD_MANIFEST", "it changed during the transfer")
            self._again = False
            return
        await self._end_link()
        self._check_place(manifest)
        held = self._fetch.current
        known = self._buffer or (held.buffer if held else None)
        # On a thread: there may be tens of thousands of slices, and others are served meanwhile.
        layout = await asyncio.to_thread(check_link, manifest, known.layout if known else None)
        if self._buffer is None:
            self._buffer = await self._make_buffer(layout, based=bool(manifest.base_version))
        self._keeps = self._keeps and self._fits(manifest, layout)
        keeps = self._keeps and bool(manifest.base_version)
        self._link = LinkWriter(manifest, self._buffer, keeps=keeps)
        self._received = 0

    def _check_place(self, manifest: weight_pb2.WeightManifest) -> None:
        """Refuse a link that does not start where the one before it ended."""
        current = self._fetch.current
        if self._link is not None:
            start, allowed = Lineage.of(self._link.manifest), {self._link.manifest.version}
        else:
            start, allowed = (
                current.lineage if current else Lineage(),
                {0, self._fetch.base_version},
            )
        if manifest.base_version not in allowed:
            raise WeightsRefusedError(
                "WRONG_BASE",
                f"version {manifest.version} starts from {manifest.base_version}, here is "
                f"{max(allowed)}",
            )
        if manifest.base_version:
            start.check_next(Lineage.of(manifest))
        else:
            # It may be older than what is held: the links behind it lead on.
            start.check_run(manifest.run_id)
        if not manifest.version:
            raise WeightsRefusedError("BAD_MANIFEST", "version 0 is none")

    async def _make_buffer(self, layout: Layout, *, based: bool) -> WeightBuffer:
        try:
            return await self._prepare(layout, self._fetch.current if based else None)
        except (MemoryError, OSError, OverflowError, ValueError) as error:
            raise WeightsRefusedError(
                "BAD_MANIFEST", f"no memory for {end_of(layout)} bytes of weights: {error}"
            ) from None

    def _fits(self, manifest: weight_pb2.WeightManifest, layout: Layout) -> bool:
        """Whether the chain's deltas are still fewer bytes than the model; else they are let go."""
        kept = sum(link.num_bytes for link in self._kept)
        is_small = kept + manifest.payload_bytes <= end_of(layout)
        if not manifest.base_version or (is_small and len(self._kept) < _MAX_KEPT):
            return True
        self._kept.clear()
        return False

    async def _take_chunk(self, chunk: bytes) -> None:
        if self._link is None or self._again:
            raise WeightsRefusedError("BAD_MANIFEST", "a payload without its manifest")
        if not chunk:
            return
        self._received += len(chunk)
        self.num_bytes += len(chunk)
        if self._received > self._link.manifest.payload_bytes:
            raise WeightsRefusedError(
                "BAD_PAYLOAD", f"more than the {self._link.manifest.payload_bytes} bytes announced"
            )
        self._batch.append(chunk)
        self._batch_bytes += len(chunk)
        if self._batch_bytes >= _BATCH_BYTES:
            await self._hand_over()

    async def _hand_over(self) -> None:
        """Give the batch to a thread, once the one before is applied."""
        assert self._link is not None
        await self._settle()
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        self._pending = asyncio.ensure_future(asyncio.to_thread(self._link.write, batch))

    async def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            await pending

    async def _end_link(self) -> None:
        """The link, if there is one, has to be whole; apply what is left of it."""
        if self._link is None:
            return
        manifest = self._link.manifest
        if self._received != manifest.payload_bytes:
            raise WeightsRefusedError(
                "BAD_PAYLOAD", f"{self._received} of {manifest.payload_bytes} bytes came"
            )
        await self._hand_over()
        await self._settle()
        if self._keeps and manifest.base_version:
            self._kept.append(Link(manifest=manifest, payload=MemoryPayload(self._link.kept)))

    async def finish(self) -> HeldWeights | None:
        """Check the version that the chain led to."""
        await self._end_link()
        if self._link is None or self._buffer is None:
            return None
        manifest = self._link.manifest
        if self._fetch.current:
            self._fetch.current.lineage.check_next(Lineage.of(manifest))
        await asyncio.to_thread(check_written, manifest.slices, self._buffer)
        return HeldWeights(manifest=manifest, buffer=self._buffer, deltas=tuple(self._kept))

    async def close(self) -> None:
        """Wait for the thread: nothing writes to the buffer any more."""
        with contextlib.suppress(WeightsRefusedError):
            await self._settle()


def check_link(manifest: weight_pb2.WeightManifest, expected: Layout | None) -> Layout:
    """Check what a link announces, and return the layout of what it leads to.

    Args:
        manifest: the link's.
        expected: the model's layout; None if this link is to say what it is.

    Raises:
        WeightsRefusedError: as check_slices does.
    """
    layout = check_slices(manifest.slices, expected, based=bool(manifest.base_version))
    total = sum(piece.num_bytes for piece in manifest.slices)
    if total != manifest.payload_bytes:
        raise WeightsRefusedError(
            "BAD_MANIFEST", f"slices have {total} bytes, the payload {manifest.payload_bytes}"
        )
    return layout


class LinkWriter:
    """Applies a link's payload to a buffer as its bytes come."""

    def __init__(
        self, manifest: weight_pb2.WeightManifest, buffer: WeightBuffer, *, keeps: bool = False
    ) -> None:
        """
        Args:
            manifest: the link's, checked.
            buffer: values of its base; any for a full copy.
            keeps: also keep the payload.
        """
        self.manifest = manifest
        self.kept = bytearray()
        """The payload, if it is to be kept."""
        self._keeps = keeps
        self._buffer = buffer
        self._pieces = iter(manifest.slices)
        self._piece: weight_pb2.TensorSlice | None = None
        self._body: ByteArray = np.empty(0, np.uint8)
        self._missing: ByteArray = self._body
        """What the body still lacks."""
        self._whole: list[tuple[weight_pb2.TensorSlice, ByteArray]] = []
        """Slices that are there and not applied yet, with their bytes."""

    def write(self, chunks: Sequence[bytes]) -> None:
        """Take the payload's next bytes, no more than the manifest announced.

        Raises:
            WeightsRefusedError: BAD_PAYLOAD, NON_FINITE.
        """
        for chunk in chunks:
            if self._keeps:
                self.kept += chunk
            data = np.frombuffer(chunk, np.uint8)
            while len(data):
                self._open_next()
                count = min(len(self._missing), len(data))
                self._missing[:count] = data[:count]
                self._missing, data = self._missing[count:], data[count:]
        self._open_next()
        whole, self._whole = self._whole, []
        map_slices(self._apply, whole)

    def _open_next(self) -> None:
        """Put the slice aside if it is whole, and those behind it that have no bytes."""
        while not len(self._missing):
            if self._piece is not None:
                self._whole.append((self._piece, self._body))
            self._piece = next(self._pieces, None)
            if self._piece is None:
                return
            if self._piece.encoding == DENSE or self._piece.num_changed:
                self._buffer.checked.pop(self._piece.name, None)
            # Dense bytes are the values: they go where they belong at once.
            self._body = (
                slice_bytes(self._piece, self._buffer)
                if self._piece.encoding == DENSE
                else np.empty(self._piece.num_bytes, np.uint8)
            )
            self._missing = self._body

    def _apply(self, whole: tuple[weight_pb2.TensorSlice, ByteArray]) -> None:
        piece, body = whole
        if piece.encoding == DENSE:
            require_finite(piece, body)
        else:
            apply(piece, body, slice_bytes(piece, self._buffer))
