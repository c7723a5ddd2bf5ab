"""What an environment author implements: a Suite of tasks and one Environment per episode.

Environment is a plain synchronous class: the server runs its calls in a worker thread, so a
blocking tool harms nobody. AsyncEnvironment has the same methods as coroutines, run on the event
loop, for tools that wait for others. A suite is registered under the entry-point group
`understudy.suites`, or named as `module:Class` in the environment server's config.

    class Echo(Suite):
        name = "echo"

        def describe(self) -> SuiteDescription:
            return SuiteDescription(name="echo", splits={"train": 100}, levels=(1,), digest="1")

        def open(self, split: str, task_ordinal: int) -> Environment:
            return EchoEnvironment(f"word-{task_ordinal}")

    class EchoEnvironment(Environment):
        def __init__(self, word: str) -> None:
            self.word = word

        def reset(self) -> Reset:
            return Reset(task_id=self.word, level=1, messages=[user_message(f"Say {self.word}")])

        def step(self, action: Action) -> Step:
            return Step(reward=float(action.text == self.word), terminated=True)
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from understudy.config.base import Section

if TYPE_CHECKING:
    from envserver.sandbox import Pool


@dataclass(frozen=True, kw_only=True)
class ToolSpec:
    """A tool as the policy sees it."""

    name: str
    """Name used in a call, e.g. `lookup`."""
    description: str
    """One plain-English sentence."""
    parameters: dict[str, Any]
    """JSON schema of the arguments: an object with `properties` and `required`."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One chat message, in the roles that chat templates know."""

    role: str
    """`system`, `user` or `tool`."""
    content: str


def user_message(content: str) -> Message:
    """A message in the user's role."""
    return Message(role="user", content=content)


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that the policy made, already parsed."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Action:
    """What the policy did in one turn: tool calls, or a final text if there are none."""

    tool_calls: Sequence[ToolCall] = ()
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Reset:
    """How an episode begins."""

    task_id: str
    """Stable name of the task, e.g. `practice-test-2-17`."""
    level: int
    """Difficulty, from 1."""
    messages: Sequence[Message]
    """System and user messages that open the conversation."""
    tools: Sequence[ToolSpec] = ()
    tags: Sequence[str] = ()
    """Kinds that the task is of, e.g. the tools that it takes; evaluations are broken down by
    them."""
    unscored: bool = False
    """The right answer is not known here: rewards of this episode say nothing."""


@dataclass(frozen=True, kw_only=True)
class ToolOutcome:
    """How one tool call ended; the environment server counts these by suite, tool and outcome."""

    name: str
    ok: bool
    cut: bool = False
    """The observation was shortened; counted as `cut`."""
    limit: str = ""
    """The limit of the sandbox that ended it, e.g. `time`; counted in place of `error`."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the environment answers to one action."""

    messages: Sequence[Message] = ()
    """Observations to append, in order; empty when the episode has ended."""
    reward: float = 0.0
    terminated: bool = False
    """The task itself ended (answered, solved, failed)."""
    truncated: bool = False
    """The environment cut the episode short (its own step limit)."""
    tool_outcomes: Sequence[ToolOutcome] = ()


@dataclass(frozen=True, kw_only=True)
class SuiteDescription:
    """What a suite holds, so that nobody needs its code to schedule its tasks."""

    name: str
    splits: dict[str, int]
    """Tasks a split, e.g. {"train": 100_000, "test": 600}; ordinals run from 0."""
    levels: Sequence[int]
    """Difficulty levels that occur, ascending."""
    digest: str
    """Changes whenever any task's content would: same digest, same tasks."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest sum of rewards that an episode can reach."""
    metadata: dict[str, str] = field(default_factory=dict)


class Environment(ABC):
    """One episode of one task; it lives as long as its session."""

    @abstractmethod
    def reset(self) -> Reset:
        """Start the episode; called once, before any step."""

    @abstractmethod
    def step(self, action: Action) -> Step:
        """Answer one action; never called after an episode has ended."""

    def close(self) -> None:  # noqa: B027 - optional to override
        """Free what the episode holds; called exactly once, also after a failure."""


class AsyncEnvironment(ABC):
    """Like Environment, with coroutines that run on the server's event loop and must not block."""

    @abstractmethod
    async def reset(self) -> Reset:
        """Start the episode; called once, before any step."""

    @abstractmethod
    async def step(self, action: Action) -> Step:
        """Answer one action; never called after an episode has ended."""

    async def close(self) -> None:  # noqa: B027 - optional to override
        """Free what the episode holds; called exactly once, also after a failure."""


class DrivenEnvironment(AsyncEnvironment):
    """Leads the conversation itself: it calls the policy over `endpoint`, and its only step, with
    no calls and no text, is answered when that has ended. The session's end cancels the step."""

    endpoint: str = ""
    """Base URL of an OpenAI-compatible endpoint, for this episode alone; set before `reset`.
    Whoever knows it speaks with the policy, so it is not to be logged."""


class Suite(ABC):
    """A named set of tasks with an environment and a grader. One instance serves all episodes."""

    name: str
    Options: ClassVar[type[Section] | None] = None
    """What `[envserver.suites.NAME]` may say beside `adapter`. A suite that has such a model is
    made with (NAME, options), where options is an instance of it; one without, with nothing."""
    blocking: bool = True
    """False where opening a task and every call of its Environment returns within about a
    millisecond and never waits: then they run on the event loop, which saves a change of threads
    each."""
    needs_sandbox: bool = False
    """True where tools or the grader run in boxes. The server then opens the sandbox, sets
    `sandbox` before the first task is opened, and refuses to start if the sandbox does not hold."""
    sandbox: "Pool"

    @abstractmethod
    def describe(self) -> SuiteDescription:
        """The suite's splits, levels and digest."""

    @abstractmethod
    def open(self, split: str, task_ordinal: int) -> Environment | AsyncEnvironment:
        """Make the environment of one task. Raises KeyError for a split or ordinal it lacks."""
