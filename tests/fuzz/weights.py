"""What a replica takes from the weight store: a manifest, then bytes of its payload.

input: length of the manifest (2 bytes) | WeightManifest | payload
"""

import contextlib
import hashlib
import random

import numpy as np
from google.protobuf.message import DecodeError

from inference.fetch import _Filler
from inference.manifest import (
    Lineage,
    RefusedError,
    check_lineage,
    check_payload,
    check_slices,
    decode_probe,
)
from inference.weights import Shadow, plan_layout
from tests.fuzz.mutation import join_parts, mutate_as, mutate_bytes, sign_slices, split_parts
from understudy.v1 import weight_pb2

MAX_LEN = 2048
_MAX_PAYLOAD_BYTES = 2**16
"""Above this no memory is asked for."""
_SERVED = plan_layout([("norm", "F32", (4,)), ("head", "BF16", (2, 4))])
_CURRENT = Lineage(run_id="run", epoch=2, version=3)
_mutate_manifest = mutate_as(weight_pb2.WeightManifest)


def _slice(name: str, dtype: str, shape: tuple[int, ...], start: int, data: bytes) -> object:
    return weight_pb2.TensorSlice(
        name=name,
        dtype=dtype,
        shape=shape,
        start=start,
        num_elements=len(data) // (4 if dtype == "F32" else 2),
        encoding=weight_pb2.TENSOR_ENCODING_DENSE,
        num_bytes=len(data),
        digest=hashlib.sha256(data).digest(),
    )


def seeds() -> list[bytes]:
    """A sound version in whole tensors, and one in slices of another order."""
    norm, head = np.ones(4, "<f4").tobytes(), np.full(8, 0x3F80, "<u2").tobytes()
    whole = [_slice("norm", "F32", (4,), 0, norm), _slice("head", "BF16", (2, 4), 0, head)]
    cut = [
        _slice("head", "BF16", (2, 4), 4, head[8:]),
        _slice("norm", "F32", (4,), 0, norm),
        _slice("head", "BF16", (2, 4), 0, head[:8]),
    ]
    probe = weight_pb2.LogprobProbe(
        token_ids=np.arange(3, dtype="<i4").tobytes(), logprobs=np.zeros(2, "<f4").tobytes()
    )
    return [
        join_parts(
            weight_pb2.WeightManifest(
                run_id="run", version=4, epoch=2, slices=slices, probe=probe, payload_bytes=32
            ).SerializeToString(),
            payload,
        )
        for slices, payload in ((whole, norm + head), (cut, head[8:] + norm + head[:8]))
    ]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change the manifest, the payload under right digests, or bytes."""
    rng = random.Random(seed)
    manifest, payload = split_parts(data)
    match rng.randrange(4):
        case 0:
            return mutate_bytes(data, max_size, seed)
        case 1:
            payload = mutate_bytes(payload, len(payload) + 8, seed)
            with contextlib.suppress(DecodeError):
                manifest = sign_slices(weight_pb2.WeightManifest.FromString(manifest), payload)
        case _:
            manifest = _mutate_manifest(manifest, min(max_size, 2**16 - 1), seed)
    changed = join_parts(manifest, payload)
    return changed if len(changed) <= max_size else mutate_bytes(data, max_size, seed)


def TestOneInput(data: bytes) -> None:
    """Check as a fetch does, as the first version of a replica and as the next one."""
    encoded, payload = split_parts(data)
    try:
        manifest = weight_pb2.WeightManifest.FromString(encoded)
    except DecodeError:
        return
    for current, layout in ((_CURRENT, _SERVED), (Lineage(), None)):
        with contextlib.suppress(RefusedError):
            _fetch(manifest, payload, current, layout)
    with contextlib.suppress(RefusedError):
        probe = decode_probe(manifest.probe, vocab_size=100, max_model_len=64)
        assert probe is None or len(probe[0]) == len(probe[1]) + 1


def _fetch(
    manifest: weight_pb2.WeightManifest, payload: bytes, current: Lineage, layout: object
) -> None:
    lineage = check_lineage(manifest, current)
    assert lineage.version > current.version
    planned = check_slices(manifest, layout)  # type: ignore[arg-type]
    assert sum(entry.num_bytes for entry in planned) == manifest.payload_bytes
    if manifest.payload_bytes > _MAX_PAYLOAD_BYTES:
        return
    shadow = Shadow(planned)
    try:
        filler = _Filler(manifest, shadow)
        middle = len(payload) // 3
        filler.write(payload[:middle])
        filler.write(payload[middle:])
        filler.finish()
        check_payload(manifest, shadow)
        for entry, values in shadow:
            if entry.dtype == "F32":
                assert np.isfinite(values.view("<f4")).all()
    finally:
        shadow.close()
