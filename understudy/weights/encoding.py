"""Deltas: the values of a tensor slice written as what changed since the base, and applied again.

After a step with a small learning rate few bfloat16 values change, and those by a unit in the last
place. A delta says where (gaps between changed values, a byte each) and by how much (steps of the
word, which are nearly all 1 or -1). N values of B bytes, C of which changed:

    gaps [C] uint8             unchanged values before each changed one; 255 means: look in `long`
    long gaps [L] uint32       those of 255 and more, in order
    bytes 0 .. B-1 of the steps (or of the new words), [C] uint8 each

Each plane is a zstd frame of its own, since their statistics differ; a plane of zeros is left
out. Where all values change, as they nearly do in float32, there are no gaps and no bytes for them.
Steps apply exactly once, to the base alone; the digest of the new values tells whether they were.
Words apply as often as one likes, and are smaller where steps are random.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard
from blake3 import blake3

from understudy.compression import Contexts
from understudy.v1 import weight_pb2
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import ByteArray

DIGEST_BYTES = 32
DENSE = weight_pb2.TENSOR_ENCODING_DENSE
SPARSE_STEPS = weight_pb2.TENSOR_ENCODING_SPARSE_STEPS
SPARSE_WORDS = weight_pb2.TENSOR_ENCODING_SPARSE_WORDS

_SAMPLE = 2**15
"""Changed values whose steps are tried before those of all."""
_HOPELESS = 0.9
"""Compressed share of the sample's bytes above which steps are not worth more time."""
_BLOCK = 2**18
"""Values compared at a time: what the cache holds."""
_LONG_GAP = 255

WordArray = npt.NDArray[Any]
"""[N] uint16 for BF16, uint32 for F32: the values' bits."""

_WORDS: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F32": np.dtype("<u4")}
_EXPONENTS = {"BF16": 0x7F80, "F32": 0x7F800000}
# Level 1: higher ones gain 1 to 3 % at half the speed.
_ZSTD = Contexts(level=1, checksum=False)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """An encoded slice, as TensorSlice describes it."""

    encoding: "weight_pb2.TensorEncoding.ValueType"
    num_changed: int = 0
    planes: tuple[bytes, ...] = ()
    values: ByteArray | None = None
    """The values themselves, for DENSE."""

    @property
    def payload(self) -> Sequence[bytes | memoryview]:
        """The slice's bytes in the payload, in pieces."""
        return self.planes if self.values is None else (self.values.data,)

    @property
    def num_bytes(self) -> int:
        """Bytes in the payload."""
        return sum(map(len, self.payload))


def digest_of(values: ByteArray) -> bytes:
    """BLAKE3 of dense values; three times as fast as SHA-256 on one core."""
    return blake3(values.data).digest()


def words(dtype: str, values: ByteArray) -> WordArray:
    """The values' bits: a view."""
    view: WordArray = values.view(_WORDS[dtype])
    return view


def all_finite(dtype: str, values: ByteArray) -> bool:
    """Whether no value is infinite or NaN."""
    bits = words(dtype, values)
    exponent = bits.dtype.type(_EXPONENTS[dtype])
    blocks = (bits[start : start + _BLOCK] for start in range(0, len(bits), _BLOCK))
    return all(bool(((block & exponent) != exponent).all()) for block in blocks)


def encode(dtype: str, old: ByteArray, new: ByteArray) -> Delta:
    """Write `new` as what changed since `old`, in the encoding with the fewest bytes.

    Args:
        dtype: `F32` or `BF16`.
        old: [N * B] bytes of the base, little-endian.
        new: [N * B] bytes.
    """
    changes = find_changes(words(dtype, old), words(dtype, new))
    if not len(changes.positions):
        return Delta(encoding=SPARSE_STEPS)
    delta = _encode_sparse(changes)
    if delta is None or delta.num_bytes >= len(new):
        return Delta(encoding=DENSE, values=new)
    return delta


class Changes(NamedTuple):
    """Where two arrays of words differ, and what is there."""

    positions: npt.NDArray[np.int64]
    """[C] ascending."""
    before: WordArray
    """[C] the words of the one."""
    after: WordArray
    """[C] those of the other."""


