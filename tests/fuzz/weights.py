"""What a replica takes from a weight store: a link's manifest, then bytes of its payload.

input: length of the manifest (2 bytes) | WeightManifest | payload
"""

import contextlib
import random

import numpy as np
import zstandard
from google.protobuf.message import DecodeError

from inference.probe import decode_probe
from tests.fuzz.mutation import join_parts, mutate_as, mutate_bytes, split_parts
from understudy.v1 import weight_pb2
from understudy.weights.encoding import DENSE, digest_of, encode, words
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import HostBuffer, Layout, end_of, plan_layout
from understudy.weights.lineage import Lineage
from understudy.weights.manifest import check_values, slice_bytes
from understudy.weights.transfer import LinkWriter, check_link

MAX_LEN = 2048
_MAX_BYTES = 2**16
"""Above this no memory is asked for."""
_SERVED = plan_layout([("norm", "F32", (300,)), ("head", "BF16", (20, 40))])
_CURRENT = Lineage(run_id="run", epoch=2, version=3)
_mutate_manifest = mutate_as(weight_pb2.WeightManifest)
_ENCODINGS = (0, *weight_pb2.TensorEncoding.values())


def _base() -> HostBuffer:
    """The values of the version that is served."""
    buffer = HostBuffer(_SERVED)
    for entry in _SERVED:
        values = words(entry.dtype, buffer.tensor_bytes(entry.name))
        values[:] = np.arange(len(values)) % 1000 << 8 * (values.itemsize - 2)
    return buffer


def seeds() -> list[bytes]:
    """Deltas with few, many and no changes, in whole tensors and in slices; a small full copy."""
    return [
        *(
            _delta(stride, num_parts)
            for stride, num_parts in ((1, 1), (2, 1), (290, 1), (1000, 1), (7, 2))
        ),
        _full_copy(),
    ]


def _delta(stride: int, num_parts: int) -> bytes:
    """A link in which each stride-th word rises by one."""
    base, new = _base(), _base()
    manifest = _manifest(base_version=3)
    payload = bytearray()
    for entry in _SERVED:
        words(entry.dtype, new.tensor_bytes(entry.name))[::stride] += 1
        size = entry.num_elements // num_parts
        for part in range(num_parts):
            piece = weight_pb2.TensorSlice(
                name=entry.name, dtype=entry.dtype, shape=entry.shape, start=part * size,
                num_elements=size,
            )  # fmt: skip
            after = slice_bytes(piece, new)
            delta = encode(entry.dtype, slice_bytes(piece, base), after)
            piece.encoding, piece.num_changed = delta.encoding, delta.num_changed
            piece.plane_bytes[:] = map(len, delta.planes)
            piece.num_bytes, piece.digest = delta.num_bytes, digest_of(after)
            payload += b"".join(delta.payload)
            manifest.slices.append(piece)
    manifest.payload_bytes = len(payload)
    return join_parts(manifest.SerializeToString(), bytes(payload))


def _full_copy() -> bytes:
    payload = np.ones(4, "<f4").tobytes() + np.full(8, 0x3F80, "<u2").tobytes()
    manifest = _manifest(payload_bytes=len(payload))
    offset = 0
    for name, dtype, shape, num_bytes in (("norm", "F32", [4], 16), ("head", "BF16", [2, 4], 16)):
        values = np.frombuffer(payload[offset : offset + num_bytes], np.uint8)
        manifest.slices.add(
            name=name, dtype=dtype, shape=shape, num_elements=4 if dtype == "F32" else 8,
            encoding=DENSE, num_bytes=num_bytes, digest=digest_of(values),
        )  # fmt: skip
        offset += num_bytes
    return join_parts(manifest.SerializeToString(), payload)


