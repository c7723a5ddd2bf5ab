"""What a harness and the policy said to each other, token by token, as a tree of conversations.

    system, question -> reply 1 -> result -> reply 2            segment 0
                           \\-> another result -> reply 3        segment 1: forked after reply 1
    system', question, reply 1, result -> reply 4               segment 2: rewritten

A request goes on with the longest recorded history that its messages begin with. The tokens of that
history stay as they were sampled; what the template adds is tokenised, and is no part of the loss.
Where that history was gone on with before, or where its rendering does not begin with the recorded
text, a new segment begins. Replies of the history are prompt there: each is learned from once.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from actor.conversation import Draft, read_generation
from actor.recording.request import ChatRequest, Json, assistant_message
from actor.tokens import Sampled, refuse_flood
from understudy.chat import ChatFormat, Reply, parse_reply
from understudy.client import Generation
from understudy.trajectory import IntArray, Segment, Turn

How = Literal["began", "extended", "forked", "rewritten"]
"""A request's place in what is recorded: in no history, at the end of one, in the midst of one, or
in one that the template renders differently now."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """A conversation just after a reply."""

    messages: tuple[Mapping[str, Any], ...]
    """As they are rendered: replies in the policy's own words, all else neutralised."""
    draft: Draft
    num_characters: int
    num_tokens: int

    @property
    def is_tip(self) -> bool:
        return len(self.draft.token_ids) == self.num_tokens


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request's messages as P tokens, and where they belong."""

    token_ids: IntArray
    """[P]"""
    text: str
    messages: tuple[Mapping[str, Any], ...]
    digest: bytes
    """Of the request's messages."""
    base: _State | None
    """The history that the tokens begin with."""
    how: How


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One reply."""

    reply: Reply
    """`malformed` says that a call could not be read; the text then has it."""
    thoughts: str
    generation: Generation
    num_prompt_tokens: int
    how: How


@dataclass(frozen=True, kw_only=True)
class _Turn:
    draft: Draft
    start: int
    end: int
    reply: Reply
    generate_seconds: float


class Recorder(Sampled):
    """All conversations of one episode."""

    def __init__(self, chat: ChatFormat, max_tokens: int) -> None:
        """Take the template, and the most tokens that a segment may have."""
        self._chat = chat
        self._max_tokens = max_tokens
        self._states: dict[bytes, _State] = {}
        self._said: dict[bytes, str] = {}
        """Replies in the policy's own words, by the digest of what was returned."""
        self._turns: list[_Turn] = []
        self.messages: tuple[Mapping[str, Any], ...] = ()
        """The conversation of the last reply, as rendered."""

    @property
    def num_turns(self) -> int:
        """Replies so far."""
        return len(self._turns)

    @property
    def answer(self) -> str:
        """Text of the last reply."""
        return self._turns[-1].reply.text if self._turns else ""

    def prompt(self, request: ChatRequest) -> Prompt:
        """Find a request's place and render it.

        Raises:
            CutShortError: it is longer than any segment may be.
            jinja2.TemplateError: the template refuses its messages.
        """
        digest, known, start = _digest(b"", list(request.tools)), None, 0
        for index, message in enumerate(request.messages):
            digest = _digest(digest, message)
            if message["role"] == "assistant" and digest in self._states:
                known, start = self._states[digest], index + 1
        before = known.messages if known else ()
        messages = (*before, *map(self._render, request.messages[start:]))
        tools = self._chat.neutralise_all(request.tools)
        text = self._chat.render(messages, tools, add_generation_prompt=True)
        refuse_flood([{"content": text}], self._max_tokens)
        base = (
            known if known and text.startswith(known.draft.text[: known.num_characters]) else None
        )
        if base:
            added = self._chat.encode(text[base.num_characters :])
            token_ids = np.concatenate((base.draft.token_ids[: base.num_tokens], added))
        else:
            token_ids = self._chat.encode(text)
        how: How = "began"
        if known:
            how = "rewritten" if not base else "extended" if base.is_tip else "forked"
        return Prompt(
            token_ids=token_ids, text=text, messages=messages, digest=digest, base=base, how=how
        )

    def _render(self, message: Json) -> Mapping[str, Any]:
        """A message as the template gets it; a reply of the policy's in its own words."""
        said = self._said.get(_digest(b"", message)) if message["role"] == "assistant" else None
        if said is not None:
            return {"role": "assistant", "content": said}
        neutral: Json = self._chat.neutralise_all(message)
        return neutral

    def record(
        self, request: ChatRequest, prompt: Prompt, generation: Generation, seconds: float
    ) -> Recorded:
        """Add what was sampled behind a prompt.

        Raises:
            RecursionError: for a call whose arguments are nested too deeply; nothing is added.
        """
        content, end = read_generation(self._chat, generation)
        reply = _read(content, request.reads_calls)
        calls = [{"name": call.name, "arguments": call.arguments} for call in reply.calls]
        returned = assistant_message(reply.text, calls)
        place, said = _digest(prompt.digest, returned), _digest(b"", returned)  # before any change
        draft = self._draft(prompt)
        start = draft.num_sampled
        draft.sample(content + end, generation)
        self.messages = (*prompt.messages, {"role": "assistant", "content": content})
        self._said[said] = content
        self._states[place] = _State(
            messages=self.messages,
            draft=draft,
            num_characters=len(draft.text),
            num_tokens=len(draft.token_ids),
        )
        self._turns.append(
            _Turn(
                draft=draft,
                start=start,
                end=draft.num_sampled,
                reply=reply,
                generate_seconds=seconds,
            )
        )
        thoughts = content.rpartition("</think>")[0].removeprefix("<think>").strip()
        return Recorded(
            reply=reply,
            thoughts=thoughts,
            generation=generation,
            num_prompt_tokens=len(prompt.token_ids),
            how=prompt.how,
        )

    def _draft(self, prompt: Prompt) -> Draft:
        """The segment that a reply belongs to; another request may have been there first."""
        base = prompt.base
        if base is None or not base.is_tip:
            return Draft.begin(prompt.text, prompt.token_ids)
        base.draft.append(
            prompt.text[base.num_characters :], prompt.token_ids[base.num_tokens :], sampled=False
        )
        return base.draft

    def _drafts(self) -> list[Draft]:
        """Segments by their last reply, so that the episode's last reply is the last one's."""
        return list(dict.fromkeys(turn.draft for turn in reversed(self._turns)))[::-1]

    def segments(self) -> tuple[Segment, ...]:
        """The segments, each up to its last reply."""
        return tuple(draft.finish() for draft in self._drafts())

    def turns(self, reward: float) -> list[Turn]:
        """All replies, in order of time; the last one has the reward."""
        index = {draft: number for number, draft in enumerate(self._drafts())}
        return [
            Turn(
                segment=index[turn.draft],
                start=turn.start,
                end=turn.end,
                reward=reward if turn is self._turns[-1] else 0.0,
                num_tool_calls=len(turn.reply.calls),
                malformed_call=bool(turn.reply.malformed),
                generate_seconds=turn.generate_seconds,
                step_seconds=0.0,
            )
            for turn in self._turns
        ]


def _read(content: str, reads_calls: bool) -> Reply:
    """What the harness gets: without thoughts; all else as it is where calls are not readable."""
    reply = parse_reply(content)
    if reads_calls and not reply.malformed:
        return reply
    said = content.rpartition("</think>")[2].strip()
    return Reply(text=said, malformed=reply.malformed if reads_calls else "")


def _digest(before: bytes, value: Sequence[Json] | Json) -> bytes:
    """Of a history that goes on with a value; equal for messages that say the same."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(before + text.encode(), digest_size=16).digest()
