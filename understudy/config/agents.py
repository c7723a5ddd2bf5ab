"""[agents.NAME], [policies.NAME]: agents of several parts, and policies other than the run's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from understudy.config.base import Section
from understudy.config.shared import Address

PartName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
SUMMARY_TOKENS = 64
"""Room that is kept for the request of a summary, beside that for the summary itself."""
HAND_OFF = "hand_off_to_"
"""What the name of the tool begins with that hands the conversation to an agent."""


class AgentConfig(Section):
    """[agents.NAME]: one part of an agent, which others may call as a tool. See docs/agents.md."""

    description: str = ""
    """What the part is for, as those read it that may call it."""
    system: str = ""
    """System prompt, in the place of the environment's; empty: the environment's, if there is one,
    and none for a sub-agent."""
    tools: tuple[str, ...] | None = None
    """Tools of the environment that the part may use; not set: all of them."""
    sub_agents: tuple[PartName, ...] = ()
    """Agents that it may call as tools, each with one argument, `request`."""
    hand_off: tuple[PartName, ...] = ()
    """Agents that it may hand the conversation to."""
    max_turns: PositiveInt | None = None
    """Replies of one call of the part; the lease's limit holds for all parts together."""
    trainable: bool = True
    """Whether it learns. Segments of a part that does not are kept and not trained on."""
    policy: str = ""
    """Name of another policy under [policies], for a part that does not learn; empty: the run's."""
    context: Literal["stop", "summarise"] = "stop"
    """What happens when the conversation comes near max_tokens: the part is cut short, or is asked
    for a summary and goes on from that in a new segment."""
    max_observation_characters: PositiveInt | None = None
    """Results of tools that are longer lose their middle; not set: none do."""


class PolicyConfig(Section):
    """[policies.NAME]: inference servers of another model, for parts that do not learn."""

    inference: Annotated[tuple[Address, ...], Field(min_length=1)]
    """Addresses."""
    model: Path
    """Folder with the tokenizer and the chat template of their model."""
    tools: Literal["schemas", "signatures"] = "schemas"
    """How prompts list tools, as in [model]."""


def check_agents(
    agents: Mapping[str, AgentConfig], policies: Mapping[str, PolicyConfig], root: str
) -> str:
    """What keeps an agent from being played, and the remedy; empty if nothing does."""
    if root not in agents:
        known = ", ".join(sorted(agents)) or "none"
        return f"actor.agent = '{root}' is not under [agents]; there are: {known}"
    reached = _reached(agents, root)
    for name in reached:
        where = f"agents.{name}"
        agent = agents.get(name)
        if agent is None:
            return f"{where} is called and not defined; define it"
        if agent.policy and agent.policy not in policies:
            return f"{where}.policy = '{agent.policy}' is not under [policies]; define it there"
        if agent.policy and agent.trainable:
            return f"{where}.policy = '{agent.policy}' cannot learn; set trainable = false"
        if name.startswith(HAND_OFF):
            return f"{where}: a name that begins with '{HAND_OFF}' is kept for tools; rename it"
        called = [*agent.sub_agents, *agent.hand_off]
        if doubled := {other for other in called if called.count(other) > 1}:
            return f"{where}: {', '.join(sorted(doubled))} twice in sub_agents and hand_off"
        if name in agent.hand_off:
            return f"{where}.hand_off names the agent itself; leave it out"
        if name in _reached(agents, *agent.sub_agents):
            return f"{where}.sub_agents leads back to {name}; break the circle"
    if unused := sorted(agents.keys() - set(reached)):
        return f"agents.{unused[0]} is never called by '{root}' or its agents; leave it out"
    if idle := sorted(policies.keys() - {agents[name].policy for name in reached}):
        return f"policies.{idle[0]} is the policy of no agent; leave it out"
    if not any(agents[name].trainable for name in reached):
        return f"no part of actor.agent = '{root}' learns; set trainable = true for one"
    return ""


def check_summaries(agents: Mapping[str, AgentConfig], max_tokens: int, reply: int) -> str:
    """What keeps parts from going on from summaries; empty if nothing does.

    Args:
        agents: definitions by name.
        max_tokens: of a segment.
        reply: most tokens of a reply.
    """
    some = sorted(name for name, agent in agents.items() if agent.context == "summarise")
    if some and max_tokens <= 2 * reply + SUMMARY_TOKENS:
        return (
            f"agents.{some[0]}.context = 'summarise' keeps room for a reply and a summary, and "
            f"learner.tasks.max_tokens = {max_tokens} has none beside two of max_new_tokens = "
            f"{reply}; raise the one or lower the other"
        )
    return ""


def _reached(agents: Mapping[str, AgentConfig], *names: str) -> list[str]:
    """These agents and all that they lead to, defined or not."""
    found = list(names)
    for name in found:
        if agent := agents.get(name):
            following = (*agent.sub_agents, *agent.hand_off)
            found += [other for other in following if other not in found]
    return found
