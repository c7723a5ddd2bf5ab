"""Publishes the policy's weights: each rank sends the slices of its own shard, without a gather.

The store commits a version when all parts are there. If any rank's call ends without a commit, all
ranks send their parts again: a part that is missing would leave the others waiting.
"""

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Sequence

import grpc
import numpy as np
import torch
from torch import Tensor

from learner.trainer.calls import RETRY_SECONDS, refused
from learner.trainer.microbatches import TokenSequence, pad
from learner.trainer.model import Policy, frozen_logprobs
from learner.trainer.ranks import Ranks
from learner.trainer.shards import ShardSlice, shard_slices
from understudy.config import Config
from understudy.errors import PeerUnreachableError
from understudy.rpc import error_reason
from understudy.trajectory import IntArray
from understudy.v1 import weight_pb2, weight_pb2_grpc

CHUNK_BYTES = 2**20
PUBLISH_SECONDS = 600.0
"""Deadline of one publication; a store that lacks a part discards it then."""
PROBE_TOKENS, MAX_PROBE_TOKENS = 64, 512
"""Length of the random probe before there is any experience, and limit of a real one."""

_DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
_TRANSIENT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
_log = logging.getLogger(__name__)


class Publisher:
    """Sends one policy's weights to the store, version after version."""

    def __init__(
        self, policy: Policy, channel: grpc.Channel, epoch: int, config: Config, ranks: Ranks
    ) -> None:
        self._policy = policy
        self._stub = weight_pb2_grpc.WeightServiceStub(channel)
        self._epoch = epoch
        self._run_id = config.run.name
        self._patience = config.network.connect_timeout_seconds
        self._dtype_name, self._dtype = _DTYPES[config.model.dtype]
        self._ranks = ranks
        vocab_size = policy.language_model.config.vocab_size
        generator = np.random.default_rng(config.run.seed)
        # A replica reads the probe as a prompt, which has to be shorter than its context.
        self._max_probe = min(MAX_PROBE_TOKENS, config.inference.max_model_len - 1)
        num_tokens = min(PROBE_TOKENS, self._max_probe)
        self._probe_tokens: IntArray = generator.integers(vocab_size, size=num_tokens, dtype="i4")
        self._probe_is_real = False
        self.version = 0
        """Policy version of what was published last."""

    def probe_with(self, samples: Sequence[TokenSequence]) -> None:
        """Take the first sequence that was really played as the probe from now on."""
        if samples and not self._probe_is_real:
            self._probe_tokens = samples[0].token_ids[: self._max_probe]
            self._probe_is_real = True

    def publish(self, step: int) -> None:
        """Publish the weights after `step` optimizer steps; `version` is theirs then.

        Raises:
            PeerUnreachableError: when the store went away and stayed away.
            UnderstudyError: when it refuses.
        """
        slices = [
            (item, _to_bytes(item.values, self._dtype))
            for item in shard_slices(self._policy, self._ranks)
        ]
        header = self._header(step, slices)
        give_up = math.inf
        while True:
            version = self._send(header, [values for _, values in slices])
            [failed] = self._ranks.max([float(version == 0)])
            if not failed:
                self.version = version
                return
            give_up = min(give_up, time.monotonic() + self._patience)
            # The clock of one rank must not leave another in the collective: all ask alike.
            [late] = self._ranks.max([float(time.monotonic() >= give_up)])
            if late:
                raise PeerUnreachableError(f"step {step} was not published within the patience")
            time.sleep(RETRY_SECONDS)

    def _header(
        self, step: int, slices: Sequence[tuple[ShardSlice, memoryview]]
    ) -> weight_pb2.PartHeader:
        header = weight_pb2.PartHeader(
            run_id=self._run_id,
            epoch=self._epoch,
            step=step,
            part_index=self._ranks.rank,
            num_parts=self._ranks.world_size,
            slices=[
                weight_pb2.TensorSlice(
                    name=item.name,
                    dtype=self._dtype_name,
                    shape=item.shape,
                    start=item.start,
                    num_elements=item.values.numel(),
                    encoding=weight_pb2.TENSOR_ENCODING_DENSE,
                    num_bytes=len(values),
                    digest=hashlib.sha256(values).digest(),
                )
                for item, values in slices
            ],
        )
        logprobs = self._probe_logprobs()  # every rank takes part, the first one sends
        if self._ranks.rank == 0:
            header.probe.token_ids = self._probe_tokens.astype("<i4").tobytes()
            header.probe.logprobs = logprobs.cpu().numpy().astype("<f4").tobytes()
        return header

    def _probe_logprobs(self) -> Tensor:
        sequence = TokenSequence(
            token_ids=self._probe_tokens, loss_mask=np.arange(len(self._probe_tokens)) > 0
        )
        return frozen_logprobs(self._policy, pad([sequence], self._ranks.device))

    def _send(self, header: weight_pb2.PartHeader, payload: Sequence[memoryview]) -> int:
        """One attempt; the version, or 0 if it is worth another one."""
        try:
            response = self._stub.PublishWeights(
                _messages(header, payload), timeout=PUBLISH_SECONDS
            )
        except grpc.RpcError as error:
            # PART_CONFLICT: the store has not noticed yet that the last attempt broke.
            if error.code() not in _TRANSIENT and error_reason(error) != "PART_CONFLICT":
                raise refused(error) from None
            _log.warning("step %d is not published yet: %s", header.step, error.details())
            return 0
        return int(response.version)


def _to_bytes(values: Tensor, dtype: torch.dtype) -> memoryview:
    return values.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data


def _messages(
    header: weight_pb2.PartHeader, payload: Sequence[memoryview]
) -> Iterator[weight_pb2.PublishWeightsRequest]:
    """The header, then the payload in chunks of at most 1 MiB."""
    yield weight_pb2.PublishWeightsRequest(header=header)
    chunk = bytearray()
    for values in payload:
        for start in range(0, len(values), CHUNK_BYTES):
            piece = values[start : start + CHUNK_BYTES]
            if len(chunk) + len(piece) > CHUNK_BYTES:
                yield weight_pb2.PublishWeightsRequest(chunk=bytes(chunk))
                chunk.clear()
            chunk += piece
    if chunk:
        yield weight_pb2.PublishWeightsRequest(chunk=bytes(chunk))
