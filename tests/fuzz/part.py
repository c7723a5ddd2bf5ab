"""What the weight store takes from a trainer's rank: a part's header, then its payload.

input: length of the header (2 bytes) | PartHeader | payload
"""

import contextlib
import hashlib
import random

import numpy as np
from google.protobuf.message import DecodeError

from learner.intake.refusals import mapped
from learner.intake.slices import TensorType, check_cover, check_slice, check_values
from learner.intake.weight_servicer import _decode_part
from tests.fuzz.mutation import join_parts, mutate_as, mutate_bytes, sign_slices, split_parts
from understudy.rpc import ServiceError
from understudy.v1 import weight_pb2

MAX_LEN = 2048
_LAYOUT = {"norm": TensorType("F32", (4,)), "head": TensorType("BF16", (2, 4))}
_mutate_header = mutate_as(weight_pb2.PartHeader)


def seeds() -> list[bytes]:
    """A sound part in whole tensors."""
    payload = np.ones(4, "<f4").tobytes() + np.full(8, 0x3F80, "<u2").tobytes()
    slices, offset = [], 0
    for name, (dtype, shape) in _LAYOUT.items():
        num_elements = int(np.prod(shape))
        data = payload[offset : offset + num_elements * (4 if dtype == "F32" else 2)]
        offset += len(data)
        slices.append(
            weight_pb2.TensorSlice(
                name=name,
                dtype=dtype,
                shape=shape,
                num_elements=num_elements,
                encoding=weight_pb2.TENSOR_ENCODING_DENSE,
                num_bytes=len(data),
                digest=hashlib.sha256(data).digest(),
            )
        )
    header = weight_pb2.PartHeader(run_id="run", epoch=1, num_parts=1, slices=slices)
    return [join_parts(header.SerializeToString(), payload)]


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
    changed = join_parts(encoded, payload)
    return changed if len(changed) <= max_size else mutate_bytes(data, max_size, seed)


def TestOneInput(data: bytes) -> None:
    """Check a part as the first version and as a later one."""
    encoded, payload = split_parts(data)
    try:
        header = weight_pb2.PartHeader.FromString(encoded)
    except DecodeError:
        return
    for layout in (None, _LAYOUT):
        # A reason without a status code would be a KeyError.
        with contextlib.suppress(ServiceError), mapped():
            _publish(header, payload, layout)


def _publish(header: weight_pb2.PartHeader, payload: bytes, layout: object) -> None:
    part = _decode_part(header, "run")
    for piece in part.slices:
        check_slice(piece, layout)  # type: ignore[arg-type]
    if part.num_bytes != len(payload):
        return
    check_values(part.slices, np.frombuffer(payload, np.uint8))
    covered = check_cover(part.slices, layout)  # type: ignore[arg-type]
    assert layout is None or covered == layout
    num_elements = sum(int(np.prod(kind.shape, dtype=object)) for kind in covered.values())
    assert num_elements == sum(piece.num_elements for piece in part.slices)
