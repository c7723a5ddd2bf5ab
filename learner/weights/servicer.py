"""WeightService of the store: decodes, calls, encodes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from learner.weights.bundle import Bundle
from learner.weights.refusals import mapped
from learner.weights.store import WeightStore
from understudy import metrics
from understudy.v1 import weight_pb2, weight_pb2_grpc
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.links import CHUNK_BYTES, Link, fetch_responses
from understudy.weights.manifest import check_seal

MAX_REPLICA_ID_BYTES = 64
READ_ON_SECONDS = 2.0
"""Longest that a refused part is still read."""
Publish = AsyncIterator[weight_pb2.PublishWeightsRequest]


class WeightServicer(weight_pb2_grpc.WeightServiceServicer):
    """Serves a weight store and the model bundle."""

    def __init__(self, store: WeightStore, bundle: Bundle, run_id: str) -> None:
        self.store = store
        self.bundle = bundle
        self.run_id = run_id
        self._bytes_served = {
            based: metrics.WEIGHT_BYTES.labels("delta" if based else "full")
            for based in (False, True)
        }

    async def PublishWeights(
        self, requests: Publish, context: object
    ) -> weight_pb2.PublishWeightsResponse:
        with mapped():
            try:
                version = await self._publish(requests)
            except WeightsRefusedError:
                await _read_on(requests)
                raise
        return weight_pb2.PublishWeightsResponse(version=version)

    async def _publish(self, requests: Publish) -> int:
        first = await anext(requests, None)
        if first is None or not first.HasField("header"):
            raise WeightsRefusedError("BAD_MANIFEST", "the first message is the part's header")
        check_part(first.header, self.run_id)
        return await self.store.publish(first.header, _chunks(requests))

    async def WatchVersions(
        self, request: weight_pb2.WatchVersionsRequest, context: object
    ) -> AsyncIterator[weight_pb2.WatchVersionsResponse]:
        with mapped():
            if len(request.replica_id.encode()) > MAX_REPLICA_ID_BYTES:
                raise WeightsRefusedError(
                    "BAD_REQUEST", f"replica_id is above {MAX_REPLICA_ID_BYTES} bytes"
                )
            async for announced in self.store.watch():
                yield weight_pb2.WatchVersionsResponse(
                    run_id=self.run_id,
                    version=announced.version,
                    step=announced.step,
                    bundle_digest=self.bundle.digest,
                )

    async def FetchWeights(
        self, request: weight_pb2.FetchWeightsRequest, context: object
    ) -> AsyncIterator[weight_pb2.FetchWeightsResponse]:
        with mapped():
            async for response in fetch_responses(self.store.links, request, self._sent):
                yield response

    def _sent(self, link: Link, num_bytes: int) -> None:
        self._bytes_served[bool(link.base_version)].inc(num_bytes)

    async def FetchModelBundle(
        self, request: weight_pb2.FetchModelBundleRequest, context: object
    ) -> AsyncIterator[weight_pb2.FetchModelBundleResponse]:
        for response in _encode_bundle(self.bundle):
            yield response


async def _read_on(requests: Publish) -> None:
    """Read what a refused client still sends, for a while: one of grpc.aio that writes to a call
    that has ended is told INTERNAL instead of the reason."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READ_ON_SECONDS):
            async for _ in requests:
                pass


async def _chunks(requests: Publish) -> AsyncIterator[bytes]:
    async for request in requests:
        # None is grpc's word for bytes that are no message.
        if request is None or not request.HasField("chunk"):
            raise WeightsRefusedError("BAD_PAYLOAD", "a message without a chunk in the payload")
        yield request.chunk


def check_part(header: weight_pb2.PartHeader, run_id: str) -> None:
    """Check what a part says beside its slices, and that it says what was sent.

    Raises:
        WeightsRefusedError: BAD_MANIFEST.
    """
    check_seal(header)
    if header.run_id != run_id:
        raise WeightsRefusedError("BAD_MANIFEST", f"run_id {header.run_id!r}; served is {run_id!r}")
    if not header.part_index < header.num_parts:
        raise WeightsRefusedError("BAD_MANIFEST", f"part {header.part_index} of {header.num_parts}")
    tokens, logprobs = header.probe.token_ids, header.probe.logprobs
    if tokens and len(logprobs) != len(tokens) - 4:
        raise WeightsRefusedError(
            "BAD_MANIFEST", f"probe: {len(logprobs)} B for {len(tokens)} B of tokens"
        )


def _encode_bundle(bundle: Bundle) -> Iterator[weight_pb2.FetchModelBundleResponse]:
    yield weight_pb2.FetchModelBundleResponse(
        header=weight_pb2.ModelBundleHeader(
            bundle_digest=bundle.digest,
            files=[
                weight_pb2.BundleFile(
                    name=file.name, num_bytes=len(file.content), digest=file.digest
                )
                for file in bundle.files
            ],
        )
    )
    for file in bundle.files:
        for start in range(0, len(file.content), CHUNK_BYTES):
            chunk = file.content[start : start + CHUNK_BYTES]
            yield weight_pb2.FetchModelBundleResponse(chunk=chunk)
