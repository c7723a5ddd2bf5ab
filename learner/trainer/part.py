"""A rank's part of a version as it goes over the wire: what changed since a base, or all values."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from learner.trainer.snapshot import HostCopy, HostSlice
from understudy.v1 import weight_pb2
from understudy.weights.cores import map_slices
from understudy.weights.encoding import DENSE, SPARSE_STEPS, Delta, encode
from understudy.weights.links import CHUNK_BYTES
from understudy.weights.manifest import describe_slice, seal


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part, ready to be sent as often as need be."""

    header: weight_pb2.PartHeader
    payload: Sequence[bytes | memoryview]
    """The slices' bytes in the header's order."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the payload."""
        return sum(map(len, self.payload))

    def messages(self) -> Iterator[weight_pb2.PublishWeightsRequest]:
        """The header, then the payload in chunks of at most 1 MiB."""
        yield weight_pb2.PublishWeightsRequest(header=self.header)
        chunk = bytearray()
        for piece in self.payload:
            view = memoryview(piece)
            while len(view):
                room = CHUNK_BYTES - len(chunk)
                chunk += view[:room]
                view = view[room:]
                if len(chunk) == CHUNK_BYTES:
                    yield weight_pb2.PublishWeightsRequest(chunk=bytes(chunk))
                    chunk.clear()
        if chunk:
            yield weight_pb2.PublishWeightsRequest(chunk=bytes(chunk))


class FrozenSlices:
    """Slices whose values are the same in every version: they are digested once.

    Args:
        copy: the values, which are never filled again.
    """

    def __init__(self, copy: HostCopy) -> None:
        self._copy = copy

    @cached_property
    def _dense(self) -> Sequence[weight_pb2.TensorSlice]:
        pieces = self._copy.slices
        return [_describe(piece, self._copy.dtype, _all_of(piece)) for piece in pieces]

    def add_to(self, header: weight_pb2.PartHeader, payload: list[bytes | memoryview]) -> None:
        """Announce the slices, unchanged if there is a base, else with their values."""
        for piece, described in zip(self._copy.slices, self._dense, strict=True):
            announced = header.slices.add()
            announced.CopyFrom(described)
            if header.base_version:
                announced.encoding, announced.num_bytes = SPARSE_STEPS, 0
            else:
                payload.append(piece.values.data)


def make_part(
    header: weight_pb2.PartHeader,
    new: HostCopy,
    base: HostCopy | None,
    base_version: int,
    frozen: FrozenSlices,
) -> Part:
    """Encode and digest a part. Takes about a second for each 2 GB of bfloat16 that may change.

    Args:
        header: all of it but base and slices.
        new: the values that may change.
        base: those of the base version; None to send all values.
        base_version: version that `base` is of.
        frozen: the values that do not change.
    """
    full = weight_pb2.PartHeader()
    full.CopyFrom(header)
    full.base_version = base_version if base else 0
    payload: list[bytes | memoryview] = []
    frozen.add_to(full, payload)

    def encode_slice(index: int) -> tuple[weight_pb2.TensorSlice, Delta]:
        piece = new.slices[index]
        delta = (
            encode(new.dtype, base.slices[index].values, piece.values) if base else _all_of(piece)
        )
        return _describe(piece, new.dtype, delta), delta

    for described, delta in map_slices(encode_slice, range(len(new.slices))):
        full.slices.append(described)
        payload += delta.payload
    seal(full)
    return Part(header=full, payload=payload)


def _all_of(piece: HostSlice) -> Delta:
    return Delta(encoding=DENSE, values=piece.values)


def _describe(piece: HostSlice, dtype: str, delta: Delta) -> weight_pb2.TensorSlice:
    return describe_slice(piece.name, dtype, piece.shape, piece.start, piece.values, delta)
