"""An agent of several parts as one policy."""

import time
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from actor.agents.part import Part, Place, lease_of, opening_for
from actor.agents.plan import Plan, hand_off_of
from actor.policy import CutShortError, NoReplyError, Policy, Said, Speaker
from actor.tokens import Sampled, TokenSpeaker
from understudy import metrics
from understudy.chat import Reply
from understudy.client import Lease, Opening
from understudy.config import AgentConfig
from understudy.trajectory import PartCall, Segment

if TYPE_CHECKING:
    from actor.recording.session import RecordingSession


class AgentPolicy:
    """Plays an agent with the policies of its parts.

    Args:
        root: name of the part that begins.
        agents: definitions by name.
        policies: by name; "" is the run's own.
    """

    def __init__(
        self,
        root: str,
        agents: Mapping[str, AgentConfig],
        policies: Mapping[str, Policy[Speaker]],
    ) -> None:
        self.root = root
        self.agents = agents
        self.policies = policies

    def begin(self, lease: Lease, opening: Opening) -> "AgentSpeaker":
        """Take part in an episode. Raises ConfigError for definitions that its tools do not fit."""
        return AgentSpeaker(self, lease, opening)

    def record(self, lease: Lease) -> AbstractContextManager["RecordingSession | None"]:
        """As the run's own policy: an environment that leads the conversation has its own agent."""
        return self.policies[""].record(lease)


@dataclass
class _Frame:
    """A part that has been called, and what it waits for."""

    part: Part
    tools: tuple[str, ...]
    """The environment's, those that it may use."""
    request: str | None
    """What it was called with; None if it has the conversation."""
    plan: Plan | None = None
    turn: int = 0
    """That of its last reply."""


