"""What the weight store takes from a trainer's rank: a part's header, then its payload.

input: length of the header (2 bytes) | PartHeader | payload
"""

import contextlib
import random

import numpy as np
from blake3 import blake3
from google.protobuf.message import DecodeError

from learner.weights.head import Head
from learner.weights.publication import check_header
from learner.weights.refusals import mapped
from learner.weights.servicer import check_part
from tests.fuzz.mutation import join_parts, mutate_as, mutate_bytes, sign_slices, split_parts
from understudy.rpc import ServiceError
from understudy.v1 import weight_pb2
from understudy.weights.encoding import DENSE, encode
from understudy.weights.layout import ITEM_BYTES, ByteArray, plan_layout
from understudy.weights.manifest import check_slice_values, check_slices, seal, slice_bytes

MAX_LEN = 2048
_LAYOUT = plan_layout([("norm", "F32", (4,)), ("head", "BF16", (2, 4))])
_OLD = {
    "norm": np.ones(4, "<f4").view(np.uint8),
    "head": np.full(8, 0x3F80, "<u2").view(np.uint8),
}
_mutate_header = mutate_as(weight_pb2.PartHeader)


def _head() -> Head:
    """A version to which deltas apply."""
    head = Head(_LAYOUT)
    manifest = weight_pb2.WeightManifest(version=1, slices=_slices(_OLD, None)[0])
    head.apply(manifest, _OLD.values())
    return head


def _slices(
    new: dict[str, ByteArray], old: dict[str, ByteArray] | None
) -> tuple[list[weight_pb2.TensorSlice], bytes]:
    """Whole tensors as they are, or as deltas."""
    slices, payload = [], b""
    for entry in _LAYOUT:
        values = new[entry.name]
        piece = weight_pb2.TensorSlice(
            name=entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            num_elements=entry.num_elements,
            encoding=DENSE,
            num_bytes=len(values),
            digest=blake3(values.data).digest(),
        )
        body = values.tobytes()
        if old is not None:
            delta = encode(entry.dtype, old[entry.name], values)
            body = b"".join(map(bytes, delta.payload))
            piece.encoding, piece.num_bytes = delta.encoding, delta.num_bytes
            piece.num_changed = delta.num_changed
            piece.plane_bytes.extend(map(len, delta.planes))
        slices.append(piece)
        payload += body
    return slices, payload


def seeds() -> list[bytes]:
    """Sound parts in whole tensors: values, nothing that changed, and something that did."""
    moved = {name: values.copy() for name, values in _OLD.items()}
    moved["norm"][4] ^= 1
    found = []
    for new, old in ((_OLD, None), (_OLD, _OLD), (moved, _OLD)):
        slices, payload = _slices(new, old)
        header = weight_pb2.PartHeader(
            run_id="run", epoch=1, num_parts=1, base_version=old is not None, slices=slices
        )
        seal(header)
        found.append(join_parts(header.SerializeToString(), payload))
    return found


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change the header, the payload under right digests, or bytes."""
    rng = random.Random(seed)
    encoded, payload = split_parts(data)
    match rng.randrange(4):
        case 0:
            return mutate_bytes(data, max_size, seed)
        case 1:
            payload = mutate_bytes(payload, len(payload) + 8, seed)
            with contextlib.suppress(DecodeError):
                encoded = sign_slices(weight_pb2.PartHeader.FromString(encoded), payload)
        case _:
            encoded = _mutate_header(encoded, min(max_size, 2**16 - 1), seed)
    with contextlib.suppress(DecodeError):  # else nothing would get past the checksum
        header = weight_pb2.PartHeader.FromString(encoded)
        seal(header)
        encoded = header.SerializeToString()
    changed = join_parts(encoded, payload)
    return changed if len(changed) <= max_size else mutate_bytes(data, max_size, seed)


def TestOneInput(data: bytes) -> None:
    """Check a part as the first version and as a later one."""
    encoded, payload = split_parts(data)
    try:
        header = weight_pb2.PartHeader.FromString(encoded)
    except DecodeError:
        return
    for head in (None, _head()):
        # A reason without a status code would be a KeyError.
        with contextlib.suppress(ServiceError), mapped():
            _publish(header, np.frombuffer(payload, np.uint8), head)


def _publish(header: weight_pb2.PartHeader, payload: ByteArray, head: Head | None) -> None:
    """As the store does: first what is declared, then every slice, then all of them together."""
    check_part(header, "run")
    if header.base_version != (head.version if head else 0) and header.base_version:
        return
    check_header(header, head)
    if sum(piece.num_bytes for piece in header.slices) != len(payload):
        return
    bodies, offset = [], 0
    for piece in header.slices:
        bodies.append(payload[offset : offset + piece.num_bytes])
        offset += piece.num_bytes
        if head:
            head.check(piece, bodies[-1])
        else:
            check_slice_values(piece, bodies[-1], finite=True)
    layout = check_slices(
        header.slices, head.layout if head else None, based=bool(header.base_version)
    )
    assert head is None or layout == head.layout
    num_elements = sum(piece.num_elements for piece in header.slices)
    assert num_elements == sum(entry.num_elements for entry in layout)
    assert num_elements * max(ITEM_BYTES.values()) >= len(payload)
    # What was verified against the version before applies without an error, and comes out right.
    head = head or Head(layout)
    head.apply(weight_pb2.WeightManifest(version=2, slices=header.slices), bodies)
    for piece in header.slices:
        assert blake3(slice_bytes(piece, head.buffer).data).digest() == piece.digest
