"""Which inference replica answers: affinity by rendezvous hashing, retries elsewhere."""

import asyncio
import hashlib
import logging
import time

import grpc

from actor.policy import InferenceFailedError
from understudy import metrics
from understudy.client import BadReplyError, Generation, InferenceClient, wait_any_ready
from understudy.config import NetworkConfig
from understudy.errors import PeerUnreachableError
from understudy.rpc import error_reason, retry_after_seconds
from understudy.trajectory import IntArray
from understudy.v1 import common_pb2

_log = logging.getLogger(__name__)
_BACKOFF_SECONDS = 0.2


class InferencePool:
    """All inference replicas of a run.

    An episode's calls go to one replica, so that its prefix stays cached there. A call that the
    replica refuses for now is tried on the next in the episode's order, from the same prompt.

    Args:
        network: it names the replicas.
        timeout_seconds: longest that a reply may take, over all tries.
        with_routes: whether to ask for routes, `model.router_replay`.
    """

    def __init__(
        self, network: NetworkConfig, timeout_seconds: float, *, with_routes: bool = False
    ) -> None:
        self._replicas = {
            address: InferenceClient(address, network) for address in network.inference
        }
        self._timeout = timeout_seconds
        self._with_routes = with_routes

    async def wait_ready(self) -> None:
        """Wait until a replica answers. Raises PeerUnreachableError if none does."""
        await wait_any_ready(list(self._replicas.values()))

    async def newest_version(self) -> int:
        """Highest policy version that a replica says it serves.

        Raises:
            PeerUnreachableError: none of them has weights.
        """
        calls = [replica.describe() for replica in self._replicas.values()]
        told = await asyncio.gather(*calls, return_exceptions=True)
        versions = [answer.version for answer in told if not isinstance(answer, BaseException)]
        if not versions:
            raise PeerUnreachableError(
                f"no inference server at {', '.join(self._replicas)} says what it serves: {told[0]}"
            )
        return max(versions)

    async def generate(
        self,
        prompt: IntArray,
        sampling: common_pb2.SamplingParameters,
        prefix_key: str,
        min_version: int = 0,
        *,
        routes_from: int = 0,
    ) -> Generation:
        """Sample one reply within the configured time.

        Args:
            prompt: [P] tokens.
            sampling: temperature, max_new_tokens, stop tokens.
            prefix_key: calls with one key share a prefix.
            min_version: lowest policy version that may answer.
            routes_from: first token whose routes are wanted, where routes are asked for.

        Raises:
            InferenceFailedError: every try was refused, or an error that no retry mends.
        """
        deadline = time.monotonic() + self._timeout
        order = self._order(prefix_key)
        attempt = 0
        while True:
            replica = order[attempt % len(order)]
            try:
                return await replica.generate(
                    prompt,
                    sampling,
                    prefix_key=prefix_key,
                    min_version=min_version,
                    routes_from=routes_from if self._with_routes else None,
                    timeout=max(deadline - time.monotonic(), 0.001),
                )
            except BadReplyError as error:
                raise InferenceFailedError(str(error)) from None
            except grpc.aio.AioRpcError as error:
                attempt += 1
                await self._back_off(error, attempt, len(order), deadline)

    def _order(self, key: str) -> list[InferenceClient]:
        if len(self._replicas) == 1:
            return list(self._replicas.values())
        ranked = sorted(
            self._replicas, key=lambda a: hashlib.blake2b(f"{key}|{a}".encode()).digest()
        )
        return [self._replicas[address] for address in ranked]

    async def _back_off(
        self, error: grpc.aio.AioRpcError, attempt: int, num_replicas: int, deadline: float
    ) -> None:
        hint = retry_after_seconds(error)
        reason = error_reason(error)
        if error.code() != grpc.StatusCode.UNAVAILABLE and hint is None:
            raise InferenceFailedError(f"{reason}: {error.details()}") from None
        metrics.GENERATE_RETRIES.labels(reason).inc()
        wait = 0.0 if attempt % num_replicas else hint or _BACKOFF_SECONDS
        if time.monotonic() + wait >= deadline:
            raise InferenceFailedError(
                f"no replica answered within {self._timeout:g} s, last: {reason}"
            ) from None
        await asyncio.sleep(wait)

    async def close(self) -> None:
        """Close all channels."""
        for replica in self._replicas.values():
            await replica.close()
