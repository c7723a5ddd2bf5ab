"""Deltas give back the new values bit by bit, and a body that is not one is refused by name."""

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.v1 import weight_pb2
from understudy.weights.encoding import (
    DENSE,
    SPARSE_STEPS,
    SPARSE_WORDS,
    all_finite,
    apply,
    digest_of,
    encode,
    find_changes,
)
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import ByteArray
from understudy.weights.manifest import check_slice
from weight_pieces import bits, body_of, describe, sparse_slice, step_at, values

each_dtype = pytest.mark.parametrize("dtype", ["BF16", "F32"])
NAN = {"BF16": 0x7FC0, "F32": 0x7FC00000}
INFINITY = {"BF16": 0xFF80, "F32": 0xFF800000}


def there_and_back(dtype: str, old: ByteArray, new: ByteArray) -> weight_pb2.TensorSlice:
    """Encode, check as a store does, apply to a copy; returns the slice."""
    before = old.copy()
    delta = encode(dtype, old, new)
    piece = describe(delta, new, dtype)
    check_slice(piece, None, based=True)
    target = old.copy()
    apply(piece, body_of(delta), target)
    assert np.array_equal(target, new)
    assert digest_of(target) == piece.digest
    assert np.array_equal(old, before), "encoding changed the base"
    return piece


def noise(dtype: str, count: int, seed: int) -> ByteArray:
    """[count * B] bytes of any finite values at all: nothing compresses them."""
    raw = np.random.default_rng(seed).integers(
        256, size=count * (2 if dtype == "BF16" else 4), dtype="u1"
    )
    word = bits(dtype, raw)
    exponent = word.dtype.type(0x7F80 if dtype == "BF16" else 0x7F800000)
    word[(word & exponent) == exponent] = 0
    return raw


def frame(data: bytes) -> bytes:
    """One zstd frame with its content size."""
    return zstandard.ZstdCompressor().compress(data)


def try_apply(piece: weight_pb2.TensorSlice, body: ByteArray, target: ByteArray) -> str:
    """Apply, and return the reason of a refusal; other errors fail the test."""
    try:
        apply(piece, body, target)
    except WeightsRefusedError as error:
        return error.reason
    return ""


def refusal(
    piece: weight_pb2.TensorSlice, body: bytes | ByteArray, target: ByteArray
) -> WeightsRefusedError:
    """What `apply` says; anything but a refusal fails the test."""
    with pytest.raises(WeightsRefusedError) as refused:
        apply(piece, np.frombuffer(bytes(body), np.uint8), target.copy())
    assert "a.weight" in refused.value.detail
    return refused.value


# Round trips


@each_dtype
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("count", [64, 100_003, 2**18 + 5])
def test_any_share_of_change_comes_back(dtype: str, share: float, count: int) -> None:
    old = values(dtype, count)
    changed = np.flatnonzero(np.random.default_rng(2).random(count) < share)
    piece = there_and_back(dtype, old, step_at(dtype, old, changed))
    assert piece.encoding == SPARSE_STEPS
    assert piece.num_changed == len(changed)


@each_dtype
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 15, 17, 63, 2**18 - 1, 2**18, 2**18 + 1])
@pytest.mark.parametrize("where", ["none", "first", "last", "both"])
def test_the_ends_of_a_slice_come_back(dtype: str, count: int, where: str) -> None:
    ends = {"none": [], "first": [0], "last": [count - 1], "both": sorted({0, count - 1})}
    old = values(dtype, count)
    there_and_back(dtype, old, step_at(dtype, old, np.array(ends[where], int)))


@each_dtype
@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 257, 65_535, 65_536, 70_000])
@pytest.mark.parametrize("first", [0, 3, 255])
def test_gaps_of_any_length_come_back(dtype: str, gap: int, first: int) -> None:
    old = values(dtype, first + 3 * (gap + 1) + 300)
    changed = first + (gap + 1) * np.arange(4)
    piece = there_and_back(dtype, old, step_at(dtype, old, changed))
    assert piece.num_changed == 4
    has_long_gaps = piece.plane_bytes[1] > 0
    assert has_long_gaps == (max(gap, first) >= 255)


