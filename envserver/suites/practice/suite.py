"""PracticeSuite and its Environment: tools until the policy answers, then GAIA's scoring."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

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
from envserver.suites.gaia_scoring import is_correct
from envserver.suites.practice.domain import Domain
from envserver.suites.practice.people import PEOPLE
from envserver.suites.practice.tasks import LEVELS, Task, digest_of, make_task
from envserver.suites.practice.tools import TaskTools, Toolbox
from understudy.evaluation import final_answer

MAX_TOOL_TURNS = 12
SYSTEM_PROMPT = "Use the tools, then reply with the bare answer."


class DomainSuite(Suite):
    """Tasks of one domain; what differs between domains is named by its subclasses."""

    domain: Domain
    prompt: str
    blocking = False

    def describe(self) -> SuiteDescription:
        """The suite's splits, levels and digest."""
        return SuiteDescription(
            name=self.domain.name,
            splits=dict(self.domain.splits),
            levels=LEVELS,
            digest=self._digest,
            metadata={"max_tool_turns": str(MAX_TOOL_TURNS)},
        )

    def open(self, split: str, task_ordinal: int) -> "PracticeEnvironment":
        """Make the environment of one task."""
        task = make_task(split, task_ordinal, self.domain)
        tools = self.make_tools(task)
        return PracticeEnvironment(task, tools, self.prompt, task.tool_names(self.domain))

    @abstractmethod
    def make_tools(self, task: Task) -> TaskTools:
        """The tools of one episode."""

    @cached_property
    def _digest(self) -> str:
        return digest_of(self.domain)


class PracticeSuite(DomainSuite):
    """Look-up, search, spreadsheet and arithmetic tasks over worlds that are new in each task."""

    name = PEOPLE.name
    domain = PEOPLE
    prompt = SYSTEM_PROMPT

    def make_tools(self, task: Task) -> Toolbox:
        """Over the task's world."""
        return Toolbox(task.world, task.attachment)


class PracticeEnvironment(Environment):
    """One episode: each turn calls tools, and the first turn without a call is the answer."""

    def __init__(self, task: Task, tools: TaskTools, prompt: str, tags: Sequence[str]) -> None:
        self.task = task
        self._tools = tools
        self._prompt = prompt
        self._tags = tags
        self._num_tool_turns = 0

    def reset(self) -> Reset:
        """The system prompt and the question, which names the attachment if there is one."""
        return Reset(
            task_id=self.task.task_id,
            level=self.task.level,
            messages=[
                Message(role="system", content=self._prompt),
                user_message(self.task.question),
            ],
            tools=self._tools.specs,
            tags=self._tags,
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
        results = [self._tools.call(call) for call in action.tool_calls]
        return Step(
            messages=[Message(role="tool", content=observation) for observation, _ in results],
            tool_outcomes=[outcome for _, outcome in results],
        )

    def close(self) -> None:
        """Free the episode's tables."""
        self._tools.close()
