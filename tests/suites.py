"""Suites for tests: one that echoes, one that misbehaves on demand."""

import asyncio
import random
import time
import zlib

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
from understudy.config.base import Section

TOOL = ToolSpec(
    name="echo",
    description="Says it back.",
    parameters={"type": "object", "properties": {"text": {"type": "string"}}},
)


class EchoEnvironment(Environment):
    """Echoes calls; the right answer is the task's ordinal."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal

    def reset(self) -> Reset:
        question = user_message(f"Say {self.ordinal}.")
        return Reset(task_id=f"echo-{self.ordinal}", level=1, messages=[question], tools=[TOOL])

    def step(self, action: Action) -> Step:
        if action.tool_calls:
            texts = [str(call.arguments.get("text", "")) for call in action.tool_calls]
            return Step(
                messages=[Message(role="tool", content=text) for text in texts],
                tool_outcomes=[ToolOutcome(name="echo", ok=True) for _ in texts],
            )
        return Step(reward=float(action.text == str(self.ordinal)), terminated=True)


class EchoSuite(Suite):
    """100 train tasks."""

    name = "echo"

    def describe(self) -> SuiteDescription:
        return SuiteDescription(name="echo", splits={"train": 100}, levels=(1,), digest="1")

    def open(self, split: str, task_ordinal: int) -> Environment | AsyncEnvironment:
        if split != "train" or task_ordinal >= 100:
            raise KeyError(f"{split}/{task_ordinal}")
        return EchoEnvironment(task_ordinal)


class SizedOptions(Section):
    """Options of SizedSuite."""

    num_tasks: int


class SizedSuite(EchoSuite):
    """The echo suite with as many tasks as its options say."""

    Options = SizedOptions

    def __init__(self, name: str, options: SizedOptions) -> None:
        if options.num_tasks == 13:
            raise ValueError("13 tasks bring bad luck")
        self.name = name
        self.options = options

    def describe(self) -> SuiteDescription:
        splits = {"train": self.options.num_tasks}
        return SuiteDescription(name=self.name, splits=splits, levels=(1,), digest="1")


class FaultyEnvironment(EchoEnvironment):
    """The text of a step says what goes wrong."""

    closed = 0

    def step(self, action: Action) -> Step:
        match action.text:
            case "raise":
                raise RuntimeError("secret detail")
            case "hang":
                time.sleep(3)
            case "truncate":
                return Step(truncated=True)
            case "infinite":
                return Step(reward=float("inf"))
            case "long":
                return Step(messages=[Message(role="tool", content="x" * 500_000)])
            case "longer":
                return Step(messages=[Message(role="tool", content="x" * 2_000_000)])
        return super().step(action)

    def close(self) -> None:
        FaultyEnvironment.closed += 1


class FaultySuite(EchoSuite):
    """The echo suite with faults."""

    name = "faulty"

    def open(self, split: str, task_ordinal: int) -> Environment | AsyncEnvironment:
        return FaultyEnvironment(task_ordinal)


class WaitingEnvironment(AsyncEnvironment):
    """A coroutine environment: each step waits a little."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def reset(self) -> Reset:
        return Reset(task_id="wait", level=1, messages=[user_message("Wait.")])

    async def step(self, action: Action) -> Step:
        await asyncio.sleep(self.seconds)
        return Step(reward=1.0, terminated=True)


class WaitingSuite(EchoSuite):
    """Task n waits n hundredths of a second a step."""

    name = "waiting"

    def open(self, split: str, task_ordinal: int) -> Environment | AsyncEnvironment:
        return WaitingEnvironment(task_ordinal / 100)


class ChattyEnvironment(AsyncEnvironment):
    """Talks on for three turns, at a speed of its own; the reward is of what was said."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.num_steps = 0

    async def reset(self) -> Reset:
        question = user_message(f"Say {self.ordinal}.")
        return Reset(task_id=f"chatty-{self.ordinal}", level=1, messages=[question])

    async def step(self, action: Action) -> Step:
        await asyncio.sleep(0.1 * random.random())
        self.num_steps += 1
        reward = zlib.crc32(action.text.encode()) % 8 / 32
        if self.num_steps == 3:
            return Step(reward=reward, terminated=True)
        return Step(reward=reward, messages=[user_message(f"{reward} and?")])


class ChattySuite(EchoSuite):
    """What a task answers is fixed; when, is not."""

    name = "chatty"

    def describe(self) -> SuiteDescription:
        return SuiteDescription(name="chatty", splits={"train": 100}, levels=(1,), digest="1")

    def open(self, split: str, task_ordinal: int) -> Environment | AsyncEnvironment:
        return ChattyEnvironment(task_ordinal)


class MoodyEnvironment(ChattyEnvironment):
    """Fails now and then, unlike each time."""

    async def step(self, action: Action) -> Step:
        if random.random() < 0.1:
            raise RuntimeError("not in the mood")
        return await super().step(action)


class MoodySuite(ChattySuite):
    """The chatty suite, whose episodes take several attempts."""

    def open(self, split: str, task_ordinal: int) -> Environment | AsyncEnvironment:
        return MoodyEnvironment(task_ordinal)
