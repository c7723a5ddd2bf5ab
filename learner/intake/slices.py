"""Slices of checkpoint tensors, and the checks that a publication must pass.

A checkpoint is a set of named tensors; a rank's part of it is a sequence of slices, each a run of
elements of one flattened tensor. Together the parts of a publication cover every tensor once.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from learner.intake.refusals import RefusedError

ByteArray = npt.NDArray[np.uint8]

ITEM_BYTES = {"F32": 4, "BF16": 2}
"""Bytes of an element by dtype, as safetensors names dtypes."""
MAX_DIMENSIONS = 8
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}")
_BLOCK_ELEMENTS = 2**22


class TensorType(NamedTuple):
    """What one checkpoint tensor is."""

    dtype: str
    shape: tuple[int, ...]


Layout = Mapping[str, TensorType]
"""All tensors of a checkpoint by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A run of elements, dense and little-endian."""

    name: str
    type: TensorType
    """Of the whole tensor."""
    start: int
    num_elements: int
    num_bytes: int
    digest: bytes
    """SHA-256 of the values."""


def check_slice(piece: Slice, layout: Layout | None) -> None:
    """Check one slice by itself and against the layout of the versions before.

    Raises:
        RefusedError: BAD_MANIFEST.
    """
    name, (dtype, shape) = piece.name, piece.type
    if not _NAME.fullmatch(name):
        raise RefusedError("BAD_MANIFEST", f"tensor name {name!r}; use letters, digits and _ . -")
    if dtype not in ITEM_BYTES:
        raise RefusedError("BAD_MANIFEST", f"{name}: dtype {dtype!r}; use {sorted(ITEM_BYTES)}")
    if layout is not None and layout.get(name) != piece.type:
        raise RefusedError(
            "BAD_MANIFEST", f"{name}: {dtype} {shape}; the first version has {layout.get(name)}"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise RefusedError(
            "BAD_MANIFEST", f"{name}: {len(shape)} dimensions; at most {MAX_DIMENSIONS}"
        )
    if piece.start + piece.num_elements > math.prod(shape):
        raise RefusedError(
            "BAD_MANIFEST", f"{name}: slice to {piece.start + piece.num_elements} of shape {shape}"
        )
    if piece.num_bytes != piece.num_elements * ITEM_BYTES[dtype]:
        raise RefusedError(
            "BAD_MANIFEST", f"{name}: {piece.num_bytes} bytes for {piece.num_elements} of {dtype}"
        )


def check_cover(slices: Iterable[Slice], layout: Layout | None) -> Layout:
    """Check that slices cover every tensor exactly once; returns the layout that they cover.

    Raises:
        RefusedError: MISSING_TENSOR for a gap, BAD_MANIFEST for an overlap or two types.
    """
    by_name: dict[str, list[Slice]] = {}
    for piece in slices:
        by_name.setdefault(piece.name, []).append(piece)
    for name in layout or ():
        if name not in by_name:
            raise RefusedError("MISSING_TENSOR", f"{name}: no part has it; publish all of it")
    for name, pieces in by_name.items():
        _check_tensor(name, sorted(pieces, key=lambda piece: piece.start))
    return {name: pieces[0].type for name, pieces in by_name.items()}


def _check_tensor(name: str, pieces: Sequence[Slice]) -> None:
    position, kind = 0, pieces[0].type
    for piece in pieces:
        if piece.type != kind:
            raise RefusedError("BAD_MANIFEST", f"{name}: {piece.type} and {kind} in two parts")
        if piece.start < position and piece.num_elements:
            raise RefusedError(
                "BAD_MANIFEST", f"{name}: elements from {piece.start} come twice; send them once"
            )
        if piece.start > position:
            raise RefusedError(
                "MISSING_TENSOR", f"{name}: elements {position} to {piece.start} are in no part"
            )
        position += piece.num_elements
    total = math.prod(kind.shape)
    if position != total:
        raise RefusedError(
            "MISSING_TENSOR", f"{name}: elements {position} to {total} are in no part"
        )


def check_values(slices: Sequence[Slice], payload: ByteArray) -> None:
    """Check digests and that every value is finite. Takes time: run it on a thread.

    Raises:
        RefusedError: BAD_DIGEST, NON_FINITE.
    """
    offset = 0
    for piece in slices:
        data = payload[offset : offset + piece.num_bytes]
        offset += piece.num_bytes
        if hashlib.sha256(data.data).digest() != piece.digest:
            raise RefusedError("BAD_DIGEST", f"{piece.name}: values from {piece.start} on differ")
        if not _all_finite(piece.type.dtype, data):
            raise RefusedError(
                "NON_FINITE", f"{piece.name}: a NaN or infinity in the slice at {piece.start}"
            )


def _all_finite(dtype: str, data: ByteArray) -> bool:
    step = _BLOCK_ELEMENTS * ITEM_BYTES[dtype]
    blocks = (data[start : start + step] for start in range(0, len(data), step))
    if dtype == "F32":
        return all(np.isfinite(block.view("<f4")).all() for block in blocks)
    exponent = np.uint16(0x7F80)
    return all(((block.view("<u2") & exponent) != exponent).all() for block in blocks)
