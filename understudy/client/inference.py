"""Client of InferenceService: token ids in, token ids out."""

from dataclasses import dataclass

import numpy as np

from understudy.client.base import Client
from understudy.config import NetworkConfig
from understudy.trajectory import FloatArray, IntArray, VersionSpan
from understudy.v1 import common_pb2, inference_pb2, inference_pb2_grpc


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
        timeout: float = 600.0,
    ) -> Generation:
        """Sample one reply.

        Args:
            prompt_token_ids: [P] int32, at least one.
            sampling: temperature, max_new_tokens, stop tokens.
            prefix_key: calls with one key share a prefix.
            min_version: lowest policy version that may answer.
            timeout: deadline in seconds.

        Raises:
            grpc.aio.AioRpcError: with the codes that the rpc's comment lists.
        """
        response = await self._stub.Generate(
            inference_pb2.GenerateRequest(
                prompt_token_ids=prompt_token_ids.astype("<i4", copy=False).tobytes(),
                sampling=sampling,
                prefix_key=prefix_key,
                min_version=min_version,
            ),
            timeout=timeout,
        )
        return Generation(
            token_ids=np.frombuffer(response.token_ids, "<i4"),
            logprobs=np.frombuffer(response.logprobs, "<f4"),
            version_spans=tuple(
                VersionSpan(version=span.version, start=span.start, end=span.end)
                for span in response.version_spans
            ),
            cut_off=response.finish_reason == inference_pb2.FINISH_REASON_LENGTH,
        )

    async def describe(self) -> inference_pb2.DescribeModelResponse:
        """Engine, bundle digest, policy version and limits."""
        return await self._stub.DescribeModel(inference_pb2.DescribeModelRequest(), timeout=10)
