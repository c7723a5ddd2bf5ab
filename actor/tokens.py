"""The run's inference service as a policy: token ids in, token ids out."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from actor.conversation import Conversation
from actor.inference_pool import InferencePool
from actor.policy import CutShortError, InferenceFailedError, Said
from understudy.chat import ChatFormat, parse_reply
from understudy.client import Generation, Lease, Opening
from understudy.trajectory import IntArray, Segment
from understudy.v1 import common_pb2

if TYPE_CHECKING:
    from actor.recording.server import Recordings
    from actor.recording.session import RecordingSession

_CHARACTERS_PER_TOKEN = 100
"""More than any text has, on average; tokenisers get about 4."""
MAX_NEW_TOKENS = 2**31 - 1


class TokenPolicy:
    """Renders conversations and has an inference replica go on with them."""

    def __init__(
        self,
        chat: ChatFormat,
        inference: InferencePool,
        recordings: "Recordings | None" = None,
    ) -> None:
        """Take the run's template and inference, and the recording endpoint if it is served."""
        self._chat = chat
        self._inference = inference
        self._recordings = recordings

    def begin(self, lease: Lease, opening: Opening) -> "TokenSpeaker":
        """Start a conversation with the tools of an episode."""
        return TokenSpeaker(self._chat, self._inference, lease, opening)

    def record(self, lease: Lease) -> AbstractContextManager["RecordingSession | None"]:
        """An endpoint for one episode, if the recording endpoint is served."""
        return self._recordings.session(lease) if self._recordings else nullcontext()


class Sampled:
    """What segments say of a part in an episode."""

    def segments(self) -> tuple[Segment, ...]:
        """The finished segments."""
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(len(segment.token_ids) for segment in self.segments())

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens that the policy sampled."""
        return sum(len(segment.logprobs) for segment in self.segments())

    @property
    def versions(self) -> frozenset[int]:
        """Policy versions that sampled a token."""
        return frozenset(
            span.version for segment in self.segments() for span in segment.version_spans
        )


class TokenSpeaker(Sampled):
    """One conversation, token by token."""

    def __init__(
        self, chat: ChatFormat, inference: InferencePool, lease: Lease, opening: Opening
    ) -> None:
        self._chat = chat
        self._inference = inference
        self._lease = lease
        self._conversation = Conversation(chat, opening.tools)
        self._num_replies = 0

    async def reply(self, messages: Sequence[dict[str, Any]]) -> Said:
        """Sample one reply. Raises CutShortError and InferenceFailedError as Speaker says."""
        refuse_flood(messages, self._lease.max_tokens)
        generation = await self._generate(self._conversation.observe(messages))
        start = self._conversation.num_sampled
        text = self._conversation.reply(generation)
        self._num_replies += 1
        return Said(
            reply=parse_reply(text),
            message={"role": "assistant", "content": text},
            cut_off=generation.cut_off,
            segment=self._conversation.segment_index,
            start=start,
            end=self._conversation.num_sampled,
        )

    def room(self, messages: Sequence[dict[str, Any]]) -> int:
        """Tokens that a reply to these messages could have. Raises CutShortError for a flood."""
        refuse_flood(messages, self._lease.max_tokens)
        return self._lease.max_tokens - self._conversation.measure(messages)

    async def _generate(self, prompt: IntArray) -> Generation:
        return await sample(
            self._chat,
            self._inference,
            self._lease,
            prompt,
            self._num_replies,
            routes_from=self._conversation.num_routes,
        )

    def segments(self) -> tuple[Segment, ...]:
        """The conversation's finished segments."""
        return self._conversation.segments()


async def sample(
    chat: ChatFormat,
    inference: InferencePool,
    lease: Lease,
    prompt: IntArray,
    turn: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    routes_from: int = 0,
) -> Generation:
    """Sample one reply as the lease says.

    Args:
        prompt: [P] tokens.
        turn: replies of this episode before it; seeds differ by it.
        max_new_tokens: what the caller wants at most; the lease's limits hold too.
        routes_from: tokens of the prompt whose routes are known, where routes are recorded.

    Raises:
        CutShortError: the prompt leaves no room for a reply.
        InferenceFailedError: nobody answered, or a version did that the lease excludes.
    """
    room = lease.max_tokens - len(prompt)
    if room < 1:
        raise CutShortError(f"max_tokens = {lease.max_tokens}")
    sampling = common_pb2.SamplingParameters(
        temperature=lease.sampling.temperature,
        max_new_tokens=min(room, lease.sampling.max_new_tokens, max_new_tokens),
        stop_token_ids=chat.stop_token_ids,
    )
    if lease.sampling.HasField("seed"):
        sampling.seed = turn_seed(lease.sampling.seed, turn)
    key = f"{lease.ordinal}-{lease.sample_index}"
    generation = await inference.generate(
        prompt, sampling, key, lease.min_version, routes_from=routes_from
    )
    _refuse_newer(generation, lease.max_version)
    return generation


def turn_seed(seed: int, turn: int) -> int:
    """One stream of random numbers a turn, told apart by a large odd stride."""
    return (seed + turn * 0x9E3779B97F4A7C15) % 2**63


def refuse_flood(messages: Sequence[dict[str, Any]], max_tokens: int) -> None:
    """Tokenising blocks the event loop: what cannot fit into the segment is not tokenised.

    Raises:
        CutShortError: for messages that are too long.
    """
    size = sum(len(message["content"]) for message in messages)
    if size > _CHARACTERS_PER_TOKEN * max_tokens:
        raise CutShortError(f"max_tokens = {max_tokens}: an observation has {size} characters")


def _refuse_newer(generation: Generation, max_version: int) -> None:
    newest = max((span.version for span in generation.version_spans), default=0)
    if max_version and newest > max_version:
        raise InferenceFailedError(
            f"version {newest} had a part in a reply; the lease allows up to {max_version}"
        )