def test_a_slice_in_which_nothing_changed_takes_no_bytes() -> None:
    old = values("BF16", 1000)
    piece = there_and_back("BF16", old, old.copy())
    assert (piece.num_changed, piece.num_bytes, list(piece.plane_bytes)) == (0, 0, [])


def test_an_empty_slice_is_encoded() -> None:
    assert encode("BF16", np.zeros(0, np.uint8), np.zeros(0, np.uint8)).num_bytes == 0


@each_dtype
def test_special_values_come_back(dtype: str) -> None:
    sign = 0x8000 if dtype == "BF16" else 0x80000000
    largest = 0x7F7F if dtype == "BF16" else 0x7F7FFFFF
    special = [0, sign, 1, sign | 1, 0x7F, sign | 0x7F, largest, sign | largest]
    pairs = [(a, b) for a in special for b in special]
    old, new = (
        np.array(column, bits(dtype, values(dtype, 1)).dtype) for column in zip(*pairs, strict=True)
    )
    there_and_back(dtype, old.view(np.uint8), new.view(np.uint8))


@each_dtype
def test_a_change_of_sign_alone_comes_back(dtype: str) -> None:
    old = values(dtype, 5000)
    new = old.copy()
    top = bits(dtype, new)
    top[::50] ^= top.dtype.type(1 << (8 * top.itemsize - 1))
    there_and_back(dtype, old, new)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_two_states_come_back(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["BF16", "F32"]))
    limit = 0x7F80 if dtype == "BF16" else 0x7F800000
    top = 0x8000 if dtype == "BF16" else 0x80000000
    word = st.builds(
        lambda low, sign: low | sign, st.integers(0, limit - 1), st.sampled_from([0, top])
    )
    old = np.array(
        data.draw(st.lists(word, min_size=1, max_size=300)), bits(dtype, values(dtype, 1)).dtype
    )
    new = old.copy()
    edits = data.draw(st.dictionaries(st.integers(0, len(old) - 1), word, max_size=len(old)))
    for position, value in edits.items():
        new[position] = value
    there_and_back(dtype, old.view(np.uint8), new.view(np.uint8))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 2**18 - 1, 2**18 + 3])
def test_positions_are_those_that_differ(count: int) -> None:
    rng = np.random.default_rng(count)
    before = rng.integers(2, size=count, dtype="u2")
    after = rng.integers(2, size=count, dtype="u2")
    positions, old, new = find_changes(before, after)
    assert np.array_equal(positions, np.flatnonzero(before != after))
    assert np.array_equal(old, before[positions])
    assert np.array_equal(new, after[positions])


# Which encoding


def test_words_are_sent_where_steps_are_noise() -> None:
    # A few values, each of which jumps to one of two: the words compress, the steps do not.
    count = 200_000
    old = np.random.default_rng(0).integers(0x7F00, size=count, dtype="u2").view(np.uint8)
    new = old.copy()
    changed = np.arange(0, count, 10)
    bits("BF16", new)[changed] = np.random.default_rng(1).choice([0x3C00, 0x3D00], len(changed))
    piece = there_and_back("BF16", old, new)
    assert piece.encoding == SPARSE_WORDS
    assert piece.num_bytes < 2 * len(changed)


@each_dtype
def test_words_apply_as_often_as_one_likes(dtype: str) -> None:
    old = noise(dtype, 100_000, seed=0)
    new = old.copy()
    bits(dtype, new)[::10] = bits(dtype, noise(dtype, 10_000, seed=1))
    delta = encode(dtype, old, new)
    assert delta.encoding == SPARSE_WORDS
    target = old.copy()
    for _ in range(2):
        apply(describe(delta, new, dtype), body_of(delta), target)
    assert np.array_equal(target, new)


def test_steps_that_are_applied_twice_have_another_digest() -> None:
    old = values("BF16", 10_000)
    new = step_at("BF16", old, np.arange(0, 10_000, 100))
    piece, body = sparse_slice(old, new)
    assert piece.encoding == SPARSE_STEPS
    target = old.copy()
    for _ in range(2):
        apply(piece, body, target)
    assert digest_of(target) != piece.digest