def find_changes(before: WordArray, after: WordArray) -> Changes:
    """Compare two arrays of as many words. What is all different comes back as views of them."""
    flags = np.empty(min(len(after), _BLOCK), np.bool_)
    found = []
    for start in range(0, max(len(after), 1), _BLOCK):
        one, other = before[start : start + _BLOCK], after[start : start + _BLOCK]
        at = _true_positions(np.not_equal(one, other, out=flags[: len(other)]))
        if len(at) < len(other):
            # Taken while the cache has them; later would be from memory, word for word.
            one, other = one[at], other[at]
        found.append(Changes(at + start, one, other))
    return found[0] if len(found) == 1 else Changes(*map(np.concatenate, zip(*found, strict=True)))


def _true_positions(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    # Eight flags at a time: few groups have any, which is a third faster than looking at each.
    whole = len(flags) // 8 * 8
    groups = flags[:whole].view(np.uint64)
    hit = np.flatnonzero(groups != 0)
    inside = np.flatnonzero(groups[hit].view(np.bool_))
    positions: npt.NDArray[np.int64] = hit[inside >> 3]
    positions <<= 3
    positions |= inside & 7
    if whole == len(flags):
        return positions
    return np.concatenate((positions, np.flatnonzero(flags[whole:]) + whole))


def _encode_sparse(changes: Changes) -> Delta | None:
    where = _encode_positions(changes.positions)
    if where is None:
        return None
    encoding, planes = _encode_numbers(changes.before, changes.after)
    return Delta(encoding=encoding, num_changed=len(changes.positions), planes=where + planes)


def _encode_positions(changed: npt.NDArray[np.int64]) -> tuple[bytes, bytes] | None:
    """Gaps and long gaps; None if one is too long."""
    if changed[-1] == len(changed) - 1:
        return b"", b""  # all changed, as nearly always in float32: no gaps
    gaps = changed.copy()
    gaps[1:] -= changed[:-1] + 1
    long = gaps[gaps >= _LONG_GAP]
    if len(long) and long.max() >= 2**32:
        return None
    short = np.minimum(gaps, _LONG_GAP).astype(np.uint8)
    return _compress(short), _compress(long.astype("<u4").view(np.uint8))


def _encode_numbers(
    before: WordArray, after: WordArray
) -> tuple["weight_pb2.TensorEncoding.ValueType", tuple[bytes, ...]]:
    """Steps, or words where those are smaller."""
    tried = _planes(_zigzag(after[:_SAMPLE] - before[:_SAMPLE]))
    if sum(map(len, tried)) < _HOPELESS * after[:_SAMPLE].nbytes:
        whole = len(after) <= _SAMPLE
        return SPARSE_STEPS, tried if whole else _planes(_zigzag(after - before))
    return SPARSE_WORDS, _planes(after)


def _planes(numbers: WordArray) -> tuple[bytes, ...]:
    return tuple(map(_compress, _byte_planes(numbers)))


def _zigzag(step: WordArray) -> WordArray:
    """Small steps of either sign as small numbers."""
    signed = step.view(f"<i{step.itemsize}")
    result: WordArray = ((signed << 1) ^ (signed >> (8 * step.itemsize - 1))).view(step.dtype)
    return result


def _unzigzag(number: WordArray) -> WordArray:
    one = number.dtype.type(1)
    result: WordArray = (number >> one) ^ (~(number & one) + one)
    return result


def _byte_planes(numbers: WordArray) -> list[ByteArray]:
    table = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, numbers.itemsize)
    return [np.ascontiguousarray(table[:, index]) for index in range(numbers.itemsize)]


def _compress(plane: ByteArray) -> bytes:
    return _ZSTD.compressor.compress(plane.data) if plane.any() else b""


