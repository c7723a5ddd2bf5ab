"""A weight store small enough to read, and tiny models, for the tests of inference servers."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from inference.weights import Shadow, plan_layout
from understudy.v1 import weight_pb2, weight_pb2_grpc

CHUNK_BYTES = 4096
VOCABULARY = ("<unk>", "<|im_end|>", "hello", "world", "ok", "yes", "no")


class WeightStore(weight_pb2_grpc.WeightServiceServicer):
    """Serves what a test puts into it, wrong things too."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.manifest = weight_pb2.WeightManifest()
        self.payload = b""
        self.break_at = 0
        """Payload bytes after which the next transfer breaks; 0 for never."""
        self.offsets: list[int] = []
        self.reports: list[weight_pb2.ReportReplicaRequest] = []
        self.changed = asyncio.Condition()
        self.server = grpc.aio.server()
        weight_pb2_grpc.add_WeightServiceServicer_to_server(self, self.server)

    async def start(self, address: str = "127.0.0.1:0") -> str:
        port = self.server.add_insecure_port(address)
        await self.server.start()
        return f"127.0.0.1:{port}"

    async def announce(self, manifest: weight_pb2.WeightManifest, payload: bytes) -> None:
        self.manifest, self.payload = manifest, payload
        async with self.changed:
            self.changed.notify_all()

    async def wait_for_report(self, version: int) -> weight_pb2.ReportReplicaRequest:
        async with self.changed, asyncio.timeout(20):
            await self.changed.wait_for(lambda: any(r.version == version for r in self.reports))
        return next(report for report in self.reports if report.version == version)

    async def WatchVersions(self, request: Any, context: Any) -> AsyncIterator[Any]:
        last = 0
        while True:
            if self.manifest.version not in (0, last):
                last = self.manifest.version
                yield weight_pb2.WatchVersionsResponse(run_id=self.manifest.run_id, version=last)
            async with self.changed:
                await self.changed.wait()

    async def FetchWeights(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.offsets.append(request.offset)
        manifest, payload, break_at = self.manifest, self.payload, self.break_at
        yield weight_pb2.FetchWeightsResponse(manifest=manifest)
        for start in range(request.offset, len(payload), CHUNK_BYTES):
            if break_at and start >= break_at:
                self.break_at = 0
                await context.abort(grpc.StatusCode.UNAVAILABLE, "as the test asked")
            yield weight_pb2.FetchWeightsResponse(chunk=payload[start : start + CHUNK_BYTES])

    async def FetchModelBundle(self, request: Any, context: Any) -> AsyncIterator[Any]:
        content = {path.name: path.read_bytes() for path in sorted(self.bundle.iterdir())}
        files = [
            weight_pb2.BundleFile(
                name=name, num_bytes=len(data), digest=hashlib.sha256(data).digest()
            )
            for name, data in content.items()
        ]
        header = weight_pb2.ModelBundleHeader(bundle_digest="b1", files=files)
        yield weight_pb2.FetchModelBundleResponse(header=header)
        for data in content.values():
            yield weight_pb2.FetchModelBundleResponse(chunk=data)

    async def ReportReplica(self, request: Any, context: Any) -> Any:
        self.reports.append(request)
        async with self.changed:
            self.changed.notify_all()
        return weight_pb2.ReportReplicaResponse()


def pack(
    tensors: Mapping[str, np.ndarray], version: int, *, num_parts: int = 2, **fields: Any
) -> tuple[weight_pb2.WeightManifest, bytes]:
    """A full copy of float32 tensors, each cut into parts as trainer ranks would."""
    slices, payload = [], []
    for part in range(num_parts):
        for name, value in tensors.items():
            piece = np.array_split(value.reshape(-1), num_parts)[part]
            if not len(piece):
                continue
            data = piece.astype("<f4").tobytes()
            start = sum(len(p) for p in np.array_split(value.reshape(-1), num_parts)[:part])
            slices.append(
                weight_pb2.TensorSlice(
                    name=name, dtype="F32", shape=value.shape, start=start,
                    num_elements=len(piece), encoding=weight_pb2.TENSOR_ENCODING_DENSE,
                    num_bytes=len(data), digest=hashlib.sha256(data).digest(),
                )
            )  # fmt: skip
            payload.append(data)
    manifest = weight_pb2.WeightManifest(
        run_id="r", version=version, epoch=1, slices=slices, payload_bytes=sum(map(len, payload))
    )
    manifest.MergeFrom(weight_pb2.WeightManifest(**fields))
    return manifest, b"".join(payload)


def fill_shadow(tensors: Mapping[str, np.ndarray]) -> Shadow:
    """A shadow that holds float32 tensors."""
    shadow = Shadow(plan_layout((name, "F32", value.shape) for name, value in tensors.items()))
    for entry, data in shadow:
        data[:] = tensors[entry.name].astype("<f4").reshape(-1).view(np.uint8)
    return shadow


def write_word_bundle(folder: Path) -> Path:
    """A bundle with a tokenizer of a few words and no model to speak of."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"vocab_size": 7}')
    return folder
