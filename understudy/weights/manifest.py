"""What slices must be before anything is made of them, and what the values must be afterwards.

Names are plain, types and shapes are the model's, sizes are bounded, slices cover every tensor
exactly once, and every digest is that of the values. The store checks parts and versions by these
rules, and each replica checks them again.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from blake3 import blake3

from understudy.v1 import weight_pb2
from understudy.weights.encoding import (
    DENSE,
    DIGEST_BYTES,
    SPARSE_STEPS,
    SPARSE_WORDS,
    Delta,
    digest_of,
    require_finite,
)
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import (
    ITEM_BYTES,
    ByteArray,
    Layout,
    TensorEntry,
    WeightBuffer,
    plan_layout,
)

MAX_DIMENSIONS = 8
Described = weight_pb2.PartHeader | weight_pb2.WeightManifest
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,255}")
_SPARSE = (SPARSE_STEPS, SPARSE_WORDS)


def seal(message: Described) -> None:
    """Write a header's or a manifest's checksum, once all else is written."""
    message.checksum = _checksum(message)


def check_seal(message: Described) -> None:
    """Check that nothing in it was changed on the way, be it a number that no digest covers.

    Raises:
        WeightsRefusedError: BAD_MANIFEST.
    """
    if message.checksum != _checksum(message):
        raise WeightsRefusedError("BAD_MANIFEST", "its checksum is not that of its content")


def _checksum(message: Described) -> bytes:
    found = message.checksum
    message.ClearField("checksum")
    content = message.SerializeToString(deterministic=True)
    message.checksum = found
    return blake3(content).digest()


def check_slices(
    slices: Sequence[weight_pb2.TensorSlice], expected: Layout | None, *, based: bool
) -> Layout:
    """Check the slices of a whole version and return its layout.

    Args:
        slices: of all parts.
        expected: the model's layout; None if these slices are to say what it is.
        based: whether there is a base, to which deltas apply.

    Raises:
        WeightsRefusedError: BAD_MANIFEST, UNKNOWN_TENSOR, BAD_SHAPE, MISSING_TENSOR,
            DOUBLED_TENSOR.
    """
    known = None if expected is None else {entry.name: entry for entry in expected}
    by_name: dict[str, list[weight_pb2.TensorSlice]] = defaultdict(list)
    for piece in slices:
        check_slice(piece, known, based=based)
        by_name[piece.name].append(piece)
    if not by_name:
        raise WeightsRefusedError("BAD_MANIFEST", "there are no slices; send all of the model")
    if missing := sorted((known or {}).keys() - by_name):
        raise WeightsRefusedError("MISSING_TENSOR", f"{', '.join(missing[:4])}: send all tensors")
    for pieces in by_name.values():
        _check_coverage(pieces)
    if expected is not None:
        return expected
    return plan_layout((name, p[0].dtype, tuple(p[0].shape)) for name, p in by_name.items())


def check_slice(
    piece: weight_pb2.TensorSlice, known: dict[str, TensorEntry] | None, *, based: bool
) -> None:
    """Check one slice by itself.

    Args:
        piece: the slice.
        known: the model's tensors by name; None if any are taken.
        based: whether there is a base, to which deltas apply.

    Raises:
        WeightsRefusedError: BAD_MANIFEST, UNKNOWN_TENSOR, BAD_SHAPE.
    """
    if not _NAME.fullmatch(piece.name):
        raise WeightsRefusedError(
            "UNKNOWN_TENSOR",
            f"{piece.name[:80]!r} is no tensor name; use letters, digits and _ . -",
        )
    shape = tuple(piece.shape)
    if piece.dtype not in ITEM_BYTES or len(shape) > MAX_DIMENSIONS or 0 in shape:
        raise WeightsRefusedError(
            "BAD_MANIFEST",
            f"{piece.name}: {piece.dtype[:16]!r} {list(shape)[:9]}; use {sorted(ITEM_BYTES)} and 1 "
            f"to {MAX_DIMENSIONS} dimensions above 0",
        )
    if known is not None:
        _check_known(piece, known)
    end = piece.start + piece.num_elements
    if not piece.num_elements or end > math.prod(shape):
        raise WeightsRefusedError(
            "BAD_MANIFEST", f"{piece.name}: elements {piece.start} to {end} of shape {list(shape)}"
        )
    if len(piece.digest) != DIGEST_BYTES:
        raise WeightsRefusedError(
            "BAD_MANIFEST", f"{piece.name}: no BLAKE3 of {DIGEST_BYTES} bytes"
        )
    _check_encoding(piece, based=based)


def _check_known(piece: weight_pb2.TensorSlice, known: dict[str, TensorEntry]) -> None:
    entry = known.get(piece.name)
    if entry is None:
        raise WeightsRefusedError("UNKNOWN_TENSOR", f"the model has no {piece.name!r}")
    if (piece.dtype, tuple(piece.shape)) != (entry.dtype, entry.shape):
        raise WeightsRefusedError(
            "BAD_SHAPE",
            f"{piece.name} is {piece.dtype} {list(piece.shape)}, the model has {entry.dtype} "
            f"{list(entry.shape)}",
        )


def _check_encoding(piece: weight_pb2.TensorSlice, *, based: bool) -> None:
    sparse = piece.encoding in _SPARSE
    if piece.encoding != DENSE and not (based and sparse):
        why = "needs a base version, and there is none" if sparse else "is unknown"
        raise WeightsRefusedError("BAD_MANIFEST", f"{piece.name}: encoding {piece.encoding} {why}")
    item = ITEM_BYTES[piece.dtype]
    num_planes, num_bytes = 0, piece.num_elements * item
    if sparse:
        num_planes = 2 + item if piece.num_changed else 0
        num_bytes = sum(piece.plane_bytes)
    if len(piece.plane_bytes) != num_planes or piece.num_bytes != num_bytes:
        raise WeightsRefusedError(
            "BAD_MANIFEST",
            f"{piece.name}: {piece.num_bytes} bytes in {len(piece.plane_bytes)} planes, where "
            f"{num_bytes} in {num_planes} belong",
        )
    most_changed = piece.num_elements if sparse else 0
    if piece.num_bytes > piece.num_elements * item or piece.num_changed > most_changed:
        raise WeightsRefusedError(
            "BAD_MANIFEST",
            f"{piece.name}: {piece.num_bytes} bytes, {piece.num_changed} changes for "
            f"{piece.num_elements} values; send them dense",
        )


def _check_coverage(pieces: Iterable[weight_pb2.TensorSlice]) -> None:
    """One tensor's slices agree and lie behind each other, from its first to its last element."""
    first, *_ = pieces = sorted(pieces, key=lambda piece: piece.start)
    end = 0
    for piece in pieces:
        if piece.dtype != first.dtype or piece.shape != first.shape:
            raise WeightsRefusedError("BAD_SHAPE", f"{piece.name}: slices disagree on its type")
        if piece.start != end:
            reason = "DOUBLED_TENSOR" if piece.start < end else "MISSING_TENSOR"
            raise WeightsRefusedError(
                reason, f"{piece.name}: a slice starts at {piece.start}, not at {end}"
            )
        end = piece.start + piece.num_elements
    if end != math.prod(first.shape):
        raise WeightsRefusedError(
            "MISSING_TENSOR",
            f"{first.name}: slices end at {end}, the tensor at {math.prod(first.shape)}",
        )


