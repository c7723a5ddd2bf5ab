"""The values of the newest version, to which deltas apply."""

from collections.abc import Iterable, Iterator

from understudy.v1 import weight_pb2
from understudy.weights import encoding
from understudy.weights.layout import ByteArray, HostBuffer, Layout, TensorEntry
from understudy.weights.manifest import check_slice_values, full_manifest, slice_bytes

SliceKey = tuple[str, int, int]
"""A slice's name, first element and number of elements."""


class Head:
    """One version in memory, and what its manifest said.

    Raises:
        MemoryError, ValueError: no memory for so much.
    """

    def __init__(self, layout: Layout) -> None:
        self.buffer = HostBuffer(layout)
        self.manifest = weight_pb2.WeightManifest()
        self.tensors: dict[str, TensorEntry] = {entry.name: entry for entry in layout}
        self._digests: dict[SliceKey, bytes] = {}

    @property
    def version(self) -> int:
        """The version; 0 before the first link."""
        return self.manifest.version

    @property
    def layout(self) -> Layout:
        """All tensors."""
        return self.buffer.layout

    def holds(self, piece: weight_pb2.TensorSlice) -> bool:
        """Whether a slice's new values are those of this version."""
        return self._digests.get(_key(piece)) == piece.digest

    def check(self, piece: weight_pb2.TensorSlice, body: ByteArray) -> None:
        """Check that a slice's bytes turn this version's values into those of its digest.

        Raises:
            WeightsRefusedError: BAD_PAYLOAD, NON_FINITE, BAD_DIGEST.
        """
        if piece.encoding == encoding.DENSE:
            check_slice_values(piece, body, finite=True)
        elif piece.num_changed:
            values = slice_bytes(piece, self.buffer).copy()
            encoding.apply(piece, body, values)
            check_slice_values(piece, values, finite=False)
        elif not self.holds(piece):
            check_slice_values(piece, slice_bytes(piece, self.buffer), finite=False)

    def apply(self, manifest: weight_pb2.WeightManifest, bodies: Iterable[ByteArray]) -> None:
        """Become the version that a link leads to.

        Args:
            manifest: the link's; its slices fit the layout.
            bodies: the bytes of each slice, in order.

        Raises:
            WeightsRefusedError: BAD_PAYLOAD, NON_FINITE; the values are undefined then.
        """
        for piece, body in zip(manifest.slices, bodies, strict=True):
            encoding.apply(piece, body, slice_bytes(piece, self.buffer))
        self.manifest = manifest
        self._digests = {_key(piece): piece.digest for piece in manifest.slices}

    def full_copy(self) -> tuple[weight_pb2.WeightManifest, Iterator[memoryview]]:
        """This version as a full copy, in the same slices: manifest and payload."""
        manifest = full_manifest(self.manifest)
        return manifest, (slice_bytes(piece, self.buffer).data for piece in manifest.slices)


def _key(piece: weight_pb2.TensorSlice) -> SliceKey:
    return piece.name, piece.start, piece.num_elements
