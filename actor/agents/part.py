"""One part at work: its own conversation with its policy, in one segment or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actor.policy import CutShortError, Policy, Said, Speaker
from actor.tokens import turn_seed
from understudy.client import Lease, Opening
from understudy.config import AgentConfig
from understudy.config.agents import HAND_OFF, SUMMARY_TOKENS
from understudy.errors import ConfigError
from understudy.trajectory import PartCall
from understudy.v1 import common_pb2

_PART_STRIDE = 1 << 20
"""Turns between the seeds of two parts."""
_SUMMARY_STRIDE = 1 << 16
"""Turns between the seeds of a part's conversation and of that which goes on from a summary."""
MAX_SUMMARIES = 8
"""Of one call of a part; a conversation that needs more goes nowhere."""
SUMMARISE = (
    "The conversation is about to exceed its limit. Write down everything that is needed to go on "
    "without it: what was asked, what is known, what is left to do."
)
GO_ON = "What was written down of the conversation so far:\n\n"
RESULTS = "\n\nThe latest results:\n\n"

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a reply is: segment `index` of a speaker's own."""

    part: "Part"
    speaker: Speaker
    index: int


class Part:
    """One call of an agent's part.

    Args:
        name: of the definition.
        config: the definition.
        policy: who replies.
        lease: with limits and seed of this call.
        opening: the task's messages and tools as this part gets them.
        caller: where it was called; None for the part that begins.
    """

    def __init__(
        self,
        name: str,
        config: AgentConfig,
        policy: Policy[Speaker],
        lease: Lease,
        opening: Opening,
        caller: PartCall | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.caller = caller
        self._policy = policy
        self._lease = lease
        self._opening = opening
        self._speaker = policy.begin(lease, opening)
        self._begun = False
        self._num_replies = self._num_summaries = 0

    @property
    def speaker(self) -> Speaker:
        """Whose conversation the last reply is in."""
        return self._speaker

    async def reply(self, messages: Sequence[Message]) -> Said:
        """Reply to what was said last; the first time, the task's opening comes before it.

        Raises:
            CutShortError: the part is at one of its limits.
            InferenceFailedError: nobody answered.
        """
        if self._num_replies == self.config.max_turns:
            raise CutShortError(f"agents.{self.name}.max_turns = {self.config.max_turns}")
        self._num_replies += 1
        heard = self._heard(messages)
        said = await self._speaker.reply(heard)
        self._begun = True
        return replace(said, heard=tuple(heard))

    def needs_summary(self, messages: Sequence[Message]) -> bool:
        """Whether a reply to these would leave no room for a summary after it."""
        if self.config.context != "summarise" or not self._begun:
            return False
        if self._num_replies == self.config.max_turns:  # nothing would come after it
            return False
        room = self._speaker.room(self._heard(messages))
        needed = 2 * self._lease.sampling.max_new_tokens + SUMMARY_TOKENS
        return room is not None and room < needed and self._num_summaries < MAX_SUMMARIES

    async def summarise(self) -> Said:
        """Have the policy write down what it knows, at the end of its segment. Raises as reply."""
        self._num_summaries += 1
        heard = {"role": "user", "content": SUMMARISE}
        return replace(await self._speaker.reply([heard]), heard=(heard,))

    def go_on(self, summary: Said, messages: Sequence[Message]) -> list[Message]:
        """Begin a new conversation with a summary of the last; returns what is said in it next."""
        lease = seeded(self._lease, self._num_summaries * _SUMMARY_STRIDE)
        self._speaker = self._policy.begin(lease, self._opening)
        self._begun = False
        # Where nothing stands outside of calls and thoughts, those are all that is left.
        written = summary.reply.text or summary.message["content"]
        results = "\n\n".join(message["content"] for message in self._shortened(messages))
        content = GO_ON + written + (RESULTS + results if results else "")
        return [{"role": "user", "content": content}]

    def _heard(self, messages: Sequence[Message]) -> list[Message]:
        opening = [] if self._begun else self._opening.messages
        return [*opening, *self._shortened(messages)]

    def _shortened(self, messages: Sequence[Message]) -> list[Message]:
        limit = self.config.max_observation_characters
        return [
            {**message, "content": shorten(message["content"], limit)}
            if limit and message["role"] == "tool"
            else message
            for message in messages
        ]


def shorten(text: str, limit: int) -> str:
    """Head and tail of a text that is longer than `limit` characters, round a marker."""
    if len(text) <= limit:
        return text
    head = (limit + 1) // 2
    tail = text[len(text) - limit // 2 :]
    return f"{text[:head]}\n[{len(text) - limit} characters left out]\n{tail}"


def lease_of(config: AgentConfig, lease: Lease, number: int) -> Lease:
    """An episode's lease for its part `number`: seeds of its own, and no versions of the run's
    where another policy speaks."""
    lease = seeded(lease, number * _PART_STRIDE)
    return replace(lease, min_version=0, max_version=0) if config.policy else lease


def seeded(lease: Lease, num_turns: int) -> Lease:
    """The lease with the seed that comes so many turns later, if it has one."""
    sampling = common_pb2.SamplingParameters()
    sampling.CopyFrom(lease.sampling)
    if sampling.HasField("seed"):
        sampling.seed = turn_seed(sampling.seed, num_turns)
    return replace(lease, sampling=sampling)


def opening_for(
    name: str,
    config: AgentConfig,
    task: Opening,
    agents: Mapping[str, AgentConfig],
    request: str | None,
) -> Opening:
    """The task as a part gets it.

    Args:
        name: of the part.
        config: of the part.
        task: as the environment opened it.
        agents: all definitions.
        request: what a part that is called as a tool is to do; it sees that and not the task. None
            for a part that has the conversation.

    Raises:
        ConfigError: a tool that the environment lacks, or one that has an agent's name.
    """
    messages = [m for m in task.messages if not (config.system and m["role"] == "system")]
    if request is not None:
        messages = [{"role": "user", "content": request}]
    if config.system:
        messages = [{"role": "system", "content": config.system}, *messages]
    return replace(task, messages=messages, tools=_tools(name, config, task, agents))


def _tools(
    part: str, config: AgentConfig, task: Opening, agents: Mapping[str, AgentConfig]
) -> list[dict[str, Any]]:
    known = {tool["name"]: tool for tool in task.tools}
    wanted = tuple(known) if config.tools is None else config.tools
    if lacking := [name for name in wanted if name not in known]:
        raise ConfigError(
            f"agents.{part}.tools: '{lacking[0]}' is no tool of task {task.task_id}; there are: "
            f"{', '.join(known) or 'none'}"
        )
    called = {name: agents[name].description for name in config.sub_agents}
    called |= {f"{HAND_OFF}{name}": agents[name].description for name in config.hand_off}
    if both := sorted(known.keys() & called.keys()):
        raise ConfigError(
            f"agents.{part}: '{both[0]}' is an agent's name and a tool's of task {task.task_id}; "
            "rename the agent"
        )
    return [known[name] for name in wanted] + [
        {"name": name, "description": description, "parameters": _REQUEST}
        for name, description in called.items()
    ]


_REQUEST = {
    "type": "object",
    "properties": {"request": {"type": "string", "description": "What to do, in full."}},
    "required": ["request"],
}