def describe_slice(
    name: str, dtype: str, shape: Sequence[int], start: int, values: ByteArray, delta: Delta
) -> weight_pb2.TensorSlice:
    """How an encoded slice is announced.

    Args:
        name: of the checkpoint tensor.
        dtype: `F32` or `BF16`.
        shape: of the whole tensor.
        start: first element in the flattened tensor.
        values: the new values, dense, of which the digest is made.
        delta: how they are written.
    """
    return weight_pb2.TensorSlice(
        name=name,
        dtype=dtype,
        shape=shape,
        start=start,
        num_elements=len(values) // ITEM_BYTES[dtype],
        encoding=delta.encoding,
        num_bytes=delta.num_bytes,
        digest=digest_of(values),
        num_changed=delta.num_changed,
        plane_bytes=map(len, delta.planes),
    )


def full_manifest(manifest: weight_pb2.WeightManifest) -> weight_pb2.WeightManifest:
    """The manifest of a full copy of the version that a link leads to, in the same slices."""
    full = weight_pb2.WeightManifest()
    full.CopyFrom(manifest)
    full.base_version = 0
    for piece in full.slices:
        piece.encoding = DENSE
        piece.num_bytes = piece.num_elements * ITEM_BYTES[piece.dtype]
        piece.num_changed = 0
        del piece.plane_bytes[:]
    full.payload_bytes = sum(piece.num_bytes for piece in full.slices)
    seal(full)
    return full


def slice_bytes(piece: weight_pb2.TensorSlice, buffer: WeightBuffer) -> ByteArray:
    """The bytes of a slice's values: a view."""
    item = ITEM_BYTES[piece.dtype]
    start = piece.start * item
    return buffer.tensor_bytes(piece.name)[start : start + piece.num_elements * item]


def check_values(
    slices: Iterable[weight_pb2.TensorSlice], buffer: WeightBuffer, *, finite: bool
) -> None:
    """Check the digest of every slice; with `finite`, also every value. Takes a second for some
    gigabytes: run it on a thread.

    Raises:
        WeightsRefusedError: BAD_DIGEST, NON_FINITE.
    """
    for piece in slices:
        check_slice_values(piece, slice_bytes(piece, buffer), finite=finite)


def check_slice_values(piece: weight_pb2.TensorSlice, values: ByteArray, *, finite: bool) -> None:
    """As check_values, for one slice."""
    if digest_of(values) != piece.digest:
        raise WeightsRefusedError(
            "BAD_DIGEST", f"{piece.name}: values from {piece.start} on are not those published"
        )
    if finite:
        require_finite(piece, values)
