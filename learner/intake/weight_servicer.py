"""WeightService: decodes, calls, encodes."""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from learner.intake.bundle import Bundle
from learner.intake.journal import Journal
from learner.intake.publication import Part, Probe, Version
from learner.intake.refusals import RefusedError, mapped
from learner.intake.slices import Slice, TensorType
from learner.intake.weight_store import WeightStore
from understudy import metrics
from understudy.v1 import weight_pb2, weight_pb2_grpc

CHUNK_BYTES = 2**20
MAX_REPLICA_ID_BYTES = 64
Publish = AsyncIterator[weight_pb2.PublishWeightsRequest]


class WeightServicer(weight_pb2_grpc.WeightServiceServicer):
    """Serves the weight store and the model bundle."""

    def __init__(self, store: WeightStore, bundle: Bundle, journal: Journal, run_id: str) -> None:
        self.store = store
        self.bundle = bundle
        self.journal = journal
        self.run_id = run_id
        self.replica_versions: dict[str, int] = {}
        """Version that each replica said it serves; forgotten when its watch ends."""
        self._watches: Counter[str] = Counter()
        self._bytes_served = metrics.WEIGHT_BYTES.labels("dense")

    async def PublishWeights(
        self, requests: Publish, context: object
    ) -> weight_pb2.PublishWeightsResponse:
        with mapped():
            first = await anext(requests, None)
            if first is None or not first.HasField("header"):
                raise RefusedError("BAD_MANIFEST", "the first message is the part's header")
            async with self.store.upload(_decode_part(first.header, self.run_id)) as upload:
                async for request in requests:
                    upload.write(request.chunk)
                version = await self.store.commit(upload)
        return weight_pb2.PublishWeightsResponse(version=version)

    async def WatchVersions(
        self, request: weight_pb2.WatchVersionsRequest, context: object
    ) -> AsyncIterator[weight_pb2.WatchVersionsResponse]:
        with mapped(), self._watching(request.replica_id):
            async for version in self.store.watch():
                yield weight_pb2.WatchVersionsResponse(
                    run_id=self.run_id,
                    version=version.version,
                    step=version.step,
                    bundle_digest=self.bundle.digest,
                )

    @contextlib.contextmanager
    def _watching(self, replica_id: str) -> Iterator[None]:
        _check_replica_id(replica_id)
        self._watches[replica_id] += 1
        try:
            yield
        finally:
            self._watches[replica_id] -= 1
            if not self._watches[replica_id]:
                del self._watches[replica_id]
                self.replica_versions.pop(replica_id, None)

    async def FetchWeights(
        self, request: weight_pb2.FetchWeightsRequest, context: object
    ) -> AsyncIterator[weight_pb2.FetchWeightsResponse]:
        with mapped():
            version = self.store.get(request.target_version)
            if request.offset > version.num_bytes:
                raise RefusedError(
                    "BAD_REQUEST", f"offset {request.offset} of {version.num_bytes} bytes"
                )
        yield weight_pb2.FetchWeightsResponse(manifest=_encode_manifest(version, self.run_id))
        for chunk in version.chunks(request.offset, CHUNK_BYTES):
            self._bytes_served.inc(len(chunk))
            yield weight_pb2.FetchWeightsResponse(chunk=chunk)

    async def FetchModelBundle(
        self, request: weight_pb2.FetchModelBundleRequest, context: object
    ) -> AsyncIterator[weight_pb2.FetchModelBundleResponse]:
        for response in _encode_bundle(self.bundle):
            yield response

    async def ReportReplica(
        self, request: weight_pb2.ReportReplicaRequest, context: object
    ) -> weight_pb2.ReportReplicaResponse:
        with mapped():
            _check_replica_id(request.replica_id)
        self.replica_versions[request.replica_id] = request.version
        self.journal.replica(
            request.replica_id,
            {
                "version": request.version,
                "mismatch_mean": request.mismatch_mean,
                "mismatch_max": request.mismatch_max,
                "pause_seconds": request.pause_seconds,
                "apply_seconds": request.apply_seconds,
            },
        )
        return weight_pb2.ReportReplicaResponse()


def _check_replica_id(replica_id: str) -> None:
    if len(replica_id.encode()) > MAX_REPLICA_ID_BYTES:
        raise RefusedError(
            "BAD_REQUEST", f"replica_id {replica_id!r} is above {MAX_REPLICA_ID_BYTES} bytes"
        )


def _decode_part(header: weight_pb2.PartHeader, run_id: str) -> Part:
    if header.run_id != run_id:
        raise RefusedError("BAD_MANIFEST", f"run_id {header.run_id!r}; served is {run_id!r}")
    probe = Probe(token_ids=header.probe.token_ids, logprobs=header.probe.logprobs)
    if probe.token_ids and len(probe.logprobs) != len(probe.token_ids) - 4:
        raise RefusedError(
            "BAD_MANIFEST", f"probe: {len(probe.logprobs)} B for {len(probe.token_ids)} B of tokens"
        )
    return Part(
        epoch=header.epoch,
        step=header.step,
        index=header.part_index,
        num_parts=header.num_parts,
        base_version=header.base_version,
        slices=tuple(_decode_slice(piece) for piece in header.slices),
        probe=probe,
    )


def _decode_slice(piece: weight_pb2.TensorSlice) -> Slice:
    if piece.encoding != weight_pb2.TENSOR_ENCODING_DENSE:
        raise RefusedError("BAD_MANIFEST", f"{piece.name}: encoding {piece.encoding}; use dense")
    return Slice(
        name=piece.name,
        type=TensorType(piece.dtype, tuple(piece.shape)),
        start=piece.start,
        num_elements=piece.num_elements,
        num_bytes=piece.num_bytes,
        digest=piece.digest,
    )


def _encode_manifest(version: Version, run_id: str) -> weight_pb2.WeightManifest:
    return weight_pb2.WeightManifest(
        run_id=run_id,
        version=version.version,
        step=version.step,
        epoch=version.epoch,
        slices=[
            weight_pb2.TensorSlice(
                name=piece.name,
                dtype=piece.type.dtype,
                shape=piece.type.shape,
                start=piece.start,
                num_elements=piece.num_elements,
                encoding=weight_pb2.TENSOR_ENCODING_DENSE,
                num_bytes=piece.num_bytes,
                digest=piece.digest,
            )
            for piece in version.slices
        ],
        probe=weight_pb2.LogprobProbe(
            token_ids=version.probe.token_ids, logprobs=version.probe.logprobs
        ),
        payload_bytes=version.num_bytes,
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