class AgentSpeaker(Sampled):
    """One episode of an agent: a stack of parts, of which the uppermost speaks."""

    def __init__(self, policy: AgentPolicy, lease: Lease, opening: Opening) -> None:
        self._policy = policy
        self._lease = lease
        self._opening = opening
        self._parts: list[Part] = []
        self._places: list[Place] = []
        """Segments, by their first reply."""
        self._num_replies = 0
        for name, config in policy.agents.items():  # before a word is said, not once it is called
            opening_for(name, config, opening, policy.agents, None)
        self._stack = [self._call(policy.root, None, None)]

    async def reply(self, messages: Sequence[dict[str, Any]]) -> Said:
        """Have parts speak until one wants something from the environment, or has the answer.

        Raises:
            CutShortError: the episode is at a limit; that of a part that was called as a tool ends
                its call only.
            InferenceFailedError: nobody answered.
        """
        before: list[Said] = []
        try:
            return await self._reply(list(messages), before)
        except NoReplyError as error:
            error.before = tuple(before)
            raise

    async def _reply(self, heard: list[dict[str, Any]], before: list[Said]) -> Said:
        if plan := self._stack[-1].plan:
            plan.answer_environment(heard)
        elif len(self._parts) == 1 and not self._num_replies:
            heard = []  # the opening, which the part has already
        while True:
            frame = self._stack[-1]
            if frame.plan and (called := frame.plan.next_agent()):
                index, call = called
                caller = PartCall(turn=frame.turn, tool_call=index)
                self._stack.append(self._call(call.name, call.arguments["request"], caller))
                heard = []
                continue
            if frame.plan:
                heard, frame.plan = frame.plan.results(), None
            try:
                said = await self._say(frame, heard, before)
            except CutShortError as error:
                if len(self._stack) == 1 or not self._turns_left:
                    raise
                self._return(f"The agent was cut short: {error}.")
                continue
            frame.turn = self._num_replies - 1
            if self._is_for_environment(frame, said):
                return self._to_environment(frame, said, before)
            before.append(said)
            heard = self._go_on(frame, said)

    async def _say(self, frame: _Frame, heard: list[dict[str, Any]], before: list[Said]) -> Said:
        if not self._turns_left:
            raise CutShortError(f"max_turns = {self._lease.max_turns}")
        part = frame.part
        if self._turns_left > 1 and part.needs_summary(heard):
            before.append(await self._placed(part, part.summarise()))
            heard = part.go_on(before[-1], heard)
        return await self._placed(part, part.reply(heard))

    @property
    def _turns_left(self) -> int:
        return max(self._lease.max_turns - self._num_replies, 0)

    async def _placed(self, part: Part, reply: Awaitable[Said]) -> Said:
        """A reply with its segment counted among all of the agent's, and the time that it took."""
        start = time.monotonic()
        said = await reply
        self._num_replies += 1
        place = Place(part=part, speaker=part.speaker, index=said.segment)
        if place not in self._places:
            self._places.append(place)
        *heard, message = ({**m, "name": part.name} for m in (*said.heard, said.message))
        return replace(
            said,
            segment=self._places.index(place),
            message=message,
            heard=tuple(heard),
            seconds=time.monotonic() - start,
        )

    def _is_for_environment(self, frame: _Frame, said: Said) -> bool:
        """Whether the episode's loop has to do something about a reply; plans what is to be done
        about its calls."""
        is_root = len(self._stack) == 1
        if said.cut_off or said.reply.malformed:
            return is_root
        if not said.reply.calls:
            return is_root
        if hand_off_of(said.reply.calls, frame.part.config):
            return False
        frame.plan = Plan(said.reply.calls, frame.part.config, frame.tools)
        return bool(frame.plan.for_environment)

    def _to_environment(self, frame: _Frame, said: Said, before: list[Said]) -> Said:
        reply = said.reply
        if frame.plan:  # text beside the calls is the environment's to hear from the root only
            text = reply.text if len(self._stack) == 1 else ""
            reply = Reply(text=text, calls=frame.plan.for_environment)
        return replace(said, reply=reply, before=tuple(before))

    def _go_on(self, frame: _Frame, said: Said) -> list[dict[str, Any]]:
        """What the uppermost part hears after a reply that stays among the parts."""
        reply = said.reply
        if frame.plan:
            return []
        if name := hand_off_of(reply.calls, frame.part.config):
            request = reply.calls[0].arguments.get("request")
            caller = PartCall(turn=frame.turn, tool_call=0)
            self._stack[-1] = self._call(name, frame.request, caller)
            return [{"role": "user", "content": request}] if isinstance(request, str) else []
        if said.cut_off:
            self._return("The agent was cut short: a reply was cut off at its token limit.")
        elif reply.malformed:
            metrics.MALFORMED_CALLS.inc()
            return [{"role": "tool", "content": f"Malformed call: {reply.malformed}."}]
        else:
            self._return(reply.text)
        return []

    def _return(self, text: str) -> None:
        """End the uppermost part's call with what its caller hears of it."""
        self._stack.pop()
        plan = self._stack[-1].plan
        assert plan
        plan.answer_agent(text)

    def _call(self, name: str, request: str | None, caller: PartCall | None) -> _Frame:
        config = self._policy.agents[name]
        opening = opening_for(name, config, self._opening, self._policy.agents, request)
        policy = self._policy.policies[config.policy]
        lease = lease_of(config, self._lease, len(self._parts))
        part = Part(name, config, policy, lease, opening, caller)
        self._parts.append(part)
        known = {tool["name"] for tool in self._opening.tools}
        tools = tuple(tool["name"] for tool in opening.tools if tool["name"] in known)
        return _Frame(part=part, tools=tools, request=request)

    def room(self, messages: Sequence[dict[str, Any]]) -> int | None:
        """Not known: parts have room each."""
        return None

    def segments(self) -> tuple[Segment, ...]:
        """The segments of all parts, under their names."""
        return tuple(
            replace(
                place.speaker.segments()[place.index],
                part=place.part.name,
                frozen=not place.part.config.trainable,
                caller=place.part.caller,
            )
            for place in self._places
            if isinstance(place.speaker, TokenSpeaker)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts."""
        return sum(speaker.num_tokens for speaker in self._speakers())

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens that their policies sampled."""
        return sum(speaker.num_sampled_tokens for speaker in self._speakers())

    @property
    def versions(self) -> frozenset[int]:
        """Versions of the run's policy that sampled a token."""
        own = (p.speaker.versions for p in self._places if not p.part.config.policy)
        return frozenset[int]().union(*own)

    def _speakers(self) -> list[Speaker]:
        return list(dict.fromkeys(place.speaker for place in self._places))
