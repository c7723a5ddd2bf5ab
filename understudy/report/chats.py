"""Conversations to read: Qwen3's turns with Hermes tool calls, or chat messages as they are."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

_TURN = re.compile(r"<\|im_start\|>(\w*)\n?(.*?)(?:<\|im_end\|>|(?=<\|im_start\|>)|\Z)", re.DOTALL)
_KINDS = {"tool_call": "call", "tool_response": "response", "think": "thought"}
_SPEAKERS = {"system": "system", "user": "user", "assistant": "assistant", "tool": "response"}
_TAGS = {"assistant": "tool_call|think", "user": "tool_response", "tool": "tool_response"}
"""What a role may write; in another's text a tag is just text."""
_REPLY = re.compile(r"<\|im_start\|>assistant\n.*?<\|im_end\|>", re.DOTALL)
_LONGEST = 6000
"""Characters of a bubble that are shown."""


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """One thing that was said."""

    kind: str
    """system, user, assistant, call, response, thought or answer."""
    text: str
    part: str = ""
    """The agent's part that said or heard it; empty where it has none."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One conversation to read."""

    title: str
    is_right: bool | None
    """None where that is not known."""
    verdict: str
    """In a word, e.g. `right`."""
    facts: str
    bubbles: tuple[Bubble, ...]

    @property
    def parts(self) -> list[str]:
        """Parts of the agent, in the order in which they first say something."""
        return list(dict.fromkeys(bubble.part for bubble in self.bubbles if bubble.part))


def bubbles_of(text: str) -> tuple[Bubble, ...]:
    """Take a conversation's text apart; text without turns is one bubble."""
    found = _bubbles_of(text)
    return _with_answer(found) if _TURN.search(text) else tuple(found)


def _bubbles_of(text: str) -> list[Bubble]:
    turns = list(_TURN.finditer(text))
    if not turns:
        return [*_bubble("assistant", text)]
    return [bubble for turn in turns for bubble in _parts(turn[1], turn[2])]


def bubbles_of_pieces(pieces: Iterable[tuple[str, str]]) -> tuple[Bubble, ...]:
    """Take apart what an agent's parts said, in order of time.

    Args:
        pieces: a part's name, and the text of a reply behind what was new in its prompt. A prompt
            that has replies in it repeats a conversation: what precedes the last one is left out.
    """
    bubbles: list[Bubble] = []
    for part, text in pieces:
        fresh = _REPLY.split(text.removesuffix("<|im_end|>"))[-1]
        bubbles += [replace(bubble, part=part) for bubble in _bubbles_of(fresh)]
    return _with_answer([replace(bubble, text=_cut(bubble.text)) for bubble in bubbles])


def bubbles_of_messages(messages: Iterable[Mapping[str, Any]]) -> tuple[Bubble, ...]:
    """Take chat messages apart: {"role", "content", maybe "tool_calls": [{"name", "arguments"}],
    maybe "name": the agent's part that said or heard it}.

    What is very long is cut, and says so.
    """
    bubbles: list[Bubble] = []
    for message in messages:
        said = [*_parts(str(message["role"]), str(message["content"] or ""))]
        for call in message.get("tool_calls") or ():
            said += _bubble("call", json.dumps(call))
        bubbles += [replace(bubble, part=str(message.get("name", ""))) for bubble in said]
    return _with_answer([replace(bubble, text=_cut(bubble.text)) for bubble in bubbles])


def _cut(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} ... ({len(text) - _LONGEST} more characters)"


def _with_answer(bubbles: list[Bubble]) -> tuple[Bubble, ...]:
    if bubbles and bubbles[-1].kind == "assistant":
        bubbles[-1] = replace(bubbles[-1], kind="answer")
    return tuple(bubbles)


def _parts(role: str, content: str) -> Iterator[Bubble]:
    speaker = _SPEAKERS.get(role, "user")
    rest = content
    while role in _TAGS and (tag := re.search(rf"<({_TAGS[role]})>", rest)):
        yield from _bubble(speaker, rest[: tag.start()])
        inside, _, rest = rest[tag.end() :].partition(f"</{tag[1]}>")
        yield from _bubble(_KINDS[tag[1]], inside)
    yield from _bubble(speaker, rest)


def _bubble(kind: str, text: str) -> Iterator[Bubble]:
    if text := text.strip():
        yield Bubble(kind=kind, text=_call(text) if kind == "call" else text)


def _call(text: str) -> str:
    """`{"name": "f", "arguments": {"a": 1}}` as `f(a=1)`; anything else stays as it is."""
    try:
        call = json.loads(text)
        arguments = call.get("arguments", {}).items()
        listed = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in arguments)
        return f"{call['name']}({listed})"
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return text
