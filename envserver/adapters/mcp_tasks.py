"""Where the tasks of an MCP suite come from: lines of a file, or another suite.

Both open a task, begin it, and grade its answer; the tools in between are the MCP server's.

    FileTasks    {"question": ..., "answer": ...} a line; GAIA's rules or a grader of one's own
    SuiteTasks   another suite's opening messages, tags and grades; its own tools are not offered
"""

import asyncio
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, PositiveInt, ValidationError

from envserver.environment import (
    Action,
    AsyncEnvironment,
    Environment,
    Message,
    Reset,
    Step,
    Suite,
    SuiteDescription,
    user_message,
)
from envserver.registry import import_object, load_suites
from envserver.suites.gaia_scoring import is_correct
from understudy.config.base import Section, explain
from understudy.evaluation import final_answer

T = TypeVar("T")
Grade = Callable[[dict[str, Any], str], float]


class Task(ABC):
    """One task for one episode."""

    @abstractmethod
    async def begin(self) -> Reset:
        """How the episode opens; what it says of tools is not used."""

    @abstractmethod
    async def grade(self, text: str) -> Step:
        """What the policy's answer, its first reply without a call, earns."""

    async def close(self) -> None:  # noqa: B027 - optional to override
        """Free what the task holds."""


class Tasks(ABC):
    """All tasks of a suite."""

    content: str
    """Differs wherever any task does."""
    splits: Mapping[str, int]
    levels: list[int]
    metadata: Mapping[str, str]
    reward_range: tuple[float, float] = (0.0, 1.0)
    max_tool_turns: int | None = None
    """Turns with calls that are played; one more cuts the episode short. None: without end."""

    @abstractmethod
    def open(self, split: str, task_ordinal: int) -> Task:
        """One task; the caller has checked that there is one."""


class Line(Section):
    """A line of a file of tasks; a grader sees all other keys, too."""

    model_config = ConfigDict(extra="allow")

    question: str
    answer: str = ""
    level: PositiveInt = 1


class FileTasks(Tasks):
    """Tasks from files of JSON lines."""

    def __init__(self, name: str, files: Mapping[str, Path], prompt: str, grader: str) -> None:
        """Read the files and find the grader.

        Raises:
            ValueError: for a line that is no task, or a grader that is no function.
            OSError: for a file that cannot be read.
            ConfigError: for a grader that cannot be imported.
        """
        self._name, self._prompt, self._grader = name, prompt, grader
        self._lines = {split: _read_lines(path) for split, path in files.items()}
        self._grade: Grade = _gaia
        if grader:
            found = import_object(grader)
            if not callable(found):
                raise ValueError(f"grader = {grader!r} is no function")
            self._grade = found
        lines = [line for lines in self._lines.values() for line in lines]
        self.content = "\n".join(line.model_dump_json() for line in lines)
        self.splits = {split: len(lines) for split, lines in self._lines.items()}
        self.levels = sorted({line.level for line in lines})
        self.metadata = {}

    def open(self, split: str, task_ordinal: int) -> "FileTask":
        """The task of a line."""
        task_id = f"{self._name}-{split}-{task_ordinal}"
        return FileTask(self, self._lines[split][task_ordinal], task_id)

    def opening(self, question: str) -> list[Message]:
        """The system message, if there is one, and the question."""
        system = [Message(role="system", content=self._prompt)] if self._prompt else []
        return [*system, user_message(question)]

    async def grade(self, line: Line, answer: str) -> float:
        """The reward of an answer, by a thread: a grader may block."""
        reward = float(await asyncio.to_thread(self._grade, line.model_dump(), answer))
        if not (math.isfinite(reward) and 0 <= reward <= 1):
            raise ValueError(f"the grader {self._grader!r} gave {reward}, not 0 to 1")
        return reward


class FileTask(Task):
    """The task of a line."""

    def __init__(self, tasks: FileTasks, line: Line, task_id: str) -> None:
        self._tasks, self._line, self._task_id = tasks, line, task_id

    async def begin(self) -> Reset:
        """The prompt and the question."""
        messages = self._tasks.opening(self._line.question)
        return Reset(task_id=self._task_id, level=self._line.level, messages=messages)

    async def grade(self, text: str) -> Step:
        """By the suite's grader."""
        reward = await self._tasks.grade(self._line, final_answer(text))
        return Step(reward=reward, terminated=True)


class SuiteTasks(Tasks):
    """Tasks of another suite, played with tools that are not its own.

    It fits suites whose grade depends on the answer alone: their environments see no call.
    """

    def __init__(self, name: str) -> None:
        """Load the suite: a registered name or `module:Class`, without options.

        Raises:
            ConfigError: there is none, or it takes options.
            ValueError: its episodes need the sandbox, where its own tools leave what it grades.
        """
        (self._suite,) = load_suites([name]).values()
        if self._suite.needs_sandbox:
            raise ValueError(
                f"suite = {name!r} needs its own tools and the sandbox; serve it alone"
            )
        described: SuiteDescription = self._suite.describe()
        self.content = described.digest
        self.splits, self.levels = described.splits, list(described.levels)
        self.metadata, self.reward_range = described.metadata, described.reward_range
        if turns := described.metadata.get("max_tool_turns"):
            self.max_tool_turns = int(turns)

    def open(self, split: str, task_ordinal: int) -> "SuiteTask":
        """The other suite's task."""
        return SuiteTask(self._suite, split, task_ordinal)


class SuiteTask(Task):
    """A task of another suite; its environment opens and grades, and is told of no call."""

    def __init__(self, suite: Suite, split: str, task_ordinal: int) -> None:
        self._suite, self._split, self._task_ordinal = suite, split, task_ordinal
        self._environment: Environment | AsyncEnvironment | None = None

    async def begin(self) -> Reset:
        """As the other suite begins it."""
        self._environment = await self._run(self._suite.open, self._split, self._task_ordinal)
        reset: Reset = await self._ask(self._environment.reset)
        return reset

    async def grade(self, text: str) -> Step:
        """As the other suite grades it."""
        assert self._environment is not None
        step: Step = await self._ask(self._environment.step, Action(text=text))
        return step

    async def close(self) -> None:
        """Close the other suite's environment."""
        if self._environment is not None:
            await self._ask(self._environment.close)

    async def _ask(self, method: Callable[..., Any], *arguments: object) -> Any:
        if isinstance(self._environment, AsyncEnvironment):
            return await method(*arguments)
        return await self._run(method, *arguments)

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        if self._suite.blocking:
            return await asyncio.to_thread(function, *arguments)
        return function(*arguments)


def _read_lines(path: Path) -> list[Line]:
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{path}, line {number}"
        try:
            lines.append(Line.model_validate(json.loads(text)))
        except ValidationError as error:
            raise explain(error, Line, place) from None
        except ValueError as error:
            raise ValueError(f"{place} is no JSON: {error}") from None
    if not lines:
        raise ValueError(f"tasks: {path} is empty; give one JSON object a line")
    return lines


def _gaia(task: dict[str, Any], answer: str) -> float:
    return float(is_correct(answer, task["answer"]))
