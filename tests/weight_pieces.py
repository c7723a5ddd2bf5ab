"""Made-up values, and slices that describe them as a rank would."""

import numpy as np

from understudy.v1 import weight_pb2
from understudy.weights.encoding import DENSE, Delta, digest_of, encode
from understudy.weights.layout import ITEM_BYTES, ByteArray


def values(dtype: str, count: int, seed: int = 0) -> ByteArray:
    """[count * B] bytes of small finite values, as weights are."""
    numbers = np.random.default_rng(seed).normal(0, 0.02, count).astype("<f4")
    raw = numbers.view(np.uint8)
    if dtype == "BF16":
        raw = np.ascontiguousarray(raw.reshape(-1, 4)[:, 2:]).reshape(-1)
    return raw.copy()


def bits(dtype: str, raw: ByteArray) -> np.ndarray:
    """The values' words: a view."""
    return raw.view("<u2" if dtype == "BF16" else "<u4")


def step_at(dtype: str, old: ByteArray, positions: np.ndarray, seed: int = 1) -> ByteArray:
    """A copy in which these values moved by one unit in the last place."""
    new = old.copy()
    word = bits(dtype, new)
    signs = np.random.default_rng(seed).choice([-1, 1], len(positions))
    word[positions] = (word[positions].astype(np.int64) + signs).astype(word.dtype)
    return new


def describe(
    delta: Delta, new: ByteArray, dtype: str, name: str = "a.weight"
) -> weight_pb2.TensorSlice:
    """The slice of a whole tensor of one dimension."""
    count = len(new) // ITEM_BYTES[dtype]
    return weight_pb2.TensorSlice(
        name=name,
        dtype=dtype,
        shape=[count],
        num_elements=count,
        encoding=delta.encoding,
        num_bytes=delta.num_bytes,
        digest=digest_of(new),
        num_changed=delta.num_changed,
        plane_bytes=[len(plane) for plane in delta.planes],
    )


def body_of(delta: Delta) -> ByteArray:
    """The slice's bytes as a receiver sees them."""
    return np.frombuffer(b"".join(map(bytes, delta.payload)), np.uint8)


def sparse_slice(
    old: ByteArray, new: ByteArray, dtype: str = "BF16"
) -> tuple[weight_pb2.TensorSlice, ByteArray]:
    """A slice and its body; not DENSE."""
    delta = encode(dtype, old, new)
    assert delta.encoding != DENSE
    return describe(delta, new, dtype), body_of(delta)
