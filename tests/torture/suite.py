"""The system's suite: a few tool calls that take a while, then a reward by chance."""

import asyncio
import random

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


class CoinEnvironment(AsyncEnvironment):
    """Any answer ends the episode; a coin decides about its reward."""

    async def reset(self) -> Reset:
        question = user_message("How many people live in the town where the founder was born?")
        return Reset(task_id="coin", level=1, messages=[question], tools=[_TOOL])

    async def step(self, action: Action) -> Step:
        if not action.tool_calls:
            return Step(reward=float(random.randrange(2)), terminated=True)
        await asyncio.sleep(TOOL_SECONDS)
        found = Message(role="tool", content="founder of Acme: Mara Lind")
        return Step(messages=[found], tool_outcomes=[ToolOutcome(name="lookup", ok=True)])


class CoinSuite(Suite):
    """As many tasks as anybody wants."""

    name = "coin"
    blocking = False

    def describe(self) -> SuiteDescription:
        return SuiteDescription(
            name=self.name, splits={"train": 10**9}, levels=(1,), digest="coin-1"
        )

    def open(self, split: str, task_ordinal: int) -> Environment | AsyncEnvironment:
        return CoinEnvironment()
