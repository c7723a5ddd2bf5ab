"""The rollout benchmark's suite: every tool call takes a set time, any answer is right."""

import asyncio

from envserver.environment import (
    Action,
    AsyncEnvironment,
    Environment,
    Message,
    Reset,
    Step,
    Suite,
    SuiteDescription,
    ToolOutcome,
    ToolSpec,
    user_message,
)

TOOL_SECONDS = 0.05
_TOOL = ToolSpec(
    name="lookup",
    description="Look up a field of an entity.",
    parameters={
        "type": "object",
        "properties": {"entity": {"type": "string"}, "field": {"type": "string"}},
        "required": ["entity", "field"],
    },
)
_QUESTION = user_message("How many people live in the town where the founder of Acme was born?")
_OBSERVATION = Message(role="tool", content="founder of Acme: Mara Lind")


class SlowToolEnvironment(AsyncEnvironment):
    """Tool calls wait; a final text ends the episode with reward 1."""

    async def reset(self) -> Reset:
        return Reset(task_id="slow-tool", level=1, messages=[_QUESTION], tools=[_TOOL])

    async def step(self, action: Action) -> Step:
        if not action.tool_calls:
            return Step(reward=1.0, terminated=True)
        await asyncio.sleep(TOOL_SECONDS)
        return Step(messages=[_OBSERVATION], tool_outcomes=[ToolOutcome(name="lookup", ok=True)])


class SlowToolSuite(Suite):
    """As many tasks as anybody wants."""

    name = "slow-tool"
    blocking = False

    def describe(self) -> SuiteDescription:
        return SuiteDescription(
            name=self.name, splits={"train": 10**9}, levels=(1,), digest="slow-tool-1"
        )

    def open(self, split: str, task_ordinal: int) -> Environment | AsyncEnvironment:
        return SlowToolEnvironment()
