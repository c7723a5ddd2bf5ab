"""Client of InferenceService: token ids in, token ids out."""

from dataclasses import dataclass

import numpy as np

from understudy.client.base import Client
from understudy.config import NetworkConfig
from understudy.errors import UnderstudyError
from understudy.routes import RouteArray, decode_routes
from understudy.trajectory import FloatArray, IntArray, VersionSpan
from understudy.v1 import common_pb2, inference_pb2, inference_pb2_grpc


class BadReplyError(UnderstudyError):
    """A replica answered what it may not."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One reply of G tokens."""

    token_ids: IntArray
    """[G] sampled tokens; the last is the stop token unless the reply was cut off."""
    logprobs: FloatArray
    """[G] log-probabilities under the distribution that was sampled from."""
    version_spans: tuple[VersionSpan, ...]
    """Policy versions over the G tokens."""
    cut_off: bool
    """The reply ended at a token limit, not at a stop token."""
    routes: RouteArray | None = None
    """[R, L, K] experts of the tokens from the place that was asked for to the one before the last
    sampled one; None if none were asked for."""


class InferenceClient(Client):
    """Calls one inference replica."""

    peer = "inference server"

    def __init__(self, address: str, network: NetworkConfig) -> None:
        super().__init__(address, network)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self.channel)

    async def generate(
        self,
        prompt_token_ids: IntArray,
        sampling: common_pb2.SamplingParameters,
        *,
        prefix_key: str = "",
        min_version: int = 0,
        routes_from: int | None = None,
        timeout: float = 600.0,
    ) -> Generation:
        """Sample one reply.

        Args:
            prompt_token_ids: [P] int32, at least one.
            sampling: temperature, max_new_tokens, stop tokens.
            prefix_key: calls with one key share a prefix.
            min_version: lowest policy version that may answer.
            routes_from: first token of the prompt whose routes are wanted; None wants none.
            timeout: deadline in seconds.

        Raises:
            grpc.aio.AioRpcError: with the codes that the rpc's comment lists.
            BadReplyError: the routes are not those of the tokens.
        """
        response = await self._stub.Generate(
            inference_pb2.GenerateRequest(
                prompt_token_ids=prompt_token_ids.astype("<i4", copy=False).tobytes(),
                sampling=sampling,
                prefix_key=prefix_key,
                min_version=min_version,
                routes_from=routes_from,
            ),
            timeout=timeout,
        )
        routes = None
        if routes_from is not None:
            num_tokens = len(prompt_token_ids) + len(response.token_ids) // 4 - 1
            routes = self._routes(response, num_tokens - routes_from)
        return Generation(
            token_ids=np.frombuffer(response.token_ids, "<i4"),
            logprobs=np.frombuffer(response.logprobs, "<f4"),
            version_spans=tuple(
                VersionSpan(version=span.version, start=span.start, end=span.end)
                for span in response.version_spans
            ),
            cut_off=response.finish_reason == inference_pb2.FINISH_REASON_LENGTH,
            routes=routes,
        )

    def _routes(self, response: inference_pb2.GenerateResponse, num_tokens: int) -> RouteArray:
        try:
            return decode_routes(response.routes, num_tokens)
        except ValueError as error:
            raise BadReplyError(f"{self.peer} {self.address}: routes: {error}") from None

    async def describe(self) -> inference_pb2.DescribeModelResponse:
        """Engine, bundle digest, policy version and limits."""
        return await self._stub.DescribeModel(inference_pb2.DescribeModelRequest(), timeout=10)
