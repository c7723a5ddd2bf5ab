"""Follows the learner: every new version is fetched, checked, put into the engine and reported.

    WatchVersions -> newest -> fetch, check (staging) -> engine.load_weights -> probe -> report
                       ^         generation goes on             pause                      |
                       '-------------------------------------------------------------------'

Only `load_weights` stops generation. Versions announced meanwhile replace each other, so the next
round takes the newest. A version that is refused leaves the one before in place; the next try
fetches the whole copy again.
"""

import asyncio
import logging
import time

import grpc
import numpy as np

from inference.engine import Engine, WeightLoadError
from inference.fetch import Fetcher
from inference.manifest import Lineage, RefusedError, check_lineage, decode_probe
from inference.weights import Shadow
from understudy import metrics
from understudy.config import NetworkConfig
from understudy.errors import PeerUnreachableError
from understudy.trajectory import FloatArray, IntArray
from understudy.v1 import weight_pb2, weight_pb2_grpc

_log = logging.getLogger(__name__)
_MIN_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.2, 10.0
_STABLE_SECONDS = 5.0
_REPORT_TIMEOUT_SECONDS = 10.0
_MISMATCH_ALARM = 0.1
"""Mean |engine's - learner's| log-probability, in nats, above which something is wrong."""


class WeightSubscriber:
    """Keeps one engine on the newest version of one learner."""

    def __init__(
        self, channel: grpc.aio.Channel, engine: Engine, replica_id: str, network: NetworkConfig
    ) -> None:
        self._stub = weight_pb2_grpc.WeightServiceStub(channel)
        self._fetcher = Fetcher(self._stub)
        self._engine = engine
        self._replica_id = replica_id
        self._network = network
        self.ready = asyncio.Event()
        """Set once the first version is served."""
        self._announced = asyncio.Event()
        self._newest = weight_pb2.WatchVersionsResponse()
        self._announced_at = 0.0
        self._served: Shadow | None = None
        self._lineage = Lineage()

    @property
    def lineage(self) -> Lineage:
        """Run, epoch and version of what is served."""
        return self._lineage

    async def run(self) -> None:
        """Follow until cancelled.

        Raises:
            PeerUnreachableError: the learner stayed away before the first weights.
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
        """Consumes announcements; unblocks _apply_versions; outlives the learner's absences."""
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
                self._newest = announcement
                self._announced_at = time.monotonic()
                self._announced.set()
        except grpc.aio.AioRpcError as error:
            if not quiet:
                _log.warning(
                    "lost the learner at %s (%s); version %d goes on serving; reconnecting",
                    self._network.learner, error.code().name, self._lineage.version,
                )  # fmt: skip
        finally:
            call.cancel()

    def _give_up_without_weights(self, away_seconds: float) -> None:
        limit = self._network.connect_timeout_seconds
        if not self._lineage.version and away_seconds > limit:
            raise PeerUnreachableError(
                f"the learner at {self._network.learner} is away for {limit:.0f} s and there are "
                "no weights yet; start it, or raise network.connect_timeout_seconds"
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
        same_run = announcement.run_id == self._lineage.run_id
        return same_run and announcement.version == self._lineage.version

    async def _try_update(self) -> bool:
        """One try at the newest version; False when it was refused or the learner was away."""
        try:
            await self._update()
            return True
        except RefusedError as error:
            self._refuse(error.reason, error)
        except WeightLoadError as error:
            self._refuse("ENGINE", error)
        except grpc.aio.AioRpcError as error:
            _log.warning("could not fetch weights: %s %s", error.code().name, error.details())
        return False

    def _refuse(self, reason: str, error: Exception) -> None:
        metrics.WEIGHTS_REFUSED.labels(reason).inc()
        _log.error("refused weights: %s; version %d goes on", error, self._lineage.version)

    async def _update(self) -> None:
        announced_at = self._announced_at
        expected = self._served.layout if self._served else None
        manifest, staging = await self._fetcher.fetch(self._lineage, expected)
        try:
            probe = decode_probe(
                manifest.probe, self._engine.vocab_size, self._engine.max_model_len
            )
            pause_seconds = await self._engine.load_weights(staging, manifest.version)
        except (RefusedError, WeightLoadError):
            self._fetcher.give_back(staging)
            raise
        if self._served is not None:
            self._fetcher.give_back(self._served)
        self._served = staging
        self._lineage = check_lineage(manifest, self._lineage)
        report = weight_pb2.ReportReplicaRequest(
            replica_id=self._replica_id,
            version=manifest.version,
            pause_seconds=pause_seconds,
            apply_seconds=time.monotonic() - announced_at,
        )
        if probe is not None:
            await self._measure_mismatch(*probe, report)
        await self._report(report, manifest.step)

    async def _measure_mismatch(
        self, token_ids: IntArray, logprobs: FloatArray, report: weight_pb2.ReportReplicaRequest
    ) -> None:
        """Compare the engine with the learner; the health metric of the whole system."""
        difference = np.abs(await self._engine.prompt_logprobs(token_ids) - logprobs)
        report.mismatch_mean = float(difference.mean())
        report.mismatch_max = float(difference.max())
        metrics.LOGPROB_MISMATCH.labels("mean").set(report.mismatch_mean)
        metrics.LOGPROB_MISMATCH.labels("max").set(report.mismatch_max)
        if self._engine.computes and not report.mismatch_mean < _MISMATCH_ALARM:
            _log.error(
                "version %d: log-probabilities differ from the learner's by %.4f on average, %.4f "
                "at most; ratios are wrong: check that model.dtype agrees",
                report.version, report.mismatch_mean, report.mismatch_max,
            )  # fmt: skip

    async def _report(self, report: weight_pb2.ReportReplicaRequest, step: int) -> None:
        metrics.POLICY_VERSION.set(report.version)
        metrics.WEIGHT_APPLY_SECONDS.observe(report.apply_seconds)
        metrics.GENERATION_PAUSE_SECONDS.observe(report.pause_seconds)
        _log.info(
            "serving version %d (step %d): %.3f s after its announcement, paused %.3f s, "
            "mismatch %.5f",
            report.version, step, report.apply_seconds, report.pause_seconds, report.mismatch_mean,
        )  # fmt: skip
        try:
            await self._stub.ReportReplica(report, timeout=_REPORT_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            _log.warning("could not report version %d: %s", report.version, error.code().name)
