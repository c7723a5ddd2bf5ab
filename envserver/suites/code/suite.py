"""CodeSuite and its Environment: try code with `python`, then answer with a function."""

from envserver.environment import (
    Action,
    AsyncEnvironment,
    Message,
    Reset,
    Step,
    Suite,
    SuiteDescription,
    user_message,
)
from envserver.sandbox import Pool, Workspace
from envserver.suites.code.grading import grade
from envserver.suites.code.tasks import LEVELS, SPLITS, Task, digest, make_task
from envserver.tools import PythonTool, Toolbox
from envserver.tools.tool import count

MAX_TOOL_TURNS = 8
SYSTEM_PROMPT = (
    "You can try code with the tool. Then reply with the whole function in one ```python block."
)
TESTS = "tests"
"""Name under which runs of hidden tests are counted."""


class CodeSuite(Suite):
    """Functions over lists, put together from steps at random, and graded by hidden tests."""

    name = "code"
    blocking = False
    needs_sandbox = True

    def describe(self) -> SuiteDescription:
        """The suite's splits, levels and digest."""
        return SuiteDescription(
            name=self.name,
            splits=dict(SPLITS),
            levels=LEVELS,
            digest=digest(),
            metadata={"max_tool_turns": str(MAX_TOOL_TURNS)},
        )

    def open(self, split: str, task_ordinal: int) -> "CodeEnvironment":
        """Make the environment of one task."""
        return CodeEnvironment(make_task(split, task_ordinal), self.sandbox)


class CodeEnvironment(AsyncEnvironment):
    """One episode: turns with calls of `python`, then the answer."""

    def __init__(self, task: Task, pool: Pool) -> None:
        self.task = task
        self._pool = pool
        self._workspace = Workspace(pool)
        self._tools = Toolbox(PythonTool(self._workspace))
        self._num_tool_turns = 0

    async def reset(self) -> Reset:
        """The system prompt, and the task with two examples."""
        return Reset(
            task_id=self.task.task_id,
            level=self.task.level,
            messages=[
                Message(role="system", content=SYSTEM_PROMPT),
                user_message(self.task.prompt),
            ],
            tools=self._tools.specs,
        )

    async def step(self, action: Action) -> Step:
        """Run the calls, or grade the answer: reward 1 if it passes all hidden tests, else 0.

        The tool turn after the last allowed one is not run; it cuts the episode short.
        """
        if not action.tool_calls:
            passed, outcome = await grade(self._pool, self.task, action.text)
            return Step(
                reward=float(passed), terminated=True, tool_outcomes=[count(TESTS, outcome)]
            )
        if self._num_tool_turns == MAX_TOOL_TURNS:
            return Step(truncated=True)
        self._num_tool_turns += 1
        messages, outcomes = await self._tools.call(action.tool_calls)
        return Step(messages=messages, tool_outcomes=outcomes)

    async def close(self) -> None:
        """End the episode's box."""
        await self._workspace.close()