def _manifest(**fields: int) -> weight_pb2.WeightManifest:
    probe = weight_pb2.LogprobProbe(
        token_ids=np.arange(3, dtype="<i4").tobytes(), logprobs=np.zeros(2, "<f4").tobytes()
    )
    return weight_pb2.WeightManifest(run_id="run", version=4, epoch=2, probe=probe, **fields)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change the manifest, a plane under right sizes, values under right digests, or bytes."""
    rng = random.Random(seed)
    encoded, payload = split_parts(data)
    choice = rng.randrange(6)
    if choice == 0:
        return mutate_bytes(data, max_size, seed)
    if choice == 1:
        encoded = _mutate_manifest(encoded, min(max_size, 2**16 - 1), seed)
    else:
        with contextlib.suppress(DecodeError):
            manifest = weight_pb2.WeightManifest.FromString(encoded)
            if choice == 2:
                payload = mutate_bytes(payload, len(payload) + 8, seed)
            else:
                payload = _mutate_piece(manifest, payload, rng)
            _sign(manifest, payload)
            encoded = manifest.SerializeToString()
    changed = join_parts(encoded, payload)
    return changed if len(changed) <= max_size else mutate_bytes(data, max_size, seed)


def _mutate_piece(manifest: weight_pb2.WeightManifest, payload: bytes, rng: random.Random) -> bytes:
    """Change what one slice's planes hold, how many values it changes, or what they are; sizes in
    the manifest stay true."""
    if not manifest.slices:
        return payload
    index = rng.randrange(len(manifest.slices))
    piece = manifest.slices[index]
    start = min(sum(each.num_bytes for each in manifest.slices[:index]), len(payload))
    body = payload[start : start + piece.num_bytes]
    match rng.randrange(4):
        case 0:
            piece.encoding = rng.choice(_ENCODINGS)
        case 1:
            piece.num_changed = (piece.num_changed + rng.choice((-1, 1, 256))) % 2**64
        case _ if piece.plane_bytes:
            plane = rng.randrange(len(piece.plane_bytes))
            begin = sum(piece.plane_bytes[:plane])
            end = begin + piece.plane_bytes[plane]
            frame = _mutate_frame(body[begin:end], rng)
            body = body[:begin] + frame + body[end:]
            piece.plane_bytes[plane] = len(frame)
        case _:
            body = mutate_bytes(body, len(body), 0)
    after = payload[start + piece.num_bytes :]
    piece.num_bytes = len(body)
    manifest.payload_bytes = start + len(body) + len(after)
    return payload[:start] + body + after


def _mutate_frame(frame: bytes, rng: random.Random) -> bytes:
    """Change a plane under a sound frame; or leave it away, or its size."""
    if rng.random() < 0.1:
        return b""
    plane = frame
    with contextlib.suppress(zstandard.ZstdError):
        # A frame's own word for its size is what would be allocated.
        if 0 <= zstandard.frame_content_size(frame) <= _MAX_BYTES:
            plane = zstandard.ZstdDecompressor().decompress(frame)
    plane = mutate_bytes(plane, len(plane) + rng.choice((0, 0, 4)), 0)
    sized = rng.random() < 0.95
    return zstandard.ZstdCompressor(write_content_size=sized).compress(plane)


def _sign(manifest: weight_pb2.WeightManifest, payload: bytes) -> None:
    """Give each slice the digest of what applying it leads to, as far as it can be applied."""
    with contextlib.suppress(WeightsRefusedError):
        layout = check_link(manifest, _SERVED if manifest.base_version else None)
        if end_of(layout) > _MAX_BYTES or manifest.payload_bytes != len(payload):
            return
        buffer = _base() if manifest.base_version else HostBuffer(layout)
        LinkWriter(manifest, buffer).write([payload])
        for piece in manifest.slices:
            piece.digest = digest_of(slice_bytes(piece, buffer))


def TestOneInput(data: bytes) -> None:
    """Check as a fetch does, as the first version of a replica and as the next one."""
    encoded, payload = split_parts(data)
    try:
        manifest = weight_pb2.WeightManifest.FromString(encoded)
    except DecodeError:
        return
    for layout in (_SERVED, None):
        with contextlib.suppress(WeightsRefusedError):
            _receive(manifest, payload, layout)
    with contextlib.suppress(WeightsRefusedError):
        _CURRENT.check_next(Lineage.of(manifest))
        assert manifest.version > 3
    with contextlib.suppress(WeightsRefusedError):
        probe = decode_probe(manifest.probe, vocab_size=100, max_model_len=64)
        assert probe is None or len(probe[0]) == len(probe[1]) + 1


def _receive(manifest: weight_pb2.WeightManifest, payload: bytes, expected: Layout | None) -> None:
    layout = check_link(manifest, expected)
    assert sum(piece.num_elements for piece in manifest.slices) == sum(
        entry.num_elements for entry in layout
    )
    assert manifest.payload_bytes <= sum(entry.num_bytes for entry in layout)
    if end_of(layout) > _MAX_BYTES or len(payload) != manifest.payload_bytes:
        return
    buffer = _base() if layout == _SERVED else HostBuffer(layout)
    writer = LinkWriter(manifest, buffer, keeps=True)
    middle = len(payload) // 3
    writer.write([payload[:middle]])
    writer.write([payload[middle:]])
    assert bytes(writer.kept) == payload
    check_values(manifest.slices, buffer, finite=True)
    for entry in layout:
        values = words(entry.dtype, buffer.tensor_bytes(entry.name))
        if entry.dtype == "BF16":
            values = values.astype("<u4") << 16
        assert np.isfinite(values.view("<f4")).all()
