"""The file of one link: a full copy of a version, or what leads to it from the one before.

    "USWEIGHT" | manifest's length (8 bytes, little-endian) | WeightManifest | its BLAKE3 | payload

The payload needs no digest of its own: the manifest has one of every slice's new values.
"""

import asyncio
import os
import struct
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from blake3 import blake3

from understudy.errors import UnderstudyError
from understudy.files import write_durably
from understudy.v1 import weight_pb2
from understudy.weights.encoding import DIGEST_BYTES
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import ByteArray
from understudy.weights.links import Link

SUFFIX = ".weights"
_MAGIC = b"USWEIGHT"
_HEAD = struct.Struct("<8sQ")


class DamagedLinkError(UnderstudyError):
    """A file that is not a link, or not any more."""


class FilePayload:
    """A link's payload, on disk. The file stays readable under this object when its name is gone.

    Args:
        descriptor: of the file, open for reading; closed with this object.
        start: the payload's first byte in it.
        num_bytes: its length.
    """

    def __init__(self, descriptor: int, start: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._descriptor = descriptor
        self._start = start
        weakref.finalize(self, os.close, descriptor)

    async def read(self, offset: int, num_bytes: int) -> bytes:
        """So many bytes from an offset on, or up to the end.

        Raises:
            WeightsRefusedError: STORE_FAILED if the disk does not give them.
        """
        num_bytes = min(num_bytes, self.num_bytes - offset)
        return (await asyncio.to_thread(self.values, offset, num_bytes)).tobytes()

    def values(self, offset: int, num_bytes: int) -> ByteArray:
        """As read, on this thread: [num_bytes]."""
        result = np.empty(num_bytes, np.uint8)
        view, position = result.data, self._start + offset
        while view:
            try:
                num_read = os.preadv(self._descriptor, [view], position)
            except OSError as error:
                raise WeightsRefusedError("STORE_FAILED", f"reading weights: {error}") from None
            if not num_read:
                raise WeightsRefusedError("STORE_FAILED", "a file of weights became shorter")
            view, position = view[num_read:], position + num_read
        return result


def link_path(folder: Path, manifest: weight_pb2.WeightManifest) -> Path:
    """The file of a link."""
    kind = "delta" if manifest.base_version else "full"
    return folder / f"{kind}-{manifest.version:08d}{SUFFIX}"


def write_link(
    folder: Path, manifest: weight_pb2.WeightManifest, payload: Iterable[memoryview]
) -> Link:
    """Write a link's durable file.

    Raises:
        OSError: with the file's name; there is no such link then.
    """
    path = link_path(folder, manifest)
    encoded = manifest.SerializeToString()
    head = (_HEAD.pack(_MAGIC, len(encoded)), encoded, blake3(encoded).digest())
    try:
        write_durably(path, (*head, *payload))
        payload_file = _open(path, sum(map(len, head)), manifest.payload_bytes)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return Link(manifest=manifest, payload=payload_file)


def _open(path: Path, start: int, num_bytes: int) -> FilePayload:
    return FilePayload(os.open(path, os.O_RDONLY), start, num_bytes)


def read_link(path: Path) -> Link:
    """Read a link's manifest; its payload is not looked at.

    Raises:
        DamagedLinkError: the file is not what was written under this name.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
        magic, length = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0)
        num_bytes = path.stat().st_size
        if magic != _MAGIC or length > num_bytes:
            raise DamagedLinkError(f"{path}: not a file of weights")
        encoded, digest = file.read(length), file.read(DIGEST_BYTES)
    if blake3(encoded).digest() != digest:
        raise DamagedLinkError(f"{path}: its manifest is damaged (its BLAKE3 differs)")
    manifest = weight_pb2.WeightManifest.FromString(encoded)
    start = _HEAD.size + length + DIGEST_BYTES
    if link_path(path.parent, manifest) != path or num_bytes != start + manifest.payload_bytes:
        raise DamagedLinkError(
            f"{path}: {num_bytes} bytes of version {manifest.version}, where {start} and a payload "
            f"of {manifest.payload_bytes} belong"
        )
    return Link(manifest=manifest, payload=_open(path, start, manifest.payload_bytes))


def slice_bodies(link: Link) -> Iterator[ByteArray]:
    """The bytes of each slice of a link on disk, in order.

    Raises:
        WeightsRefusedError: STORE_FAILED.
    """
    assert isinstance(link.payload, FilePayload)
    offset = 0
    for piece in link.manifest.slices:
        yield link.payload.values(offset, piece.num_bytes)
        offset += piece.num_bytes