@each_dtype
def test_values_are_sent_as_they_are_where_nothing_helps(dtype: str) -> None:
    new = noise(dtype, 100_000, seed=1)
    piece = there_and_back(dtype, noise(dtype, 100_000, seed=0), new)
    assert piece.encoding == DENSE
    assert piece.num_bytes == len(new)


@each_dtype
def test_a_delta_is_never_larger_than_the_values(dtype: str) -> None:
    for count in (1, 2, 3, 8, 40):
        old = values(dtype, count)
        piece = there_and_back(dtype, old, values(dtype, count, seed=9))
        assert piece.num_bytes <= len(old)


def test_one_change_in_a_hundred_takes_a_sixtieth_of_the_bytes() -> None:
    old = values("BF16", 1_000_000)
    changed = np.flatnonzero(np.random.default_rng(3).random(1_000_000) < 0.01)
    piece = there_and_back("BF16", old, step_at("BF16", old, changed))
    assert piece.num_bytes < len(old) / 60


# Bodies that are not what the slice says


@pytest.fixture
def state() -> tuple[ByteArray, weight_pb2.TensorSlice, ByteArray]:
    """A base, and a slice with all kinds of planes and its body."""
    old = values("BF16", 80_000)
    changed = np.concatenate((np.arange(5, 5000, 9), [6000, 70_000]))
    return old, *sparse_slice(old, step_at("BF16", old, changed))


def test_every_cut_of_a_body_is_refused(state: tuple) -> None:
    old, piece, body = state
    for length in range(len(body)):
        assert refusal(piece, body[:length], old).reason == "BAD_PAYLOAD"


def test_a_longer_body_is_refused(state: tuple) -> None:
    old, piece, body = state
    assert refusal(piece, bytes(body) + b"\0", old).reason == "BAD_PAYLOAD"


@pytest.mark.parametrize("length", [0, 1, 2, 199, 201, 400])
def test_dense_values_of_another_size_are_refused(length: int) -> None:
    new = values("BF16", 100)
    piece = describe(encode("BF16", values("BF16", 100, seed=8) ^ 255, new), new, "BF16")
    piece.encoding, piece.num_changed, piece.num_bytes = DENSE, 0, 200
    del piece.plane_bytes[:]
    assert refusal(piece, b"\1" * length, new).reason == "BAD_PAYLOAD"


def test_a_flipped_bit_is_refused_or_shows_in_the_digest(state: tuple) -> None:
    old, piece, body = state
    rng = np.random.default_rng(4)
    for _ in range(2000):
        flipped = body.copy()
        flipped[rng.integers(len(body))] ^= 1 << rng.integers(8)
        target = old.copy()
        reason = try_apply(piece, flipped, target)
        assert reason in ("", "BAD_PAYLOAD", "NON_FINITE")
        if not reason:
            # zstd has bits that mean nothing; then the values are right.
            unharmed = old.copy()
            apply(piece, body, unharmed)
            assert np.array_equal(target, unharmed) == (digest_of(target) == piece.digest)


def with_plane(
    state: tuple[ByteArray, weight_pb2.TensorSlice, ByteArray], index: int, plane: bytes
) -> tuple[weight_pb2.TensorSlice, bytes]:
    """The slice and its body with another plane in one place."""
    _, piece, body = state
    changed = weight_pb2.TensorSlice()
    changed.CopyFrom(piece)
    ends = np.cumsum([0, *piece.plane_bytes])
    changed.plane_bytes[index] = len(plane)
    changed.num_bytes = sum(changed.plane_bytes)
    return changed, bytes(body[: ends[index]]) + plane + bytes(body[ends[index + 1] :])


@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "plane",
    [
        b"no frame",
        frame(b""),
        frame(b"\1"),
        frame(bytes(2**26)),
        frame(b"\1" * 2**20),
        frame(b"\1")[:-1],
        frame(b"\1") * 2,
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(557)),
        b"\x50\x2a\x4d\x18\4\0\0\0skip",
    ],
    ids=["text", "empty", "short", "bomb", "long", "cut", "twice", "no-size", "skippable"],
)
def test_a_plane_of_another_size_is_refused(state: tuple, index: int, plane: bytes) -> None:
    assert refusal(*with_plane(state, index, plane), state[0]).reason == "BAD_PAYLOAD"


