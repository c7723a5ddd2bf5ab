"""Trajectories as chats: Qwen3's turns with Hermes tool calls, read leniently for people."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch.report.files import Line

_TURN = re.compile(r"<\|im_start\|>(\w*)\n?(.*?)(?:<\|im_end\|>|(?=<\|im_start\|>)|\Z)", re.DOTALL)
_KINDS = {"tool_call": "call", "tool_response": "response", "think": "thought"}
_SPEAKERS = {"system": "system", "user": "user", "assistant": "assistant", "tool": "response"}
_TAGS = {"assistant": "tool_call|think", "user": "tool_response", "tool": "tool_response"}
"""What a role may write; in another's text a tag is just text."""
_EACH = 2
"""Trajectories shown of each stretch of the run, right and wrong ones each."""


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """One thing that was said."""

    kind: str
    """system, user, assistant, call, response, thought or answer."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One trajectory to read."""

    title: str
    is_right: bool
    facts: str
    bubbles: tuple[Bubble, ...]


def chats_of(samples: Sequence[Line]) -> dict[str, list[Chat]]:
    """A few right and wrong trajectories from the beginning, the middle and the end of the run."""
    steps = sorted({_step(sample) for sample in samples})
    if not steps:
        return {}
    span = (steps[-1] - steps[0] + 1) / 3
    chosen: dict[str, list[Chat]] = {}
    for index, stretch in enumerate(("early", "middle", "late")):
        here = [s for s in samples if min(int((_step(s) - steps[0]) // span), 2) == index]
        picked = [s for is_right in (True, False) for s in _pick(here, is_right)]
        if picked:
            chosen[stretch] = [_chat(sample) for sample in picked]
    return chosen


def bubbles_of(text: str) -> tuple[Bubble, ...]:
    """Take a conversation's text apart; text without turns is one bubble."""
    turns = list(_TURN.finditer(text))
    if not turns:
        return (Bubble(kind="assistant", text=text.strip()),) if text.strip() else ()
    bubbles = [bubble for turn in turns for bubble in _parts(turn[1], turn[2])]
    if bubbles and bubbles[-1].kind == "assistant":
        bubbles[-1] = Bubble(kind="answer", text=bubbles[-1].text)
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


def _pick(samples: Sequence[Line], is_right: bool) -> list[Line]:
    """The longest first, of different levels if there are."""
    matching = [sample for sample in samples if _is_right(sample) == is_right]
    matching.sort(key=lambda sample: len(str(sample["text"])), reverse=True)
    by_level = {str(sample.get("level")): sample for sample in reversed(matching)}
    first = sorted(by_level.values(), key=lambda s: str(s.get("level")), reverse=True)
    rest = [sample for sample in matching if all(sample is not other for other in first)]
    return (first + rest)[:_EACH]


def _chat(sample: Line) -> Chat:
    names = {"step": "step", "version": "version", "num_turns": "turns"}
    facts = [f"{name} {sample[key]}" for key, name in names.items() if key in sample]
    reward = sample.get("reward")
    if isinstance(reward, int | float):
        facts.append(f"reward {reward:g}")
    level = f"level {sample['level']}" if "level" in sample else ""
    title = " - ".join(str(word) for word in (sample.get("task_id"), level) if word)
    return Chat(
        title=title or "trajectory",
        is_right=_is_right(sample),
        facts=", ".join(facts),
        bubbles=bubbles_of(str(sample["text"])),
    )


def _step(sample: Line) -> float:
    step = sample.get("step")
    return step if isinstance(step, int | float) else 0


def _is_right(sample: Line) -> bool:
    reward = sample.get("reward")
    return isinstance(reward, int | float) and reward > 0.5
