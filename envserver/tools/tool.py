"""What a tool is, how its calls are checked, and the tools of one episode."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envserver.environment import Message, ToolCall, ToolOutcome, ToolSpec
from envserver.sandbox import Outcome

UNKNOWN_TOOL = "unknown"
"""Name under which calls of tools that do not exist are counted."""
MAX_CHARS = 16_000
"""What a policy is shown of one observation: the beginning and the end."""
_TYPES: Mapping[str, type] = {"string": str, "integer": int}


def describe(
    name: str,
    description: str,
    optional: Mapping[str, Any] | None = None,
    integers: Mapping[str, str] | None = None,
    **arguments: str,
) -> ToolSpec:
    """A tool's description for the policy.

    Args:
        optional: JSON schemas of arguments that may be left out.
        integers: required integers, each with its description; after the strings.
        arguments: required strings, each with its description.
    """
    properties: dict[str, Any] = {
        argument: {"type": kind, "description": text}
        for kind, described in (("string", arguments), ("integer", integers or {}))
        for argument, text in described.items()
    }
    required = list(properties)
    properties |= optional or {}
    parameters = {"type": "object", "properties": properties, "required": required}
    return ToolSpec(name=name, description=description, parameters=parameters)


def check_call(call: ToolCall, specs: Mapping[str, ToolSpec]) -> None:
    """Check a call against the tools that there are, by name.

    Raises ValueError, with a remedy that a policy can read and nothing of the call in it.
    """
    if call.name not in specs:
        raise ValueError(f"Unknown tool; use {', '.join(specs)}.")
    parameters = specs[call.name].parameters
    properties = parameters["properties"]
    if not set(parameters["required"]) <= set(call.arguments) <= set(properties):
        raise ValueError(f"Wrong arguments; {call.name} takes {', '.join(properties)}.")
    for name, value in call.arguments.items():
        kind = properties[name]["type"]
        if type(value) is not _TYPES[kind]:  # a bool is an int, but no integer
            article = "an" if kind[0] in "aeiou" else "a"
            raise ValueError(f"Wrong type; {name} is {article} {kind}.")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a tool answers."""

    text: str
    outcome: Outcome = Outcome.OK


class Tool(ABC):
    """One tool of one episode."""

    spec: ToolSpec

    @abstractmethod
    async def call(self, **arguments: Any) -> Observation:
        """Answer a call whose arguments fit `spec`.

        Raises ValueError, with a remedy that a policy can read, for one that cannot be answered.
        """


class Toolbox:
    """The tools of one episode."""

    def __init__(self, *tools: Tool) -> None:
        """Take tools, in the order in which the policy is told of them."""
        self._tools = {tool.spec.name: tool for tool in tools}

    @property
    def specs(self) -> Sequence[ToolSpec]:
        """The tools' descriptions."""
        return [tool.spec for tool in self._tools.values()]

    async def call(self, calls: Sequence[ToolCall]) -> tuple[list[Message], list[ToolOutcome]]:
        """Answer calls one after the other: a message each, and how each ended."""
        messages, outcomes = [], []
        for call in calls:
            observation = await self._call(call)
            name = call.name if call.name in self._tools else UNKNOWN_TOOL
            messages.append(Message(role="tool", content=shorten(observation.text)))
            outcomes.append(count(name, observation.outcome))
        return messages, outcomes

    async def _call(self, call: ToolCall) -> Observation:
        try:
            check_call(call, {name: tool.spec for name, tool in self._tools.items()})
            return await self._tools[call.name].call(**call.arguments)
        except ValueError as error:
            return Observation(text=str(error), outcome=Outcome.ERROR)


def count(name: str, outcome: Outcome) -> ToolOutcome:
    """A call's outcome as the server counts it."""
    limit = "" if outcome in (Outcome.OK, Outcome.ERROR) else outcome.value
    return ToolOutcome(name=name, ok=outcome is Outcome.OK, limit=limit)


def shorten(text: str) -> str:
    """Text of at most about MAX_CHARS: the middle of a longer one is left out, and said to be."""
    if len(text) <= MAX_CHARS:
        return text
    half = MAX_CHARS // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
