"""How a store in a process of its own speaks to the intake."""

import asyncio
import logging
import time

import grpc

from learner.weights.refusals import CODES
from learner.weights.store import WeightStore
from understudy.config import Config
from understudy.errors import ConfigError
from understudy.rpc import error_reason, open_channel
from understudy.v1 import weight_pb2, weight_pb2_grpc
from understudy.weights.errors import WeightsRefusedError

ATTACH_SECONDS = 5.0
"""How often the intake is told what the store holds."""
_ISSUE_TIMEOUT, _ATTACH_TIMEOUT = 30.0, 10.0
_RETRY_SECONDS = 0.5
_TRANSIENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_log = logging.getLogger(__name__)


class IntakeLink:
    """Asks for numbers, and tells what is held."""

    def __init__(self, config: Config) -> None:
        self._run_id = config.run.name
        self._patience = config.network.connect_timeout_seconds
        self._channel = open_channel(config.network.learner, config.network)
        self._stub = weight_pb2_grpc.VersionServiceStub(self._channel)
        self._speaking = asyncio.Lock()
        """One call at a time: an older word of what is held must not come after a number."""

    async def issue(self, request: weight_pb2.IssueVersionRequest) -> int:
        """The next number. An intake that is away is waited for.

        Raises:
            WeightsRefusedError: OLD_EPOCH, RUN_MISMATCH; STORE_FAILED if the intake stays away.
        """
        give_up = time.monotonic() + self._patience
        while True:
            try:
                async with self._speaking:
                    response = await self._stub.IssueVersion(request, timeout=_ISSUE_TIMEOUT)
                return response.version
            except grpc.aio.AioRpcError as error:
                reason, detail = error_reason(error), error.details() or ""
                if error.code() not in _TRANSIENT:
                    known = reason in CODES
                    raise WeightsRefusedError(reason if known else "STORE_FAILED", detail) from None
                if time.monotonic() > give_up:
                    raise WeightsRefusedError(
                        "STORE_FAILED", f"the intake issues no version: {detail}"
                    ) from None
            await asyncio.sleep(_RETRY_SECONDS)

    async def keep_attached(self, store: WeightStore) -> None:
        """Tell the intake every few seconds what the store holds, until cancelled.

        During a commit nothing is said: a store that is about to hold its first version would have
        the trainer publish it again.

        Raises:
            ConfigError: the intake serves another run.
        """
        while True:
            async with self._speaking:
                if not store.committing:
                    await self._attach(store.version_to_attach)
            await asyncio.sleep(ATTACH_SECONDS)

    async def _attach(self, newest_version: int) -> None:
        request = weight_pb2.AttachStoreRequest(run_id=self._run_id, newest_version=newest_version)
        try:
            await self._stub.AttachStore(request, timeout=_ATTACH_TIMEOUT, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            if error_reason(error) == "RUN_MISMATCH":
                raise ConfigError(f"run.name: {error.details()}") from None
            _log.warning("the intake does not answer: %s", error.details())

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()
