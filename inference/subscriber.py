"""Follows a weight store: each new version is fetched, checked, put into the engine and reported.

    WatchVersions -> newest -> fetch, apply, check -> engine.load_weights -> probe -> report
                       ^         generation goes on             pause                   |
                       '----------------------------------------------------------------'

Only `load_weights` stops generation. Versions announced meanwhile replace each other, so the next
round takes the newest. A version that is refused leaves the one before in place; the next try asks
for a full copy. What is checked is on the shelf for others, whether the engine takes it or not.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

import grpc

from inference.engine import Engine, WeightLoadError
from inference.fetch import Fetcher, HeldVersion
from inference.probe import decode_probe
from inference.reporter import Reporter
from inference.shelf import Shelf
from inference.weights import Shadow
from understudy import failpoints, metrics
from understudy.errors import PeerUnreachableError
from understudy.trajectory import FloatArray, IntArray
from understudy.v1 import weight_pb2, weight_pb2_grpc
from understudy.weights.errors import WeightsRefusedError

_log = logging.getLogger(__name__)
_MIN_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.2, 10.0
_STABLE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """Where versions come from, and who is told what became of them."""

    channel: grpc.aio.Channel
    """To the weight store, or to a node that passes on what it holds."""
    learner: grpc.aio.Channel
    """To the intake."""
    address: str
    """Of the former, for messages."""
    patience_seconds: float
    """How long it may be away while there are no weights yet."""


class WeightSubscriber:
    """Keeps one engine on the newest version of one weight store."""

    def __init__(
        self, upstream: Upstream, engine: Engine, replica_id: str, shelf: Shelf | None = None
    ) -> None:
        self._stub = weight_pb2_grpc.WeightServiceStub(upstream.channel)
        self._reporter = Reporter(engine, upstream.learner, replica_id)
        self._fetcher = Fetcher(self._stub)
        self._shelf = shelf or Shelf()
        self._engine = engine
        self._replica_id = replica_id
        self._upstream = upstream
        self.ready = asyncio.Event()
        """Set once the first version is served."""
        self._announced = asyncio.Event()
        self._newest = weight_pb2.WatchVersionsResponse()
        self._announced_at = 0.0
        self._served: Shadow | None = None

    async def run(self) -> None:
        """Follow until cancelled.

        Raises:
            PeerUnreachableError: the store stayed away before the first weights.
            EngineError: the engine broke.
        """
        loops = [asyncio.create_task(self._watch()), asyncio.create_task(self._apply_versions())]
        try:
            await asyncio.gather(*loops)
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)

    async def _watch(self) -> None:
        """Consumes announcements; unblocks _apply_versions; outlives the store's absences."""
        away_since = 0.0
        while True:
            started = time.monotonic()
            await self._read_announcements(quiet=bool(away_since))
            lost = time.monotonic()
            if not away_since or lost - started > _STABLE_SECONDS:
                away_since = lost
            self._give_up_without_weights(lost - away_since)
            await asyncio.sleep(min(0.2 + (lost - away_since) / 4, _MAX_BACKOFF_SECONDS))

    async def _read_announcements(self, quiet: bool) -> None:
        """Pass announcements on until the stream ends."""
        request = weight_pb2.WatchVersionsRequest(replica_id=self._replica_id)
        call = self._stub.WatchVersions(request)
        try:
            async for announcement in call:
                if announcement is None:  # grpc's word for bytes that are no message
                    break
                self._newest = announcement
                self._announced_at = time.monotonic()
                self._announced.set()
        except grpc.aio.AioRpcError as error:
            if not quiet:
                _log.warning(
                    "lost the weights at %s (%s); version %d goes on serving; reconnecting",
                    self._upstream.address, error.code().name, self._engine.version,
                )  # fmt: skip
        finally:
            call.cancel()

    def _give_up_without_weights(self, away_seconds: float) -> None:
        limit = self._upstream.patience_seconds
        if not self._engine.version and away_seconds > limit:
            raise PeerUnreachableError(
                f"the weight store at {self._upstream.address} is away for {limit:.0f} s and there "
                "are no weights yet; start it, or raise network.connect_timeout_seconds"
            )

    async def _apply_versions(self) -> None:
        """Waits for an announcement; applies the newest; tries a refused one again, slower."""
        backoff = _MIN_BACKOFF_SECONDS
        while True:
            await self._announced.wait()
            self._announced.clear()
            if self._is_served(self._newest):
                continue
            if await self._try_update():
                backoff = _MIN_BACKOFF_SECONDS
                self.ready.set()
                continue
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)
            self._announced.set()

    def _is_served(self, announcement: weight_pb2.WatchVersionsResponse) -> bool:
        same_run = announcement.run_id == self._fetcher.lineage.run_id
        return same_run and announcement.version == self._engine.version

    async def _try_update(self) -> bool:
        """One try at the newest version; False when it was refused or the store was away."""
        try:
            await self._update()
            return True
        except WeightsRefusedError as error:
            self._refuse(error.reason, error)
        except WeightLoadError as error:
            self._refuse("ENGINE", error)
        except grpc.aio.AioRpcError as error:
            _log.warning("could not fetch weights: %s %s", error.code().name, error.details())
        return False

    def _refuse(self, reason: str, error: Exception) -> None:
        metrics.WEIGHTS_REFUSED.labels(reason).inc()
        _log.error("refused weights: %s; version %d goes on", error, self._engine.version)

    async def _update(self) -> None:
        announced, announced_at = self._newest, self._announced_at
        lineage = self._fetcher.lineage
        lineage.check_run(announced.run_id)
        if announced.version > lineage.version:
            await self._fetch()
        elif announced.version < lineage.version:
            raise WeightsRefusedError(
                "OLD_VERSION", f"version {announced.version} is not above {lineage.version}"
            )
        held = self._fetcher.held
        if held is not None and held.version != self._engine.version:
            await self._serve(held, announced_at)
        if self._engine.version < announced.version:
            raise WeightsRefusedError(
                "BAD_PAYLOAD", f"the transfer ended before version {announced.version}"
            )

    async def _fetch(self) -> None:
        """Get the newest version; on the shelf it goes once there is nothing to say against it."""
        version = await self._fetcher.fetch(self._served)
        if version is None:
            return
        self._decode_probe(version)
        self._fetcher.hold(version)
        self._shelf.put(version)

    def _decode_probe(self, version: HeldVersion) -> tuple[IntArray, FloatArray] | None:
        probe = version.weights.manifest.probe
        return decode_probe(probe, self._engine.vocab_size, self._engine.max_model_len)

    async def _serve(self, held: HeldVersion, announced_at: float) -> None:
        """Put what is held into the engine, compare, and report."""
        failpoints.hit("inference.after_verify")
        pause_seconds = await self._engine.load_weights(held.shadow, held.version)
        self._served = held.shadow
        await self._reporter.report(
            version=held.version,
            step=held.weights.manifest.step,
            probe=self._decode_probe(held),
            pause_seconds=pause_seconds,
            apply_seconds=time.monotonic() - announced_at,
        )
