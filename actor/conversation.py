"""A conversation as the policy saw it, token by token.

What the model sampled is never re-tokenised. The next prompt is the tokens so far plus the tokens
of what the template adds. Where the template rewrites history (thoughts stripped, say), its text no
longer starts with ours: then a new segment begins from the full rendering.

    segment 0   [system, question]  reply  [observation]  reply  ...
                 loss_mask 0         1      0              1
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from understudy.chat import ChatFormat
from understudy.client import Generation
from understudy.routes import RouteArray
from understudy.trajectory import BoolArray, FloatArray, IntArray, Segment, VersionSpan

_NO_TOKENS = np.empty(0, np.int32)
_OUTSIDE_ROLES = {"system", "user", "tool"}


@dataclass(eq=False)
class Draft:
    """A segment while it grows; pieces are joined once a turn."""

    text: str
    token_ids: IntArray
    masks: list[BoolArray]
    logprobs: list[FloatArray] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    num_sampled: int = 0
    routes: list[RouteArray] = field(default_factory=list)
    num_routes: int = 0
    """Tokens whose routes are known."""

    @classmethod
    def begin(cls, text: str, token_ids: IntArray) -> "Draft":
        """A segment that begins with a prompt."""
        draft = cls(text="", token_ids=_NO_TOKENS, masks=[])
        draft.append(text, token_ids, sampled=False)
        return draft

    def append(self, text: str, token_ids: IntArray, sampled: bool) -> None:
        self.text += text
        self.token_ids = np.concatenate((self.token_ids, token_ids))
        self.masks.append(np.full(len(token_ids), sampled))

    def sample(self, text: str, generation: Generation) -> None:
        self.append(text, generation.token_ids, sampled=True)
        self.logprobs.append(generation.logprobs)
        for span in generation.version_spans:
            self._add_span(span)
        self.num_sampled += len(generation.token_ids)
        if generation.routes is not None:
            # The newest rows: an earlier reply may have brought some of those that came.
            missing = len(self.token_ids) - 1 - self.num_routes
            self.routes.append(generation.routes[len(generation.routes) - missing :])
            self.num_routes += missing

    def _add_span(self, span: VersionSpan) -> None:
        start, end = span.start + self.num_sampled, span.end + self.num_sampled
        if self.spans and self.spans[-1].version == span.version:
            start = self.spans.pop().start
        self.spans.append(VersionSpan(version=span.version, start=start, end=end))

    def finish(self) -> Segment:
        """The segment up to its last sampled token: what follows was never answered."""
        mask = np.concatenate(self.masks)
        length = int(np.flatnonzero(mask)[-1]) + 1
        return Segment(
            token_ids=self.token_ids[:length],
            loss_mask=mask[:length],
            logprobs=np.concatenate(self.logprobs),
            version_spans=tuple(self.spans),
            routes=np.concatenate(self.routes)[: length - 1] if self.routes else None,
        )


def read_generation(chat: ChatFormat, generation: Generation) -> tuple[str, str]:
    """Text of a reply, and that of the stop token behind it; none if the reply was cut off."""
    ids, end = generation.token_ids, ""
    if not generation.cut_off and len(ids):
        end = chat.stop_texts[int(ids[-1])]
        ids = ids[:-1]
    return chat.decode(ids), end


class Conversation:
    """Grows by observations and replies, and yields prompts and segments."""

    def __init__(self, chat: ChatFormat, tools: Sequence[Mapping[str, Any]]) -> None:
        self._chat = chat
        self._tools = chat.neutralise_all(tools)
        self._messages: list[Mapping[str, Any]] = []
        self._drafts: list[Draft] = []

    def observe(self, messages: Sequence[Mapping[str, Any]]) -> IntArray:
        """Add messages from the environment and return the prompt of the next turn, [P] tokens.

        Raises:
            ValueError: for a role that only the policy itself may speak in.
        """
        self._messages += self._checked(messages)
        text = self._chat.render(self._messages, self._tools, add_generation_prompt=True)
        if self._drafts and text.startswith(self._drafts[-1].text):
            suffix = text[len(self._drafts[-1].text) :]
            self._drafts[-1].append(suffix, self._chat.encode(suffix), sampled=False)
        else:
            self._drafts.append(Draft.begin(text, self._chat.encode(text)))
        return self._drafts[-1].token_ids

    def measure(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """Tokens of the prompt that these messages would make. Raises ValueError as observe."""
        said = [*self._messages, *self._checked(messages)]
        text = self._chat.render(said, self._tools, add_generation_prompt=True)
        if self._drafts and text.startswith(self._drafts[-1].text):
            added = self._chat.encode(text[len(self._drafts[-1].text) :])
            return len(self._drafts[-1].token_ids) + len(added)
        return len(self._chat.encode(text))

    def _checked(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        for message in messages:
            if message["role"] not in _OUTSIDE_ROLES:
                raise ValueError(f"role {message['role']!r} is none of {sorted(_OUTSIDE_ROLES)}")
        return [
            {**message, "content": self._chat.neutralise(message["content"])}
            for message in messages
        ]

    def reply(self, generation: Generation) -> str:
        """Add what the policy sampled and return its text without the stop token."""
        content, end = read_generation(self._chat, generation)
        self._drafts[-1].sample(content + end, generation)
        self._messages.append({"role": "assistant", "content": content})
        return content

    @property
    def segment_index(self) -> int:
        """Index of the segment that the last reply is in."""
        return len(self._drafts) - 1

    @property
    def num_sampled(self) -> int:
        """Sampled tokens of the current segment so far."""
        return self._drafts[-1].num_sampled

    @property
    def num_routes(self) -> int:
        """Tokens of the current segment whose routes are known."""
        return self._drafts[-1].num_routes

    def segments(self) -> tuple[Segment, ...]:
        """The finished segments; those without a sampled token are left out."""
        return tuple(draft.finish() for draft in self._drafts if draft.num_sampled)
