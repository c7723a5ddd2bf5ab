"""Client of WeightService and VersionService: the policy's versions, and the files beside them."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from understudy.client.base import Client
from understudy.client.bundle import fetch_model_bundle
from understudy.config import NetworkConfig
from understudy.trajectory import FloatArray
from understudy.v1 import weight_pb2, weight_pb2_grpc
from understudy.weights.encoding import DENSE, Delta, words
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import HostBuffer, Layout, WeightBuffer
from understudy.weights.links import CHUNK_BYTES
from understudy.weights.manifest import describe_slice, seal
from understudy.weights.transfer import Fetch, HeldWeights, copy_values, fetch_weights


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A version, verified."""

    manifest: weight_pb2.WeightManifest
    """Of the link that led to it: run, epoch, version, step, probe, and a digest of every slice."""
    buffer: WeightBuffer
    """The values' bytes by tensor, and their layout."""

    @property
    def version(self) -> int:
        """Its number."""
        return self.manifest.version

    def array(self, name: str) -> FloatArray:
        """A tensor as float32, to which bfloat16 is widened exactly."""
        entry = next(entry for entry in self.buffer.layout if entry.name == name)
        bits = words(entry.dtype, self.buffer.tensor_bytes(name))
        if entry.dtype == "BF16":
            bits = bits.astype("<u4") << 16
        return bits.view("<f4").reshape(entry.shape)

    def arrays(self) -> dict[str, FloatArray]:
        """All tensors by name."""
        return {entry.name: self.array(entry.name) for entry in self.buffer.layout}


async def _prepare(layout: Layout, base: HeldWeights | None) -> HostBuffer:
    buffer = HostBuffer(layout)
    if base is not None:
        await asyncio.to_thread(copy_values, base.buffer, buffer)
    return buffer


class WeightClient(Client):
    """Follows the learner's weights, or publishes weights to it."""

    peer = "learner"

    def __init__(self, address: str, network: NetworkConfig) -> None:
        super().__init__(address, network)
        self._stub = weight_pb2_grpc.WeightServiceStub(self.channel)
        self._versions = weight_pb2_grpc.VersionServiceStub(self.channel)

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
        self, base: Weights | None = None, target_version: int = 0, timeout: float = 600.0
    ) -> Weights:
        """Fetch a version into memory, by deltas if that is shorter, and check every value.

        Args:
            base: what the caller holds; it is left as it is.
            target_version: version that it wants, newer than the base; 0 for the newest.
            timeout: deadline in seconds.

        Returns:
            The version; the base itself if nothing is newer.

        Raises:
            WeightsRefusedError: what came breaks a rule; fetching again without a base heals a
                delta that does not fit.
            grpc.aio.AioRpcError: with the codes that the rpc's comment lists.
        """
        held = HeldWeights(manifest=base.manifest, buffer=base.buffer) if base else None
        fetch = Fetch(current=held, target_version=target_version, timeout_seconds=timeout)
        found = await fetch_weights(self._stub, fetch, _prepare)
        if found is not None:
            return Weights(manifest=found.manifest, buffer=found.buffer)
        if base is None:
            raise WeightsRefusedError("BAD_MANIFEST", "the peer sent no weights")
        return base

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
        """Tell the learner what a replica serves; mismatches are those of log-probabilities."""
        report = weight_pb2.ReportReplicaRequest(
            replica_id=replica_id,
            version=version,
            mismatch_mean=mismatch_mean,
            mismatch_max=mismatch_max,
            pause_seconds=pause_seconds,
            apply_seconds=apply_seconds,
        )
        await self._versions.ReportReplica(report, timeout=10)

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
        slices = []
        for (name, tensor), data in zip(tensors.items(), values, strict=True):
            flat = np.frombuffer(data, np.uint8)
            dense = Delta(encoding=DENSE, values=flat)
            slices.append(describe_slice(name, "F32", tensor.shape, 0, flat, dense))
        header = weight_pb2.PartHeader(
            run_id=run_id, epoch=epoch, step=step, num_parts=1, slices=slices
        )
        seal(header)
        messages = _messages(header, b"".join(values))
        return (await self._stub.PublishWeights(messages, timeout=timeout)).version


def _messages(
    header: weight_pb2.PartHeader, payload: bytes
) -> Iterator[weight_pb2.PublishWeightsRequest]:
    yield weight_pb2.PublishWeightsRequest(header=header)
    for start in range(0, len(payload), CHUNK_BYTES):
        yield weight_pb2.PublishWeightsRequest(chunk=payload[start : start + CHUNK_BYTES])