def test_a_frame_that_holds_more_than_it_says_is_refused(state: tuple) -> None:
    _, piece, _ = state
    lying = bytearray(frame(bytes(60_000)))
    # Behind magic number and descriptor: the content's size less 256, in two bytes.
    lying[5:7] = (piece.num_changed - 256).to_bytes(2, "little")
    assert zstandard.frame_content_size(bytes(lying)) == piece.num_changed
    assert refusal(*with_plane(state, 0, bytes(lying)), state[0]).reason == "BAD_PAYLOAD"


def test_two_frames_in_one_plane_are_refused(state: tuple) -> None:
    _, piece, body = state
    first = bytes(body[: piece.plane_bytes[0]])
    assert refusal(*with_plane(state, 0, first + frame(b"")), state[0]).reason == "BAD_PAYLOAD"


def test_a_change_beyond_the_end_is_refused(state: tuple) -> None:
    old, piece, _ = state
    for gap in (40_000, 80_000, 2**32 - 1):
        long = frame(np.array([gap, gap], "<u4").tobytes())
        assert "elements" in refusal(*with_plane(state, 1, long), old).detail
    everywhere = frame(b"\xfe" * piece.num_changed)
    changed, body = with_plane(state, 0, everywhere)
    cut = body[: changed.plane_bytes[0]] + body[changed.plane_bytes[0] + changed.plane_bytes[1] :]
    changed.num_bytes -= changed.plane_bytes[1]
    changed.plane_bytes[1] = 0
    assert "elements" in refusal(changed, cut, old).detail


def test_the_last_element_may_change_and_the_one_behind_it_may_not() -> None:
    old = values("BF16", 300)
    piece, body = sparse_slice(old, step_at("BF16", old, np.array([299])))
    apply(piece, body, old.copy())
    assert "299 of 299" in refusal(piece, body, old[:-2]).detail


@each_dtype
@pytest.mark.parametrize("bad", [NAN, INFINITY], ids=["nan", "infinity"])
def test_a_value_that_is_not_finite_is_refused(dtype: str, bad: dict[str, int]) -> None:
    old = values(dtype, 5000)
    new = step_at(dtype, old, np.arange(0, 5000, 50))
    bits(dtype, new)[2500] = bad[dtype]
    assert not all_finite(dtype, new)
    delta = encode(dtype, old, new)
    assert delta.encoding == SPARSE_STEPS
    assert refusal(describe(delta, new, dtype), body_of(delta), old).reason == "NON_FINITE"
    dense = describe(delta, new, dtype)
    dense.encoding, dense.num_bytes = DENSE, len(new)
    assert refusal(dense, new, old).reason == "NON_FINITE"


@each_dtype
def test_a_large_or_tiny_value_is_finite(dtype: str) -> None:
    largest = 0x7F7F if dtype == "BF16" else 0x7F7FFFFF
    for word in (0, 1, largest):
        raw = values(dtype, 3)
        bits(dtype, raw)[:] = word
        assert all_finite(dtype, raw)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_body_is_applied_or_refused(data: st.DataObject) -> None:
    old = values("BF16", 40)
    sizes = data.draw(st.lists(st.integers(0, 24), min_size=4, max_size=4))
    piece = weight_pb2.TensorSlice(
        name="a.weight", dtype="BF16", shape=[40], num_elements=40, digest=bytes(32),
        encoding=data.draw(st.sampled_from([SPARSE_STEPS, SPARSE_WORDS])),
        num_changed=data.draw(st.integers(1, 40)), plane_bytes=sizes, num_bytes=sum(sizes),
    )  # fmt: skip
    planes = st.one_of(st.binary(max_size=24), st.binary(max_size=12).map(frame))
    body = b"".join(data.draw(planes)[:size].ljust(size, b"\0") for size in sizes)
    reason = try_apply(piece, np.frombuffer(body, np.uint8), old)
    assert reason in ("", "BAD_PAYLOAD", "NON_FINITE")
