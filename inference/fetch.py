"""Getting a whole version from the weight store into a shadow, checked, while others are served."""

import asyncio
import logging
from collections import deque
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from inference.manifest import Lineage, RefusedError, check_lineage, check_payload, check_slices
from inference.weights import ITEM_BYTES, Layout, Shadow
from understudy.v1 import weight_pb2, weight_pb2_grpc

_log = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 3600.0
_MAX_RESUMES = 3


class Fetcher:
    """Fetches full copies into a staging shadow.

    Two shadows take turns: one is served (and what a failed update is healed from), the other is
    filled. Host memory is therefore twice the model.
    """

    def __init__(self, stub: "weight_pb2_grpc.WeightServiceAsyncStub") -> None:
        self._stub = stub
        self._spare: Shadow | None = None

    def give_back(self, shadow: Shadow) -> None:
        """Let a shadow that nobody serves be filled again."""
        self._spare = shadow

    async def fetch(
        self, current: Lineage, expected: Layout | None
    ) -> tuple[weight_pb2.WeightManifest, Shadow]:
        """Fetch the newest version and check all of it.

        Args:
            current: lineage of what is served.
            expected: layout of what is served; None before the first version.

        Raises:
            RefusedError: with the reason; what is served was not touched.
            grpc.aio.AioRpcError: the store is away, or broke the transfer too often.
        """
        transfer = await _Transfer.open(self._stub, version=0, offset=0)
        try:
            manifest = transfer.manifest
            check_lineage(manifest, current)
            staging = self._take_spare(check_slices(manifest, expected))
            filler = _Filler(manifest, staging)
            resumes = 0
            while not await transfer.drain_into(filler):
                resumes += 1
                if resumes > _MAX_RESUMES:
                    raise RefusedError("TRANSFER_BROKE", f"broke {resumes} times, started afresh")
                _log.warning("transfer of version %d broke; resuming", manifest.version)
                transfer = await _Transfer.open(self._stub, manifest.version, filler.received)
                if transfer.manifest != manifest:
                    raise RefusedError("BAD_MANIFEST", "the manifest changed during the transfer")
            filler.finish()
            await asyncio.to_thread(check_payload, manifest, staging)
        finally:
            transfer.cancel()
        self._spare = None
        return manifest, staging

    def _take_spare(self, layout: Layout) -> Shadow:
        if self._spare is not None and self._spare.layout == layout:
            return self._spare
        if self._spare is not None:
            self._spare.close()
            self._spare = None
        try:
            self._spare = Shadow(layout)
        except (OSError, OverflowError, ValueError) as error:
            raise RefusedError("BAD_MANIFEST", f"no memory for the weights: {error}") from None
        return self._spare


class _Transfer:
    """One FetchWeights call, past its manifest."""

    def __init__(self, call: Any, manifest: weight_pb2.WeightManifest) -> None:
        self._call = call
        self.manifest = manifest

    @classmethod
    async def open(
        cls, stub: "weight_pb2_grpc.WeightServiceAsyncStub", version: int, offset: int
    ) -> "_Transfer":
        request = weight_pb2.FetchWeightsRequest(target_version=version, offset=offset)
        call: Any = stub.FetchWeights(request, timeout=_TIMEOUT_SECONDS, wait_for_ready=True)
        first = await call.read()
        if first is grpc.aio.EOF or first.WhichOneof("response") != "manifest":
            call.cancel()
            raise RefusedError("BAD_MANIFEST", "the transfer does not begin with a manifest")
        return cls(call, first.manifest)

    async def drain_into(self, filler: "_Filler") -> bool:
        """Take all chunks; False if the connection broke on the way."""
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                filler.write(response.chunk)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True

    def cancel(self) -> None:
        self._call.cancel()


class _Filler:
    """Writes a payload's bytes where its slices belong."""

    def __init__(self, manifest: weight_pb2.WeightManifest, staging: Shadow) -> None:
        self.received = 0
        self._expected = manifest.payload_bytes
        self._targets: deque[npt.NDArray[np.uint8]] = deque()
        for part in manifest.slices:
            start = part.start * ITEM_BYTES[part.dtype]
            tensor = staging.tensor_bytes(part.name)
            self._targets.append(tensor[start : start + part.num_bytes])

    def write(self, chunk: bytes) -> None:
        """Place the payload's next bytes."""
        data = np.frombuffer(chunk, np.uint8)
        self.received += len(data)
        if self.received > self._expected:
            raise RefusedError("BAD_PAYLOAD", f"more than the {self._expected} bytes announced")
        while len(data):
            target = self._targets[0]
            count = min(len(target), len(data))
            target[:count] = data[:count]
            data = data[count:]
            self._targets[0] = target[count:]
            if count == len(target):
                self._targets.popleft()

    def finish(self) -> None:
        """All bytes must be there."""
        if self.received != self._expected:
            raise RefusedError("BAD_PAYLOAD", f"{self.received} of {self._expected} bytes came")
