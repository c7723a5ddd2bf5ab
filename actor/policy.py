"""Who replies in an episode: the seam between the episode's loop and what generates.

    policy.begin(lease, opening) -> speaker;   speaker.reply(messages) -> Said, once a turn

Two implementations: the run's inference service, in tokens (tokens.py), and any OpenAI-compatible
endpoint, in messages (evaluation/endpoint.py).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from understudy.chat import Reply
from understudy.client import Lease, Opening

if TYPE_CHECKING:
    from actor.recording.session import RecordingSession


class NoReplyError(Exception):
    """A turn has no reply."""

    before: "tuple[Said, ...]" = ()
    """What an agent's parts had said to each other since the environment was last heard."""


class CutShortError(NoReplyError):
    """A limit ended the episode."""


class InferenceFailedError(NoReplyError):
    """Nobody answered a turn."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the policy said in one turn."""

    reply: Reply
    message: dict[str, Any]
    """The same as a chat message: {"role": "assistant", "content", and "tool_calls" if the backend
    reads calls itself: [{"name", "arguments"}]}."""
    cut_off: bool
    """The reply ended at a token limit."""
    segment: int
    start: int
    end: int
    """Its place among sampled tokens, as understudy.trajectory.Turn has it."""
    before: "tuple[Said, ...]" = ()
    """What an agent's parts said to each other before it, which the environment does not hear."""
    heard: tuple[dict[str, Any], ...] = ()
    """What an agent's part was told since its last reply; it has a prompt of its own."""
    seconds: float = 0.0
    """Of one that stands in `before`: how long it took."""


class Speaker(Protocol):
    """A policy's part in one episode."""

    async def reply(self, messages: Sequence[dict[str, Any]]) -> Said:
        """Answer what the environment said last.

        Raises:
            CutShortError: there is no room left for a reply.
            InferenceFailedError: nobody answered.
        """

    def room(self, messages: Sequence[dict[str, Any]]) -> int | None:
        """Tokens that a reply to these messages could have; None where nobody counts them.

        Raises:
            CutShortError: they are too long to be counted.
        """

    @property
    def num_tokens(self) -> int:
        """Tokens of the episode so far, prompts included; 0 where nobody counts them."""

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens that the policy sampled."""

    @property
    def versions(self) -> frozenset[int]:
        """Policy versions that sampled a token; none where there are no versions."""


S_co = TypeVar("S_co", bound=Speaker, covariant=True)


class Policy(Protocol[S_co]):
    """Plays any number of episodes at one time."""

    def begin(self, lease: Lease, opening: Opening) -> S_co:
        """Take part in an episode that the environment has opened."""

    def record(self, lease: Lease) -> AbstractContextManager["RecordingSession | None"]:
        """An endpoint that speaks for the policy in one episode; None where there is none."""
