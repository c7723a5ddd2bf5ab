"""Every rule for slices and values, each broken once: the reason says which."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from understudy.v1 import weight_pb2
from understudy.weights.encoding import DENSE, SPARSE_STEPS, SPARSE_WORDS, digest_of
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import ALIGNMENT, HostBuffer, TensorEntry, end_of, plan_layout
from understudy.weights.manifest import (
    check_slice,
    check_slices,
    check_values,
    slice_bytes,
)
from weight_pieces import bits, values

Slice = weight_pb2.TensorSlice
Change = Callable[[Slice], None]


def dense(name: str = "a.weight", start: int = 0, count: int = 24, **fields: object) -> Slice:
    """A slice of a [4, 6] tensor that passes."""
    made = Slice(
        name=name, dtype="BF16", shape=[4, 6], start=start, num_elements=count, encoding=DENSE,
        num_bytes=2 * count, digest=bytes(32),
    )  # fmt: skip
    made.MergeFrom(Slice(**fields))
    return made


def sparse() -> Slice:
    """A delta of a [4, 6] tensor that passes where there is a base."""
    return Slice(
        name="a.weight", dtype="BF16", shape=[4, 6], num_elements=24, encoding=SPARSE_STEPS,
        num_changed=3, plane_bytes=[12, 0, 12, 0], num_bytes=24, digest=bytes(32),
    )  # fmt: skip


def setting(**fields: object) -> Change:
    """Give fields other values."""

    def change(piece: Slice) -> None:
        for name, value in fields.items():
            piece.ClearField(name)
            if isinstance(value, list):
                getattr(piece, name).extend(value)
            else:
                setattr(piece, name, value)

    return change


MODEL = {entry.name: entry for entry in plan_layout([("a.weight", "BF16", (4, 6))])}

BROKEN_DENSE = {
    "UNKNOWN_TENSOR": [
        setting(name=""),
        setting(name="../../etc/passwd"),
        setting(name="/a"),
        setting(name=".hidden"),
        setting(name="-a"),
        setting(name="a\0b"),
        setting(name="a b"),
        setting(name="a\n"),
        setting(name="a" * 257),
        setting(name="b.weight"),
    ],
    "BAD_SHAPE": [
        setting(shape=[6, 4]),
        setting(shape=[24]),
        setting(shape=[4, 6, 1]),
        setting(dtype="F32", num_bytes=96),
    ],
    "BAD_MANIFEST": [
        setting(dtype=""),
        setting(dtype="F16"),
        setting(dtype="bf16"),
        setting(shape=[0, 6]),
        setting(shape=[1] * 9),
        setting(num_elements=0, num_bytes=0),
        setting(num_elements=25, num_bytes=50),
        setting(start=1),
        setting(start=2**64 - 1),
        setting(num_elements=2**64 - 1),
        setting(digest=b""),
        setting(digest=bytes(31)),
        setting(digest=bytes(33)),
        setting(encoding=0),
        setting(encoding=4),
        setting(num_bytes=0),
        setting(num_bytes=47),
        setting(num_bytes=49),
        setting(num_bytes=2**64 - 1),
        setting(num_changed=1),
        setting(plane_bytes=[48]),
        setting(plane_bytes=[12, 12, 12, 12]),
    ],
}
BROKEN_SPARSE = [
    setting(num_changed=25),
    setting(num_changed=2**64 - 1),
    setting(num_changed=0),
    setting(num_changed=0, plane_bytes=[]),
    setting(plane_bytes=[]),
    setting(plane_bytes=[12, 12]),
    setting(plane_bytes=[12, 0, 12, 0, 0]),
    setting(plane_bytes=[12, 0, 12, 1]),
    setting(num_bytes=23),
    setting(num_bytes=0),
    setting(plane_bytes=[12, 12, 12, 13], num_bytes=49),
    setting(plane_bytes=[2**63, 2**63, 12, 12], num_bytes=24),
    setting(encoding=SPARSE_WORDS, plane_bytes=[12, 0, 12], num_bytes=24),
    setting(dtype="F32"),
]


def reason_of(*pieces: Slice, known: dict[str, TensorEntry] | None = None, based: bool) -> str:
    """Why slices are refused, as parts and as a version."""
    expected = None if known is None else tuple(known.values())
    with pytest.raises(WeightsRefusedError) as refused:
        check_slices(pieces, expected, based=based)
    return refused.value.reason


def test_slices_that_keep_the_rules_pass() -> None:
    for known in (None, MODEL):
        check_slice(dense(), known, based=False)
        check_slice(dense(), known, based=True)
        check_slice(sparse(), known, based=True)
        unchanged = sparse()
        setting(num_changed=0, plane_bytes=[], num_bytes=0)(unchanged)
        check_slice(unchanged, known, based=True)


@pytest.mark.parametrize(
    ("reason", "change"),
    [(reason, change) for reason, changes in BROKEN_DENSE.items() for change in changes],
)
@pytest.mark.parametrize("based", [False, True])
def test_a_broken_dense_slice_is_refused(reason: str, change: Change, based: bool) -> None:
    piece = dense()
    change(piece)
    with pytest.raises(WeightsRefusedError) as refused:
        check_slice(piece, MODEL, based=based)
    assert refused.value.reason == reason


@pytest.mark.parametrize("change", BROKEN_SPARSE)
def test_a_broken_delta_is_refused(change: Change) -> None:
    piece = sparse()
    change(piece)
    with pytest.raises(WeightsRefusedError) as refused:
        check_slice(piece, None, based=True)
    assert refused.value.reason == "BAD_MANIFEST"


@pytest.mark.parametrize("encoding", [SPARSE_STEPS, SPARSE_WORDS])
def test_a_delta_needs_a_base(encoding: "weight_pb2.TensorEncoding.ValueType") -> None:
    piece = sparse()
    piece.encoding = encoding
    assert reason_of(piece, based=False) == "BAD_MANIFEST"


def test_a_detail_is_short_however_long_the_names() -> None:
    piece = dense(name="a" * 1_000_000, dtype="x" * 1_000_000, shape=list(range(1, 10_000)))
    with pytest.raises(WeightsRefusedError) as refused:
        check_slice(piece, None, based=False)
    assert len(refused.value.detail) < 300


# Whole versions


def halves() -> tuple[Slice, Slice]:
    """Two slices of one tensor."""
    return dense(count=12), dense(start=12, count=12)


def test_slices_in_any_order_cover_a_tensor() -> None:
    first, second = halves()
    layout = check_slices([second, dense("b"), first], None, based=False)
    assert [(entry.name, entry.shape) for entry in layout] == [("a.weight", (4, 6)), ("b", (4, 6))]
    assert check_slices([second, first], tuple(MODEL.values()), based=False) == (*MODEL.values(),)


def test_tensors_that_are_not_covered_exactly_once_are_refused() -> None:
    first, second = halves()
    known = {entry.name: entry for entry in plan_layout([(n, "BF16", (4, 6)) for n in "ab"])}
    other = dense(start=12, count=12)
    other.shape[:] = [24]
    wide = dense(start=12, count=12, dtype="F32")
    wide.num_bytes = 48
    table = [
        ("BAD_MANIFEST", [], None),
        ("BAD_MANIFEST", [], known),
        ("MISSING_TENSOR", [dense("a")], known),
        ("UNKNOWN_TENSOR", [dense("a"), dense("b"), dense("c")], known),
        ("MISSING_TENSOR", [first], None),
        ("MISSING_TENSOR", [second], None),
        ("MISSING_TENSOR", [first, dense(start=13, count=11)], None),
        ("DOUBLED_TENSOR", [first, second, second], None),
        ("DOUBLED_TENSOR", [first, first, second], None),
        ("DOUBLED_TENSOR", [dense(), dense()], None),
        ("DOUBLED_TENSOR", [first, dense(start=11, count=13)], None),
        ("BAD_SHAPE", [first, other], None),
        ("BAD_SHAPE", [first, wide], None),
    ]
    for reason, pieces, model in table:
        assert reason_of(*pieces, known=model, based=False) == reason, pieces


def test_a_layout_is_aligned_and_names_every_byte_once() -> None:
    shapes = [("a", "BF16", (3,)), ("b", "F32", ()), ("c", "F32", (5, 7)), ("d", "BF16", (32,))]
    layout = plan_layout(shapes)
    assert all(entry.offset % ALIGNMENT == 0 for entry in layout)
    buffer = HostBuffer(layout)
    for number, entry in enumerate(layout):
        buffer.tensor_bytes(entry.name)[:] = number
    for number, entry in enumerate(layout):
        taken = buffer.tensor_bytes(entry.name)
        assert len(taken) == math.prod(entry.shape) * (4 if entry.dtype == "F32" else 2)
        assert (taken == number).all()
    assert end_of(layout) == layout[-1].offset + 64
    assert end_of(()) == 0


# Values


def filled(count: int = 100) -> tuple[list[Slice], HostBuffer]:
    """Two slices of a tensor with their digests, and the buffer that holds it."""
    buffer = HostBuffer(plan_layout([("a.weight", "BF16", (count,))]))
    buffer.tensor_bytes("a.weight")[:] = values("BF16", count)
    half = count // 2
    pieces = [
        Slice(name="a.weight", dtype="BF16", shape=[count], start=start, num_elements=number)
        for start, number in ((0, half), (half, count - half))
    ]
    for piece in pieces:
        piece.digest = digest_of(slice_bytes(piece, buffer))
    return pieces, buffer


def test_values_with_their_digests_pass() -> None:
    pieces, buffer = filled()
    check_values(pieces, buffer, finite=True)


@pytest.mark.parametrize("position", [0, 1, 99, 100, 198, 199])
def test_another_byte_anywhere_is_refused(position: int) -> None:
    pieces, buffer = filled()
    buffer.tensor_bytes("a.weight")[position] ^= 1
    with pytest.raises(WeightsRefusedError) as refused:
        check_values(pieces, buffer, finite=False)
    assert refused.value.reason == "BAD_DIGEST"
    assert f"from {position // 100 * 50} on" in refused.value.detail


@pytest.mark.parametrize("word", [0x7F80, 0xFF80, 0x7F81, 0xFFFF])
@pytest.mark.parametrize("count", [100, 2**19 + 2])
def test_published_values_that_are_not_finite_are_refused(word: int, count: int) -> None:
    pieces, buffer = filled(count)
    bits("BF16", buffer.tensor_bytes("a.weight"))[-1] = word
    pieces[1].digest = digest_of(slice_bytes(pieces[1], buffer))
    check_values(pieces, buffer, finite=False)
    with pytest.raises(WeightsRefusedError) as refused:
        check_values(pieces, buffer, finite=True)
    assert refused.value.reason == "NON_FINITE"
    assert "a.weight" in refused.value.detail


def test_a_slice_is_a_view_of_the_buffer() -> None:
    pieces, buffer = filled()
    slice_bytes(pieces[1], buffer)[:] = 7
    assert (buffer.tensor_bytes("a.weight")[100:] == 7).all()
    assert not np.array_equal(buffer.tensor_bytes("a.weight")[:100], np.full(100, 7))
