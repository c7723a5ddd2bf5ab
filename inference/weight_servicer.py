"""WeightService of a node that passes on what it holds: decodes, calls, encodes."""

import contextlib
from collections.abc import AsyncIterator, Iterator

import grpc

from inference.shelf import Shelf, ShelfClosedError
from understudy import metrics
from understudy.rpc import ServiceError
from understudy.v1 import weight_pb2, weight_pb2_grpc
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.links import CHUNK_BYTES, Link, fetch_responses

_MAX_REPLICA_ID_BYTES = 64
_RETRY_SECONDS = 1.0
_CODES = {
    "BAD_REQUEST": grpc.StatusCode.INVALID_ARGUMENT,
    "UNKNOWN_VERSION": grpc.StatusCode.NOT_FOUND,
}


class PassingWeightServicer(weight_pb2_grpc.WeightServiceServicer):
    """Serves a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    async def PublishWeights(
        self, requests: AsyncIterator[weight_pb2.PublishWeightsRequest], context: object
    ) -> weight_pb2.PublishWeightsResponse:
        raise ServiceError(
            grpc.StatusCode.UNIMPLEMENTED,
            "PASSES_ON",
            "this node passes weights on; publish to the learner's weight store",
        )

    async def WatchVersions(
        self, request: weight_pb2.WatchVersionsRequest, context: object
    ) -> AsyncIterator[weight_pb2.WatchVersionsResponse]:
        with _mapped():
            if len(request.replica_id.encode()) > _MAX_REPLICA_ID_BYTES:
                raise WeightsRefusedError(
                    "BAD_REQUEST", f"replica_id is above {_MAX_REPLICA_ID_BYTES} bytes"
                )
            async for manifest in self.shelf.watch():
                bundle = self.shelf.bundle
                yield weight_pb2.WatchVersionsResponse(
                    run_id=manifest.run_id,
                    version=manifest.version,
                    step=manifest.step,
                    bundle_digest=bundle.digest if bundle else "",
                )

    async def FetchWeights(
        self, request: weight_pb2.FetchWeightsRequest, context: object
    ) -> AsyncIterator[weight_pb2.FetchWeightsResponse]:
        with _mapped(), self.shelf.reading():
            async for response in fetch_responses(self.shelf.links, request, _count):
                yield response

    async def FetchModelBundle(
        self, request: weight_pb2.FetchModelBundleRequest, context: object
    ) -> AsyncIterator[weight_pb2.FetchModelBundleResponse]:
        bundle = self.shelf.bundle
        if bundle is None:
            raise ServiceError(
                grpc.StatusCode.UNAVAILABLE,
                "STARTING",
                "this node has no model bundle itself yet",
                retry_after_seconds=_RETRY_SECONDS,
            )
        yield weight_pb2.FetchModelBundleResponse(header=bundle.header)
        start = 0
        for file in bundle.header.files:
            end = start + file.num_bytes
            for offset in range(start, end, CHUNK_BYTES):
                chunk = bundle.content[offset : min(offset + CHUNK_BYTES, end)]
                yield weight_pb2.FetchModelBundleResponse(chunk=chunk)
            start = end


def _count(link: Link, num_bytes: int) -> None:
    metrics.WEIGHT_BYTES.labels("delta" if link.base_version else "full").inc(num_bytes)


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except WeightsRefusedError as error:
        raise ServiceError(_CODES[error.reason], error.reason, error.detail) from error
    except ShelfClosedError:
        raise ServiceError(
            grpc.StatusCode.UNAVAILABLE, "DRAINING", "this node is stopping; try another"
        ) from None
