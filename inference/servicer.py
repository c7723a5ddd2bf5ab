"""InferenceService: decodes, calls, encodes."""

import itertools
import math
import time

import grpc
import numpy as np

from inference.engine import Engine, EngineError, Generation, GenerationRequest
from understudy import metrics
from understudy.config import InferenceConfig
from understudy.routes import encode_routes
from understudy.rpc import RoleControl, ServiceError
from understudy.trajectory import IntArray
from understudy.v1 import common_pb2, inference_pb2, inference_pb2_grpc

MAX_TEMPERATURE = 10.0
MAX_STOP_TOKENS = 16
MAX_PREFIX_KEY_BYTES = 64
_RETRY_SECONDS = 0.5
_FINISH = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves one engine; admits calls by the tokens that they may come to hold."""

    def __init__(self, engine: Engine, config: InferenceConfig, control: RoleControl) -> None:
        self.engine = engine
        self.config = config
        self.control = control
        self.bundle_digest = ""
        self.num_requests = 0
        self.num_tokens = 0
        self._ids = itertools.count()

    def figures(self) -> dict[str, float]:
        """What GetStatus shows."""
        return {
            "requests": self.num_requests,
            "admitted_tokens": self.num_tokens,
            "version": self.engine.version,
        }

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: object
    ) -> inference_pb2.GenerateResponse:
        try:
            self._admit(request.min_version)
            decoded = decode_request(request, str(next(self._ids)), self.engine)
            tokens = len(decoded.prompt_token_ids) + decoded.max_new_tokens
            self._admit_tokens(tokens)
        except ServiceError as error:
            metrics.REQUESTS_REFUSED.labels(error.reason).inc()
            raise
        self._account(1, tokens)
        try:
            return encode_generation(await self._generate(decoded))
        finally:
            self._account(-1, -tokens)

    async def DescribeModel(
        self, request: inference_pb2.DescribeModelRequest, context: object
    ) -> inference_pb2.DescribeModelResponse:
        self._require_weights()
        return inference_pb2.DescribeModelResponse(
            engine=self.engine.name,
            bundle_digest=self.bundle_digest,
            version=self.engine.version,
            vocab_size=self.engine.vocab_size,
            max_model_len=self.engine.max_model_len,
        )

    async def _generate(self, request: GenerationRequest) -> Generation:
        start = time.perf_counter()
        try:
            generation = await self.engine.generate(request)
        except EngineError as error:
            raise _unavailable("DRAINING", f"the engine failed: {error}") from error
        metrics.GENERATE_SECONDS.observe(time.perf_counter() - start)
        metrics.PROMPT_TOKENS.inc(len(request.prompt_token_ids))
        metrics.GENERATED_TOKENS.inc(len(generation.token_ids))
        return generation

    def _account(self, num_requests: int, num_tokens: int) -> None:
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        metrics.REQUESTS_RUNNING.set(self.num_requests)
        metrics.QUEUED_TOKENS.set(self.num_tokens)

    def _admit(self, min_version: int) -> None:
        self._require_weights()
        self.control.admit()
        if min_version > self.engine.version:
            raise ServiceError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "VERSION_NOT_REACHED",
                f"min_version = {min_version}, served is {self.engine.version}; try again",
                retry_after_seconds=_RETRY_SECONDS,
            )

    def _require_weights(self) -> None:
        if not self.engine.version:
            raise _unavailable("NO_WEIGHTS", "the learner has not published weights yet")

    def _admit_tokens(self, tokens: int) -> None:
        # One call alone is always admitted: its size was checked against the context.
        if self.num_requests and self.num_tokens + tokens > self.config.max_queued_tokens:
            raise ServiceError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                f"{self.num_tokens} tokens are admitted, inference.max_queued_tokens = "
                f"{self.config.max_queued_tokens}; try again, raise it, or start another replica",
                retry_after_seconds=_RETRY_SECONDS,
            )


def _unavailable(reason: str, message: str) -> ServiceError:
    return ServiceError(
        grpc.StatusCode.UNAVAILABLE, reason, message, retry_after_seconds=_RETRY_SECONDS
    )


def decode_request(
    request: inference_pb2.GenerateRequest, request_id: str, engine: Engine
) -> GenerationRequest:
    """Check and decode a call.

    The reply's limit is cut to what the context leaves; a reply that reaches it ends with `length`.

    Raises:
        ServiceError: INVALID_ARGUMENT with BAD_PROMPT or BAD_SAMPLING.
    """
    prompt = _decode_prompt(request.prompt_token_ids, engine)
    if len(request.prefix_key.encode()) > MAX_PREFIX_KEY_BYTES:
        raise _bad("BAD_PROMPT", f"prefix_key is longer than {MAX_PREFIX_KEY_BYTES} bytes")
    sampling = request.sampling
    _check_sampling(sampling, engine)
    wants_routes = request.HasField("routes_from")
    if wants_routes:
        _check_routes(request.routes_from, len(prompt), engine)
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        temperature=sampling.temperature,
        max_new_tokens=min(sampling.max_new_tokens, engine.max_model_len - len(prompt)),
        stop_token_ids=tuple(sampling.stop_token_ids),
        seed=sampling.seed if sampling.HasField("seed") else None,
        prefix_key=request.prefix_key,
        routes_from=request.routes_from if wants_routes else None,
    )


def _decode_prompt(data: bytes, engine: Engine) -> IntArray:
    if not data or len(data) % 4:
        raise _bad(
            "BAD_PROMPT", f"prompt_token_ids has {len(data)} bytes; send int32 values, at least one"
        )
    prompt = np.frombuffer(data, "<i4")
    if len(prompt) >= engine.max_model_len:
        raise _bad(
            "BAD_PROMPT",
            f"the prompt has {len(prompt)} tokens; inference.max_model_len = "
            f"{engine.max_model_len} leaves no room for a reply",
        )
    if prompt.min() < 0 or prompt.max() >= engine.vocab_size:
        raise _bad(
            "BAD_PROMPT",
            f"token ids from {prompt.min()} to {prompt.max()}; the model knows 0 to "
            f"{engine.vocab_size - 1}",
        )
    return prompt


def _check_routes(routes_from: int, num_tokens: int, engine: Engine) -> None:
    if not engine.returns_routes:
        raise _bad(
            "BAD_PROMPT",
            f"routes_from = {routes_from}, but this replica records no routes; leave it out, or "
            "set model.router_replay = true for all roles",
        )
    if routes_from > num_tokens:
        raise _bad("BAD_PROMPT", f"routes_from = {routes_from}; the prompt has {num_tokens} tokens")


def _check_sampling(sampling: common_pb2.SamplingParameters, engine: Engine) -> None:
    temperature = sampling.temperature
    if not (math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE):
        raise _bad(
            "BAD_SAMPLING", f"temperature = {temperature}; give 0 (greedy) to {MAX_TEMPERATURE:g}"
        )
    if not 0 < sampling.max_new_tokens < engine.max_model_len:
        raise _bad(
            "BAD_SAMPLING",
            f"max_new_tokens = {sampling.max_new_tokens}; give 1 to {engine.max_model_len - 1}",
        )
    stops = sampling.stop_token_ids
    if len(stops) > MAX_STOP_TOKENS:
        raise _bad("BAD_SAMPLING", f"{len(stops)} stop_token_ids; at most {MAX_STOP_TOKENS}")
    if stops and max(stops) >= engine.vocab_size:
        raise _bad(
            "BAD_SAMPLING",
            f"stop token id {max(stops)}; the model knows 0 to {engine.vocab_size - 1}",
        )
    if sampling.HasField("seed") and sampling.seed >= 2**63:
        raise _bad("BAD_SAMPLING", f"seed = {sampling.seed}; give less than 2**63")


def _bad(reason: str, message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.INVALID_ARGUMENT, reason, message)


def encode_generation(generation: Generation) -> inference_pb2.GenerateResponse:
    """Encode a reply."""
    return inference_pb2.GenerateResponse(
        token_ids=generation.token_ids.astype("<i4", copy=False).tobytes(),
        logprobs=generation.logprobs.astype("<f4", copy=False).tobytes(),
        version_spans=[
            common_pb2.VersionSpan(version=span.version, start=span.start, end=span.end)
            for span in generation.version_spans
        ],
        finish_reason=_FINISH[generation.finish_reason],
        routes=encode_routes(generation.routes) if generation.routes is not None else None,
    )
