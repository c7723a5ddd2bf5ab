"""What samples tokens: the interface that the server stands on, and what passes through it.

G tokens a reply. An engine knows nothing of the wire; the servicer decodes, calls, encodes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inference.weights import Shadow
from understudy.errors import UnderstudyError
from understudy.routes import RouteArray
from understudy.trajectory import FloatArray, IntArray, VersionSpan


class EngineError(UnderstudyError):
    """The engine cannot serve (any more); the process has to be started again."""


class WeightLoadError(Exception):
    """The engine could not take new weights; it serves the version that it had."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One reply to sample."""

    request_id: str
    """Unique in the process."""
    prompt_token_ids: IntArray
    """Prompt, at least one token."""
    temperature: float
    """Divides the logits; 0 is greedy."""
    max_new_tokens: int
    """Most tokens to sample; prompt plus this fits the context."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the reply; the one that did is part of it."""
    seed: int | None = None
    """Seed of the request's own random stream; None draws from the engine's."""
    prefix_key: str = ""
    """Calls with one key share a prefix, normally one episode."""
    routes_from: int | None = None
    """First token of the prompt whose routes are wanted; None wants none."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One sampled reply."""

    token_ids: IntArray
    """[G] sampled tokens."""
    logprobs: FloatArray
    """[G] log-probability of each under the distribution it was drawn from."""
    version_spans: tuple[VersionSpan, ...]
    """Policy versions over the G tokens, ascending and contiguous from 0."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the last token is a stop token. `length`: max_new_tokens were sampled."""
    routes: RouteArray | None = None
    """[R, L, K] experts of the tokens from `routes_from` to the one before the last sampled one."""


class Engine(ABC):
    """Samples replies, many at a time, under weights that can change while it does."""

    name: str
    """`vllm` or `scripted`."""

    computes: bool = True
    """Whether replies and log-probabilities come from the weights."""

    reproducible: bool = False
    """Whether a seeded request gets the same reply, bit for bit, whatever else is batched with it
    or cached; valid after start."""

    returns_routes: bool = False
    """Whether a request may ask for routes."""

    @property
    def failure(self) -> str | None:
        """Why the engine cannot serve any more; None while it can."""
        return None

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids that the model knows; valid after start."""

    @property
    @abstractmethod
    def max_model_len(self) -> int:
        """Longest prompt plus reply in tokens."""

    @property
    @abstractmethod
    def version(self) -> int:
        """Policy version that new requests get; 0 before the first weights."""

    @abstractmethod
    async def start(self, bundle: Path) -> None:
        """Make ready to generate, without weights yet, for the model described in the folder."""

    @abstractmethod
    async def generate(self, request: GenerationRequest) -> Generation:
        """Sample one reply. Cancelling the task frees all that the request holds.

        Raises:
            EngineError: the engine is broken.
        """

    @abstractmethod
    async def load_weights(self, shadow: Shadow, version: int) -> float:
        """Serve other weights from now on; running requests go on under them.

        Returns:
            Seconds for which generation stood still.

        Raises:
            WeightLoadError: refused; the previous version serves again, or none did before.
            EngineError: the previous version could not be brought back.
        """

    @abstractmethod
    async def prompt_logprobs(self, token_ids: IntArray) -> FloatArray:
        """[N-1] log-probability of token 1..N-1 given those before it, at temperature 1."""

    @abstractmethod
    async def stop(self) -> None:
        """End; running requests fail. Idempotent."""
