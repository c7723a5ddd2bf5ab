"""What is to be done about the calls of one reply, and what came of them so far."""

from collections.abc import Sequence
from typing import Any

from understudy.chat import Call
from understudy.config import AgentConfig
from understudy.config.agents import HAND_OFF

Message = dict[str, Any]


class Plan:
    """Calls of one reply: the environment's are made first and at one time, agents' after them.

    Args:
        calls: in the reply's order, which their results get too.
        config: of the part that made them.
        tools: the environment's that the part may use.
    """

    def __init__(self, calls: Sequence[Call], config: AgentConfig, tools: Sequence[str]) -> None:
        self._calls = calls
        self._results: list[list[Message] | None] = [None] * len(calls)
        self._for_environment: list[int] = []
        self._agents = config.sub_agents
        for index, call in enumerate(calls):
            if call.name in tools:
                self._for_environment.append(index)
            elif call.name.startswith(HAND_OFF) and call.name[len(HAND_OFF) :] in config.hand_off:
                self._refuse(index, "handing the conversation over goes alone, without other calls")
            elif call.name not in config.sub_agents:
                others = [*config.sub_agents, *(f"{HAND_OFF}{name}" for name in config.hand_off)]
                known = ", ".join([*tools, *others]) or "none"
                self._refuse(index, f"there is no tool {call.name!r}; there are: {known}")
            elif not isinstance(call.arguments.get("request"), str):
                self._refuse(index, f"{call.name}: 'request' is missing, or no text")

    @property
    def for_environment(self) -> tuple[Call, ...]:
        """Calls that the environment has to answer."""
        return tuple(self._calls[index] for index in self._for_environment)

    def next_agent(self) -> tuple[int, Call] | None:
        """The next call of an agent that has no result, and its index in the reply."""
        for index, call in enumerate(self._calls):
            if self._results[index] is None and call.name in self._agents:
                return index, call
        return None

    def answer_environment(self, messages: Sequence[Message]) -> None:
        """Take the environment's answers: one a call, or all for the first of its calls.

        Results go by their order: where others stand beside them, every call gets exactly one.
        """
        places = self._for_environment
        is_mixed = len(places) < len(self._calls)
        if is_mixed and [message["role"] for message in messages] != ["tool"] * len(places):
            content = "\n\n".join(message["content"] for message in messages)
            rest = ["Answered with the first call."] * (len(places) - 1)
            messages = [{"role": "tool", "content": text} for text in (content, *rest)]
        for number, index in enumerate(places):
            if len(messages) == len(places):
                self._results[index] = [messages[number]]
            else:
                self._results[index] = list(messages) if not number else []

    def answer_agent(self, text: str) -> None:
        """Take what the agent said that was called last."""
        called = self.next_agent()
        assert called
        self._results[called[0]] = [{"role": "tool", "content": text}]

    def results(self) -> list[Message]:
        """All results, in the order of the calls."""
        return [message for result in self._results for message in result or []]

    def _refuse(self, index: int, why: str) -> None:
        self._results[index] = [{"role": "tool", "content": f"Error: {why}."}]


def hand_off_of(calls: Sequence[Call], config: AgentConfig) -> str | None:
    """The agent that a reply hands the conversation to, if that is all that it does."""
    if len(calls) != 1 or not calls[0].name.startswith(HAND_OFF):
        return None
    name = calls[0].name[len(HAND_OFF) :]
    return name if name in config.hand_off else None
