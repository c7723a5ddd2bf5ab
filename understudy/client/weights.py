"""Client of WeightService: versions of the policy, and the files that go with them."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from understudy.client.base import Client
from understudy.client.bundle import fetch_model_bundle
from understudy.config import NetworkConfig
from understudy.errors import UnderstudyError
from understudy.trajectory import FloatArray
from understudy.v1 import weight_pb2, weight_pb2_grpc

CHUNK_BYTES = 2**20


class WeightError(UnderstudyError):
    """Weights that break their own manifest: size or digest."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A version as it was sent."""

    manifest: weight_pb2.WeightManifest
    payload: bytes
    """The bytes of the manifest's slices, one behind the other."""


class WeightClient(Client):
    """Follows the learner's weights, or publishes weights to it."""

    peer = "learner"

    def __init__(self, address: str, network: NetworkConfig) -> None:
        super().__init__(address, network)
        self._stub = weight_pb2_grpc.WeightServiceStub(self.channel)

    async def watch_versions(
        self, replica_id: str = ""
    ) -> AsyncGenerator[weight_pb2.WatchVersionsResponse, None]:
        """The newest version, if there is one, then each newer one; ends only by an error.

        Raises:
            grpc.aio.AioRpcError: with the codes that the rpc's comment lists.
        """
        request = weight_pb2.WatchVersionsRequest(replica_id=replica_id)
        call = self._stub.WatchVersions(request)
        try:
            async for announcement in call:
                yield announcement
        finally:
            call.cancel()

    async def fetch(
        self, base_version: int = 0, target_version: int = 0, timeout: float = 600.0
    ) -> Weights:
        """Fetch a version into memory and check every digest.

        Args:
            base_version: version that the caller holds; 0 for none.
            target_version: version that it wants; 0 for the newest.
            timeout: deadline in seconds.

        Raises:
            WeightError: the payload is not what its manifest says.
            grpc.aio.AioRpcError: with the codes that the rpc's comment lists.
        """
        request = weight_pb2.FetchWeightsRequest(
            base_version=base_version, target_version=target_version
        )
        manifest = weight_pb2.WeightManifest()
        payload = bytearray()
        call = self._stub.FetchWeights(request, timeout=timeout)
        try:
            async for response in call:
                if response.HasField("manifest"):
                    manifest = response.manifest
                payload += response.chunk
                if len(payload) > manifest.payload_bytes:
                    raise WeightError(f"more than the {manifest.payload_bytes} bytes announced")
        finally:
            call.cancel()
        await asyncio.to_thread(_check, manifest, memoryview(payload))
        return Weights(manifest=manifest, payload=bytes(payload))

    async def fetch_model_bundle(self, folder: Path) -> str:
        """Write configuration, tokenizer and chat template to a folder; returns their digest.

        Raises:
            BundleError: the files are not what their header says.
            grpc.aio.AioRpcError: the learner did not answer.
        """
        return await fetch_model_bundle(self.channel, folder)

    async def report_replica(
        self,
        replica_id: str,
        version: int,
        *,
        mismatch_mean: float = 0.0,
        mismatch_max: float = 0.0,
        pause_seconds: float = 0.0,
        apply_seconds: float = 0.0,
    ) -> None:
        """Tell what a replica serves; mismatches are |engine's - learner's| log-probabilities."""
        report = weight_pb2.ReportReplicaRequest(
            replica_id=replica_id,
            version=version,
            mismatch_mean=mismatch_mean,
            mismatch_max=mismatch_max,
            pause_seconds=pause_seconds,
            apply_seconds=apply_seconds,
        )
        await self._stub.ReportReplica(report, timeout=10)

    async def publish(
        self,
        tensors: Mapping[str, FloatArray],
        *,
        step: int,
        epoch: int,
        run_id: str,
        timeout: float = 600.0,
    ) -> int:
        """Publish a whole model as one dense float32 part, without a probe.

        Args:
            tensors: all tensors by their names in the checkpoint.
            step: optimizer steps taken.
            epoch: what BatchClient.start_training returned.
            run_id: run that is trained.
            timeout: deadline in seconds.

        Returns:
            The version that was issued.

        Raises:
            grpc.aio.AioRpcError: with the codes that the rpc's comment lists.
        """
        values = [tensor.astype("<f4", copy=False).tobytes() for tensor in tensors.values()]
        slices = [
            _describe(name, tensor, data)
            for (name, tensor), data in zip(tensors.items(), values, strict=True)
        ]
        header = weight_pb2.PartHeader(
            run_id=run_id, epoch=epoch, step=step, num_parts=1, slices=slices
        )
        messages = _messages(header, b"".join(values))
        return (await self._stub.PublishWeights(messages, timeout=timeout)).version


def _describe(name: str, tensor: FloatArray, data: bytes) -> weight_pb2.TensorSlice:
    return weight_pb2.TensorSlice(
        name=name,
        dtype="F32",
        shape=tensor.shape,
        num_elements=tensor.size,
        encoding=weight_pb2.TENSOR_ENCODING_DENSE,
        num_bytes=len(data),
        digest=hashlib.sha256(data).digest(),
    )


def _messages(
    header: weight_pb2.PartHeader, payload: bytes
) -> Iterator[weight_pb2.PublishWeightsRequest]:
    yield weight_pb2.PublishWeightsRequest(header=header)
    for start in range(0, len(payload), CHUNK_BYTES):
        yield weight_pb2.PublishWeightsRequest(chunk=payload[start : start + CHUNK_BYTES])


def _check(manifest: weight_pb2.WeightManifest, payload: memoryview) -> None:
    """Raise WeightError unless the payload is its slices, all of them, and nothing else."""
    offset = 0
    for part in manifest.slices:
        data = payload[offset : offset + part.num_bytes]
        if hashlib.sha256(data).digest() != part.digest:
            raise WeightError(f"{part.name} from element {part.start}: wrong SHA-256")
        offset += part.num_bytes
    if offset != len(payload):
        raise WeightError(f"{len(payload)} bytes came, the slices have {offset}")
