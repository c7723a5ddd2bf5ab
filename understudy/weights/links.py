"""The links that a node holds, and the chain of them that leads to a version in the fewest bytes.

full copy of 5 --> 6 --> 7 --> 8      to 8 from nothing: full copy of 5, then 6, 7, 8
                                      to 8 from 7: the last link alone
"""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from understudy.v1 import weight_pb2
from understudy.weights.errors import WeightsRefusedError

CHUNK_BYTES = 2**20
"""Most payload bytes of one message."""


class Payload(Protocol):
    """The bytes of a link, wherever they lie."""

    num_bytes: int

    async def read(self, offset: int, num_bytes: int) -> bytes:
        """So many bytes from an offset on. Raises WeightsRefusedError: UNKNOWN_VERSION if gone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Link:
    """What leads from one version to another, or from nothing to a version."""

    manifest: weight_pb2.WeightManifest
    payload: Payload

    @property
    def version(self) -> int:
        """Version that it leads to."""
        return self.manifest.version

    @property
    def base_version(self) -> int:
        """Version that it starts from; 0 for a full copy."""
        return self.manifest.base_version

    @property
    def num_bytes(self) -> int:
        """Bytes of the payload."""
        return self.payload.num_bytes


class MemoryPayload:
    """A payload in memory."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = memoryview(data)
        self.num_bytes = len(data)

    async def read(self, offset: int, num_bytes: int) -> bytes:
        """So many bytes from an offset on."""
        return bytes(self._data[offset : offset + num_bytes])


class LinkSet:
    """A full copy and the deltas round it.

    Kept are at most `max_deltas` deltas, and no more bytes of them than a full copy has: a longer
    chain would never be sent. Those between the full copy and the newest version stay in any case.
    """

    def __init__(self, max_deltas: int) -> None:
        self._max_deltas = max_deltas
        self._full: Link | None = None
        self._deltas: dict[int, Link] = {}
        """By the version that they lead to, ascending and without a gap."""

    @property
    def full(self) -> Link | None:
        """The full copy that is held."""
        return self._full

    @property
    def newest(self) -> Link | None:
        """The link that leads to the newest version."""
        delta = next(reversed(self._deltas.values()), None)
        if delta is None or (self._full is not None and self._full.version > delta.version):
            return self._full
        return delta

    @property
    def newest_version(self) -> int:
        """Newest version that is held; 0 for none."""
        newest = self.newest
        return newest.version if newest else 0

    @property
    def deltas(self) -> Sequence[Link]:
        """All deltas, oldest first."""
        return tuple(self._deltas.values())

    @property
    def chain_bytes(self) -> int:
        """Bytes of the deltas that lead from the full copy to the newest version."""
        full = self._full.version if self._full else 0
        return sum(link.num_bytes for link in self._deltas.values() if link.version > full)

    @property
    def chain_length(self) -> int:
        """Number of those deltas."""
        full = self._full.version if self._full else 0
        return sum(link.version > full for link in self._deltas.values())

    def add(self, link: Link) -> Sequence[Link]:
        """Take a link: a full copy, or a delta from the newest version. Returns what was let go."""
        if link.base_version:
            assert link.base_version == self.newest_version
            if self._deltas and link.base_version not in self._deltas:
                # The newest is a full copy that no delta leads to: older deltas lead nowhere.
                dropped = [*self._deltas.values()]
                self._deltas = {link.version: link}
                return dropped
            self._deltas[link.version] = link
            return self._trim()
        replaced = [self._full] if self._full else []
        self._full = link
        return [*replaced, *self._trim()]

    def _trim(self) -> list[Link]:
        """Let go of the oldest deltas that are too many or too large."""
        full = self._full.version if self._full else 0
        limit = self._full.num_bytes if self._full else 0
        total = sum(link.num_bytes for link in self._deltas.values())
        dropped = []
        for version, link in list(self._deltas.items()):
            needed = version > full
            if needed or (len(self._deltas) <= self._max_deltas and total <= limit):
                break
            dropped.append(self._deltas.pop(version))
            total -= link.num_bytes
        return dropped

    def plan(self, base: int, target: int = 0) -> Sequence[Link]:
        """The links from a base to a target in the fewest bytes.

        Args:
            base: version that is held by whoever asks; 0 for none.
            target: version that is wanted; 0 for the newest.

        Raises:
            WeightsRefusedError: UNKNOWN_VERSION if nothing held leads there.
        """
        target = target or self.newest_version
        if target and base == target:
            return ()
        chains = [self._deltas_between(base, target)] if base else []
        if self._full and self._full.version <= target:
            rest = self._deltas_between(self._full.version, target)
            chains.append(None if rest is None else [self._full, *rest])
        found = [chain for chain in chains if chain is not None]
        if not target or not found:
            raise WeightsRefusedError(
                "UNKNOWN_VERSION",
                f"nothing leads from version {base} to {target}; {self.newest_version} is newest, "
                "ask for 0",
            )
        return min(found, key=lambda chain: sum(link.num_bytes for link in chain))

    def _deltas_between(self, base: int, target: int) -> list[Link] | None:
        """The chain of deltas; None if it is not whole."""
        chain: list[Link] = []
        while target > base:
            link = self._deltas.get(target)
            if link is None:
                return None
            chain.append(link)
            target = link.base_version
        return chain[::-1] if target == base else None

    def resume(self, base: int, version: int, target: int, offset: int) -> Sequence[Link]:
        """The link in which a transfer broke, and the rest of the chain.

        Raises:
            WeightsRefusedError: UNKNOWN_VERSION, BAD_REQUEST.
        """
        link = self._deltas.get(version) if base else self._full
        if link is None or (link.base_version, link.version) != (base, version):
            raise WeightsRefusedError(
                "UNKNOWN_VERSION", f"the link from {base} to {version} is not held any more"
            )
        if offset > link.num_bytes:
            raise WeightsRefusedError("BAD_REQUEST", f"offset {offset} of {link.num_bytes} bytes")
        rest = self._deltas_between(version, max(target or self.newest_version, version))
        if rest is None:
            raise WeightsRefusedError("UNKNOWN_VERSION", f"no deltas lead on from {version}")
        return [link, *rest]


async def fetch_responses(
    held: LinkSet, request: weight_pb2.FetchWeightsRequest, sent: Callable[[Link, int], None]
) -> AsyncIterator[weight_pb2.FetchWeightsResponse]:
    """Answer FetchWeights.

    Args:
        held: what is held; may change meanwhile.
        request: what is asked for.
        sent: told of a link and payload bytes that went out.

    Raises:
        WeightsRefusedError: UNKNOWN_VERSION, BAD_REQUEST.
    """
    base, target, offset = request.base_version, request.target_version, request.offset
    if request.resume_version:
        chain = held.resume(base, request.resume_version, target, offset)
    elif offset:
        raise WeightsRefusedError("BAD_REQUEST", f"offset {offset} without a resume_version")
    else:
        chain = held.plan(base, target)
    for link in chain:
        yield weight_pb2.FetchWeightsResponse(manifest=link.manifest)
        while offset < link.num_bytes:
            chunk = await link.payload.read(offset, CHUNK_BYTES)
            offset += len(chunk)
            sent(link, len(chunk))
            yield weight_pb2.FetchWeightsResponse(chunk=chunk)
        offset = 0
