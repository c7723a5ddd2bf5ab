"""The environment server benchmark's suite: a step says back what it was told."""

from envserver.environment import (
    Action,
    Environment,
    Message,
    Reset,
    Step,
    Suite,
    SuiteDescription,
    ToolSpec,
    user_message,
)

_TOOL = ToolSpec(
    name="act",
    description="Say something.",
    parameters={"type": "object", "properties": {"text": {"type": "string"}}},
)


class TrivialEnvironment(Environment):
    """Never ends."""

    def reset(self) -> Reset:
        return Reset(task_id="trivial", level=1, messages=[user_message("Speak.")], tools=[_TOOL])

    def step(self, action: Action) -> Step:
        (call,) = action.tool_calls
        return Step(messages=[Message(role="tool", content=str(call.arguments["text"]))])


class TrivialSuite(Suite):
    """One task, played on the event loop."""

    name = "trivial"
    blocking = False

    def describe(self) -> SuiteDescription:
        return SuiteDescription(name=self.name, splits={"train": 1}, levels=(1,), digest="1")

    def open(self, split: str, task_ordinal: int) -> Environment:
        return TrivialEnvironment()


class ThreadedTrivialSuite(TrivialSuite):
    """The same, as an environment that may block."""

    blocking = True
