"""An engine that plays a script: for tests, and for benchmarks of everything round the model.

The n-th call with one prefix key gets the n-th reply, the last one repeats; every reply takes the
same time. Weights are accepted and their version is reported, but nothing computes with them. A
token's routes are made up of its id, so that it can be seen whether they stay with it.
"""

import asyncio
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from inference.engine import Engine, Generation, GenerationRequest
from inference.weights import Shadow
from understudy.config import InferenceConfig
from understudy.errors import ConfigError
from understudy.routes import Mixture, RouteArray, read_mixture
from understudy.trajectory import FloatArray, IntArray, VersionSpan

LOGPROB = -0.5
"""Log-probability that every token has."""
STOP_TOKEN = "<|im_end|>"
"""Token that ends every reply."""
_MAX_KEYS = 65_536
"""Prefix keys remembered; past that the one not seen for longest starts its script again."""


class ScriptedEngine(Engine):
    """Replies from the config, in order, per prefix key."""

    name = "scripted"
    computes = False

    def __init__(self, config: InferenceConfig, *, router_replay: bool = False) -> None:
        self._config = config
        self.returns_routes = router_replay
        self._mixture: Mixture | None = None
        self._latency = config.scripted.latency_seconds
        self._replies: list[IntArray] = []
        self._calls: OrderedDict[str, int] = OrderedDict()
        self._vocab_size = 0
        self._version = 0

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model knows; valid after start."""
        return self._vocab_size

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus reply in tokens."""
        return self._config.max_model_len

    @property
    def version(self) -> int:
        """Policy version that new requests get; 0 before the first weights."""
        return self._version

    async def start(self, bundle: Path) -> None:
        """Encode the replies with the bundle's tokenizer.

        Raises:
            ConfigError: the tokenizer has no stop token, or the model no experts to return routes
                to.
        """
        tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        stop = tokenizer.token_to_id(STOP_TOKEN)
        if stop is None:
            raise ConfigError(
                f"inference.engine = 'scripted' needs the token {STOP_TOKEN} in the model's "
                "tokenizer; add it or use another model"
            )
        settings = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
        self._vocab_size = int(settings.get("vocab_size", tokenizer.get_vocab_size()))
        if self.returns_routes:
            self._mixture = read_mixture(bundle)
        for text in self._config.scripted.replies:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            self._replies.append(np.array([*ids, stop], np.int32))

    async def generate(self, request: GenerationRequest) -> Generation:
        """Give the next reply of the request's prefix key."""
        reply = self._replies[self._next_index(request.prefix_key)]
        if self._latency:
            await asyncio.sleep(self._latency)
        token_ids = reply[: request.max_new_tokens]
        count = len(token_ids)
        routes = None
        if self._mixture and request.routes_from is not None:
            computed = np.concatenate((request.prompt_token_ids, token_ids))[:-1]
            routes = made_up_routes(computed[request.routes_from :], self._mixture)
        return Generation(
            token_ids=token_ids,
            logprobs=np.full(count, LOGPROB, np.float32),
            version_spans=(VersionSpan(version=self._version, start=0, end=count),),
            finish_reason="stop" if count == len(reply) else "length",
            routes=routes,
        )

    def _next_index(self, key: str) -> int:
        index = self._calls.pop(key, 0)
        self._calls[key] = min(index + 1, len(self._replies) - 1)
        if len(self._calls) > _MAX_KEYS:
            self._calls.popitem(last=False)
        return index

    async def load_weights(self, shadow: Shadow, version: int) -> float:
        """Report this version from now on."""
        self._version = version
        return 0.0

    async def prompt_logprobs(self, token_ids: IntArray) -> FloatArray:
        """The fixed log-probability for each token but the first."""
        return np.full(len(token_ids) - 1, LOGPROB, np.float32)

    async def stop(self) -> None:
        """Nothing is held."""


def made_up_routes(token_ids: IntArray, mixture: Mixture) -> RouteArray:
    """[R, L, K] different experts for each of R tokens, which depend on nothing but its id."""
    layers, places = np.arange(mixture.num_layers), np.arange(mixture.top_k)
    sums = token_ids[:, None, None] + layers[None, :, None] + places[None, None]
    width = np.uint16 if mixture.num_experts > 256 else np.uint8
    routes: RouteArray = (sums % mixture.num_experts).astype(width)
    return routes
