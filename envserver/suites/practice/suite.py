"""PracticeSuite and its Environment: tools until the policy answers, then GAIA's scoring."""

from envserver.environment import (
    Action,
    Environment,
    Message,
    Reset,
    Step,
    Suite,
    SuiteDescription,
    user_message,
)
from envserver.suites.gaia_scoring import final_answer, is_correct
from envserver.suites.practice.tasks import LEVELS, SPLITS, Task, digest, make_task
from envserver.suites.practice.tools import TOOLS, Toolbox

MAX_TOOL_TURNS = 12
SYSTEM_PROMPT = "Use the tools, then reply with the bare answer."


class PracticeSuite(Suite):
    """Look-up, search, spreadsheet and arithmetic tasks over worlds that are new in each task."""

    name = "practice"
    blocking = False

    def describe(self) -> SuiteDescription:
        """The suite's splits, levels and digest."""
        return SuiteDescription(
            name=self.name,
            splits=dict(SPLITS),
            levels=LEVELS,
            digest=digest(),
            metadata={"max_tool_turns": str(MAX_TOOL_TURNS)},
        )

    def open(self, split: str, task_ordinal: int) -> "PracticeEnvironment":
        """Make the environment of one task."""
        return PracticeEnvironment(make_task(split, task_ordinal))


class PracticeEnvironment(Environment):
    """One episode: each turn calls tools, and the first turn without a call is the answer."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._toolbox = Toolbox(task.world, task.attachment)
        self._num_tool_turns = 0

    def reset(self) -> Reset:
        """The system prompt and the question, which names the attachment if there is one."""
        return Reset(
            task_id=self.task.task_id,
            level=self.task.level,
            messages=[
                Message(role="system", content=SYSTEM_PROMPT),
                user_message(self.task.question),
            ],
            tools=TOOLS,
        )

    def step(self, action: Action) -> Step:
        """Run the calls, or grade the answer: reward 1 if it is correct, else 0.

        The tool turn after the last allowed one is not run; it cuts the episode short.
        """
        if not action.tool_calls:
            correct = is_correct(final_answer(action.text), self.task.answer)
            return Step(reward=float(correct), terminated=True)
        if self._num_tool_turns == MAX_TOOL_TURNS:
            return Step(truncated=True)
        self._num_tool_turns += 1
        results = [self._toolbox.call(call) for call in action.tool_calls]
        return Step(
            messages=[Message(role="tool", content=observation) for observation, _ in results],
            tool_outcomes=[outcome for _, outcome in results],
        )

    def close(self) -> None:
        """Free the episode's tables."""
        self._toolbox.close()
