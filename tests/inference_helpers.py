"""A weight store small enough to read, and tiny models, for the tests of inference servers."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from inference.subscriber import Upstream
from inference.weights import Shadow
from understudy.v1 import weight_pb2, weight_pb2_grpc
from understudy.weights.encoding import DENSE, digest_of, encode
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import plan_layout
from understudy.weights.links import Link, LinkSet, MemoryPayload, fetch_responses
from understudy.weights.manifest import seal

CHUNK_BYTES = 4096
VOCABULARY = ("<unk>", "<|im_end|>", "hello", "world", "ok", "yes", "no")
Tensors = Mapping[str, np.ndarray]
Response = weight_pb2.FetchWeightsResponse
Tamper = Callable[[list[Response]], list[Response]]


class WeightStore(weight_pb2_grpc.WeightServiceServicer, weight_pb2_grpc.VersionServiceServicer):
    """Serves what a test puts into it, wrong things too."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.links = LinkSet(8)
        self.tamper: Tamper | None = None
        """Changes the messages of the next fetch."""
        self.break_at: tuple[int, int] | None = None
        """Link of a chain, and bytes of its payload, after which the next transfer breaks."""
        self.requests: list[weight_pb2.FetchWeightsRequest] = []
        self.reports: list[weight_pb2.ReportReplicaRequest] = []
        self.changed = asyncio.Condition()
        self.server = grpc.aio.server()
        weight_pb2_grpc.add_WeightServiceServicer_to_server(self, self.server)
        weight_pb2_grpc.add_VersionServiceServicer_to_server(self, self.server)

    async def start(self, address: str = "127.0.0.1:0") -> str:
        port = self.server.add_insecure_port(address)
        await self.server.start()
        return f"127.0.0.1:{port}"

    async def announce(self, *links: Link) -> None:
        for link in links:
            self.links.add(link)
        async with self.changed:
            self.changed.notify_all()

    async def wait_for_report(
        self, version: int, replica: str = ""
    ) -> weight_pb2.ReportReplicaRequest:
        def found() -> list[weight_pb2.ReportReplicaRequest]:
            return [r for r in self.reports if r.version == version and replica in r.replica_id]

        async with self.changed, asyncio.timeout(20):
            await self.changed.wait_for(found)
        return found()[0]

    async def WatchVersions(self, request: Any, context: Any) -> AsyncIterator[Any]:
        last = None
        while True:
            newest = self.links.newest
            if newest not in (None, last):
                last = newest
                yield weight_pb2.WatchVersionsResponse(
                    run_id=newest.manifest.run_id, version=newest.version
                )
            async with self.changed:
                await self.changed.wait()

    async def FetchWeights(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        tamper, self.tamper = self.tamper, None
        break_at, self.break_at = self.break_at, None
        try:
            whole = fetch_responses(self.links, request, lambda link, num_bytes: None)
            responses = list(in_small_chunks([response async for response in whole]))
        except WeightsRefusedError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        link, offset = -1, 0
        for response in tampered(responses, tamper) if tamper else responses:
            if break_at and (link, offset) >= break_at:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "as the test asked")
            yield response
            if response.HasField("manifest"):
                link, offset = link + 1, 0
            offset += len(response.chunk)

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


def tampered(responses: list[Response], tamper: Tamper) -> list[Response]:
    """Changed by somebody who knows how to write a checksum."""
    changed = tamper(responses)
    for response in changed:
        if response.HasField("manifest"):
            seal(response.manifest)
    return changed


def in_small_chunks(responses: list[Response]) -> Iterator[Response]:
    for response in responses:
        if response.HasField("manifest"):
            yield response
        for start in range(0, len(response.chunk), CHUNK_BYTES):
            yield Response(chunk=response.chunk[start : start + CHUNK_BYTES])


@contextlib.asynccontextmanager
async def upstream_of(address: str, patience_seconds: float = 20.0) -> AsyncIterator[Upstream]:
    """An upstream that is the learner at the same time."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield Upstream(
            channel=channel, learner=channel, address=address, patience_seconds=patience_seconds
        )


def pack(
    tensors: Tensors, version: int, *, base: tuple[int, Tensors] | None = None, num_parts: int = 2,
    **fields: Any,
) -> Link:  # fmt: skip
    """A link to float32 tensors, each cut into parts as trainer ranks would.

    Args:
        tensors: by name.
        version: version that they are.
        base: version and tensors that a delta starts from; None for a full copy.
        num_parts: slices of each tensor.
        fields: of the manifest.
    """
    slices: list[weight_pb2.TensorSlice] = []
    payload = bytearray()
    for part in range(num_parts):
        for name, value in tensors.items():
            start, new = _part_of(value, part, num_parts)
            if not len(new):
                continue
            piece = weight_pb2.TensorSlice(
                name=name, dtype="F32", shape=value.shape, start=start,
                num_elements=len(new) // 4, digest=digest_of(new), encoding=DENSE,
            )  # fmt: skip
            body = new.tobytes()
            if base:
                delta = encode("F32", _part_of(base[1][name], part, num_parts)[1], new)
                body = b"".join(delta.payload)
                piece.encoding, piece.num_changed = delta.encoding, delta.num_changed
                piece.plane_bytes[:] = map(len, delta.planes)
            piece.num_bytes = len(body)
            payload += body
            slices.append(piece)
    manifest = weight_pb2.WeightManifest(
        run_id="r", version=version, base_version=base[0] if base else 0, epoch=1, slices=slices,
        payload_bytes=len(payload),
    )  # fmt: skip
    manifest.MergeFrom(weight_pb2.WeightManifest(**fields))
    seal(manifest)
    return Link(manifest=manifest, payload=MemoryPayload(payload))


def _part_of(value: np.ndarray, part: int, num_parts: int) -> tuple[int, np.ndarray]:
    """First element and bytes of a part of a tensor."""
    pieces = np.array_split(value.reshape(-1), num_parts)
    return sum(map(len, pieces[:part])), pieces[part].astype("<f4").view(np.uint8)


def nudge(tensors: Tensors, seed: int) -> dict[str, np.ndarray]:
    """Tensors of which a third of the values is another."""
    rng = np.random.default_rng(seed)
    return {
        name: np.where(rng.random(value.shape) < 1 / 3, rng.normal(size=value.shape), value).astype(
            np.float32
        )
        for name, value in tensors.items()
    }


def fill_shadow(tensors: Tensors) -> Shadow:
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
