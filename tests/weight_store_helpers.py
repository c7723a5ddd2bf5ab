"""Small weights, and what clients of a weight store do with them."""

import asyncio

import grpc
import numpy as np
import pytest

from intake_rig import make_part
from understudy.rpc import error_reason
from understudy.v1 import weight_pb2, weight_pb2_grpc
from understudy.weights.encoding import apply
from understudy.weights.layout import HostBuffer
from understudy.weights.manifest import check_seal, check_slices, check_values, slice_bytes

Part = tuple[weight_pb2.PartHeader, bytes]
Link = tuple[weight_pb2.WeightManifest, bytes]

_RNG = np.random.default_rng(0)
WEIGHTS = {
    "model.embed.weight": _RNG.normal(size=(60, 40)).astype(np.float32),
    "model.norm.weight": _RNG.normal(size=(40,)).astype(np.float32),
}
UPPER, LOWER = slice(0, 2), slice(2, None)


def moved(tensors: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Every tenth value a unit in the last place further."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, tensor in tensors.items():
        far = np.nextafter(tensor, np.float32(np.inf))
        result[name] = np.where(rng.random(tensor.shape) < 0.1, far, tensor)
        result[name].flat[:1] = far.flat[:1]
    return result


def halves(step: int = 0, epoch: int = 1) -> tuple[Part, Part]:
    """WEIGHTS in two parts."""
    upper = make_part(WEIGHTS, step, part=0, num_parts=2, epoch=epoch, rows=UPPER)
    lower = make_part(WEIGHTS, step, part=1, num_parts=2, epoch=epoch, rows=LOWER)
    return upper, lower


async def reason_of(call: object) -> str:
    """Why a call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error_reason(error.value)


async def reasons_of(*calls: object) -> list[str]:
    """Of calls that run at once: why they are refused, or their results."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    return [error_reason(r) if isinstance(r, grpc.RpcError) else str(r) for r in results]


async def fetch_links(
    stub: weight_pb2_grpc.WeightServiceStub,
    *,
    base: int = 0,
    target: int = 0,
    resume: int = 0,
    offset: int = 0,
) -> list[Link]:
    """The links of one fetch."""
    request = weight_pb2.FetchWeightsRequest(
        base_version=base, target_version=target, resume_version=resume, offset=offset
    )
    links: list[Link] = []
    async for response in stub.FetchWeights(request, timeout=10):
        assert len(response.chunk) <= 2**20
        if response.HasField("manifest"):
            links.append((response.manifest, b""))
        else:
            links[-1] = (links[-1][0], links[-1][1] + response.chunk)
    return links


async def fetch(stub: weight_pb2_grpc.WeightServiceStub) -> dict[str, bytes]:
    """The newest version's values, from nothing, with every digest checked."""
    buffer: HostBuffer | None = None
    for manifest, payload in await fetch_links(stub):
        check_seal(manifest)
        layout = check_slices(manifest.slices, None, based=buffer is not None)
        buffer = buffer or HostBuffer(layout)
        offset = 0
        for piece in manifest.slices:
            body = np.frombuffer(payload, np.uint8)[offset : offset + piece.num_bytes]
            apply(piece, body, slice_bytes(piece, buffer))
            offset += piece.num_bytes
        check_values(manifest.slices, buffer, finite=True)
    assert buffer
    return {entry.name: buffer.tensor_bytes(entry.name).tobytes() for entry in buffer.layout}


def tensors_of(tensors: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Values as `fetch` returns them."""
    return {name: tensor.astype("<f4").tobytes() for name, tensor in tensors.items()}
