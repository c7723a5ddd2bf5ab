"""Getting versions from a weight store into shadows, verified, while others are served."""

import asyncio
import dataclasses
from collections.abc import Collection
from functools import partial

from blake3 import blake3

from inference.weights import Shadow, ShadowPool
from understudy.v1 import weight_pb2, weight_pb2_grpc
from understudy.weights.adapter import is_adapter
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import Layout
from understudy.weights.lineage import Lineage
from understudy.weights.transfer import Fetch, HeldWeights, copy_values, fetch_weights


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HeldVersion:
    """A verified version in a shadow."""

    weights: HeldWeights
    shadow: Shadow

    @property
    def version(self) -> int:
        """Its number."""
        return self.weights.manifest.version


class Fetcher:
    """Follows one weight store by deltas, from one shadow to the next.

    After a chain that was refused it asks for a full copy: whatever was wrong, with the chain or
    with what it was applied to, is not part of that.
    """

    def __init__(self, stub: "weight_pb2_grpc.WeightServiceAsyncStub") -> None:
        self._stub = stub
        self._shadows = ShadowPool()
        self._asks_for_all = False
        self.held: HeldVersion | None = None
        """Newest version that is verified, whether it is served yet or not."""

    @property
    def lineage(self) -> Lineage:
        """That of what is held."""
        return self.held.weights.lineage if self.held else Lineage()

    async def fetch(self, served: Shadow | None) -> HeldVersion | None:
        """Fetch the newest version into a shadow of its own; None if nothing is newer.

        Args:
            served: what the engine has, and is healed from.

        Raises:
            WeightsRefusedError: with the reason; what is held and served was not touched.
            grpc.aio.AioRpcError: the store is away, or broke the transfer too often.
        """
        fetch = Fetch(
            current=self.held.weights if self.held else None,
            whole=self._asks_for_all,
            keep_deltas=True,
        )
        needed = {shadow for shadow in (served, self.held and self.held.shadow) if shadow}
        try:
            weights = await fetch_weights(self._stub, fetch, partial(self._prepare, needed))
        except WeightsRefusedError:
            self._asks_for_all = True
            raise
        self._asks_for_all = False
        if weights is None:
            return None
        assert isinstance(weights.buffer, Shadow)
        return HeldVersion(weights=weights, shadow=weights.buffer)

    async def _prepare(
        self, needed: Collection[Shadow], layout: Layout, base: HeldWeights | None
    ) -> Shadow:
        shadow = self._shadows.take(layout, needed)
        if base is not None:
            await asyncio.to_thread(copy_values, base.buffer, shadow)
        return shadow

    def hold(self, version: HeldVersion) -> None:
        """What was fetched is good, and what comes next follows it."""
        version.shadow.version = version.version
        version.shadow.base_digest = _digest_base(version.weights.manifest)
        weights = dataclasses.replace(version.weights, deltas=())
        self.held = dataclasses.replace(version, weights=weights)


def _digest_base(manifest: weight_pb2.WeightManifest) -> bytes:
    """Of all values that are no adapter's, by the digests of their slices."""
    digest = blake3()
    for piece in sorted(manifest.slices, key=lambda piece: (piece.name, piece.start)):
        if not is_adapter(piece.name):
            digest.update(f"{piece.name}\0{piece.start}\0".encode() + piece.digest)
    return digest.digest()