def apply(piece: weight_pb2.TensorSlice, body: ByteArray, target: ByteArray) -> None:
    """Turn a slice's values from those of the base into the new ones, in place.

    Args:
        piece: the slice, which has passed `manifest.check_slice`.
        body: [num_bytes] its bytes in the payload.
        target: its values as they are in the base; undefined after an error.

    Raises:
        WeightsRefusedError: BAD_PAYLOAD for bytes that are not what the slice says; NON_FINITE for
            a new value that is infinite or NaN.
    """
    if len(body) != piece.num_bytes:
        raise WeightsRefusedError(
            "BAD_PAYLOAD",
            f"{piece.name}: {len(body)} bytes from {piece.start}, not {piece.num_bytes}",
        )
    if piece.encoding == DENSE:
        target[:] = body
        new = words(piece.dtype, target)
    elif piece.num_changed:
        new = _apply_sparse(piece, body, words(piece.dtype, target))
    else:
        return
    require_finite(piece, new.view(np.uint8))


def require_finite(piece: weight_pb2.TensorSlice, values: ByteArray) -> None:
    """Refuse a slice with a NaN or an infinity. Raises WeightsRefusedError: NON_FINITE."""
    if not all_finite(piece.dtype, values):
        raise WeightsRefusedError(
            "NON_FINITE", f"{piece.name}: a NaN or infinity in the slice at {piece.start}"
        )


def _apply_sparse(piece: weight_pb2.TensorSlice, body: ByteArray, target: WordArray) -> WordArray:
    """Returns the values that were written."""
    where = _read_positions(piece, body, len(target))
    start = sum(piece.plane_bytes[:2])
    numbers = _read_planes(piece, body[start:], piece.plane_bytes[2:], piece.num_changed)
    if piece.encoding == SPARSE_STEPS:
        numbers = target[where] + _unzigzag(numbers)
    target[where] = numbers
    return numbers


def _read_positions(
    piece: weight_pb2.TensorSlice, body: ByteArray, num_elements: int
) -> npt.NDArray[np.int64] | slice:
    """Where the changed values lie, all of them among `num_elements`."""
    gap_bytes, long_bytes = piece.plane_bytes[:2]
    if not gap_bytes and not long_bytes and piece.num_changed <= num_elements:
        return slice(piece.num_changed)  # no gaps: eight bytes a value spared
    gaps = _inflate(piece, body[:gap_bytes], piece.num_changed)
    is_long = gaps == _LONG_GAP
    long = _inflate(piece, body[gap_bytes : gap_bytes + long_bytes], 4 * int(is_long.sum()))
    positions = gaps.astype(np.int64)
    positions[is_long] = long.view("<u4")
    positions += 1
    positions = np.cumsum(positions) - 1
    if positions[-1] >= num_elements:
        raise WeightsRefusedError(
            "BAD_PAYLOAD", f"{piece.name}: a change at {positions[-1]} of {num_elements} elements"
        )
    return positions


def _read_planes(
    piece: weight_pb2.TensorSlice, body: ByteArray, sizes: Sequence[int], count: int
) -> WordArray:
    """[count] words from their byte planes."""
    table = np.empty((count, len(sizes)), np.uint8)
    start = 0
    for index, size in enumerate(sizes):
        table[:, index] = _inflate(piece, body[start : start + size], count)
        start += size
    return words(piece.dtype, table.reshape(-1))


def _inflate(piece: weight_pb2.TensorSlice, frame: ByteArray, num_bytes: int) -> ByteArray:
    """Decompress a plane that has to have so many bytes; one of zeros has no frame."""
    if not len(frame):
        return np.zeros(num_bytes, np.uint8)
    try:
        # The frame's own word for its size decides what is allocated: hold it to what must be.
        if zstandard.frame_content_size(frame.data) == num_bytes:
            plane = _ZSTD.decompressor.decompress(
                frame.data, max_output_size=num_bytes, allow_extra_data=False
            )
            if len(plane) == num_bytes:
                return np.frombuffer(plane, np.uint8)
        detail = f"a plane is not of {num_bytes} bytes"
    except zstandard.ZstdError as error:
        detail = f"not a zstd frame: {error}"
    raise WeightsRefusedError("BAD_PAYLOAD", f"{piece.name} from {piece.start}: {detail}")
