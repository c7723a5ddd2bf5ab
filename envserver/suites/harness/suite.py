"""HarnessSuite: the tasks of another suite, played by a command that leads the conversation."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from envserver.adapters.peer import peer_fault, peer_full
from envserver.environment import DrivenEnvironment, Reset, Step, Suite, SuiteDescription
from envserver.registry import load_suites
from envserver.suites.harness.command import MAX_ANSWER_BYTES, Ended, run_command
from envserver.suites.harness.tool_server import serve_tools
from envserver.suites.harness.wrapped import Wrapped
from understudy.config.base import Section

MODEL = "understudy"
"""What the command is told to call the model; the endpoint takes any name."""


class HarnessOptions(Section):
    """Options of a suite whose episodes a command plays."""

    command: tuple[str, ...] = Field(min_length=1)
    """Program and arguments, started once an episode in an empty folder. Words that name a file
    from where the server is started are made absolute."""
    tasks: str = "practice"
    """Where tasks, tools and grader come from: another suite, registered or `module:Class`."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """Options of that suite, as its own table would have them."""
    timeout_seconds: PositiveFloat = 240.0
    """The command is killed after it, and the episode cut short. To be below
    `envserver.step_timeout_seconds` and `actor.step_timeout_seconds`."""
    max_sessions: PositiveInt = 64
    """Commands at one time; one more is refused with a retry hint."""


class HarnessSuite(Suite):
    """Tasks of another suite, with somebody's own agent between them and the policy."""

    Options = HarnessOptions

    def __init__(self, name: str, options: HarnessOptions) -> None:
        """Load the other suite.

        Raises:
            ConfigError: it is not known, or refuses its options.
            ValueError: it leads the conversation itself.
        """
        self.name = name
        self.options = options
        self.command = [_absolute(word) for word in options.command]
        self.num_sessions = 0
        if options.task_options:
            table = {**options.task_options, "adapter": options.tasks}
            (self.tasks,) = load_suites({name: table}).values()
        else:
            (self.tasks,) = load_suites([options.tasks]).values()
        if isinstance(self.tasks, HarnessSuite):
            raise ValueError(f"tasks = {options.tasks!r}: a harness needs tasks of another kind")
        self.blocking = self.tasks.blocking
        self.needs_sandbox = self.tasks.needs_sandbox

    def describe(self) -> SuiteDescription:
        """The other suite's description; the digest is of the command's words, too."""
        inner = self.tasks.describe()
        content = json.dumps([inner.name, inner.digest, self.options.model_dump(mode="json")])
        return SuiteDescription(
            name=self.name,
            splits=inner.splits,
            levels=inner.levels,
            digest=hashlib.sha256(content.encode()).hexdigest()[:16],
            reward_range=inner.reward_range,
            metadata=inner.metadata,
        )

    def open(self, split: str, task_ordinal: int) -> "HarnessEnvironment":
        """Open the task. Raises SESSIONS_FULL beyond max_sessions."""
        if self.num_sessions >= self.options.max_sessions:
            raise peer_full(self.name, f"max_sessions = {self.options.max_sessions} are open")
        if self.needs_sandbox:
            self.tasks.sandbox = self.sandbox
        wrapped = Wrapped(self.tasks.open(split, task_ordinal), self.tasks.blocking)
        self.num_sessions += 1
        return HarnessEnvironment(self, wrapped)


class HarnessEnvironment(DrivenEnvironment):
    """One episode: the command runs within the only step, and its answer is graded."""

    def __init__(self, suite: HarnessSuite, task: Wrapped) -> None:
        self._suite = suite
        self._task = task
        self._reset: Reset | None = None

    async def reset(self) -> Reset:
        """Begin the task; nothing is started yet."""
        self._reset = await self._task.reset()
        return self._reset

    async def step(self, action: object) -> Step:
        """Run the command and put its answer to the task."""
        folder = Path(tempfile.mkdtemp(prefix="understudy-harness-"))
        try:
            ended = await self._run(folder)
            if ended.code:
                self._raise_failed(ended)
            if ended.code is None:
                return self._outcome(truncated=True)
            await self._task.answer(_answer(folder / "answer.txt", ended.output))
            return self._outcome(truncated=self._task.truncated)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _run(self, folder: Path) -> Ended:
        assert self._reset
        work, task = folder / "work", folder / "task.json"
        work.mkdir()
        task.write_text(json.dumps(_task_of(self._reset)), encoding="utf-8")
        async with serve_tools(self._reset.tools, self._task.call) as tools_url:
            variables = {
                "OPENAI_BASE_URL": self.endpoint,
                "OPENAI_API_KEY": "none-needed",  # clients refuse to start without one
                "OPENAI_MODEL": MODEL,
                "UNDERSTUDY_TASK": str(task),
                "UNDERSTUDY_ANSWER": str(folder / "answer.txt"),
                "UNDERSTUDY_MCP_URL": tools_url,
            }
            options = self._suite.options
            try:
                return await run_command(
                    self._suite.command, work, task, variables, options.timeout_seconds
                )
            except OSError as error:
                reason = f"the command cannot be started: {error.strerror}"
                raise peer_fault("PEER_UNREACHABLE", self._suite.name, reason) from error

    def _raise_failed(self, ended: Ended) -> None:
        """The end of its errors goes to the actor, but for the endpoint, which is a secret."""
        errors = ended.errors.replace(self.endpoint, "OPENAI_BASE_URL").strip()
        message = f"the command ended with {ended.code}: {errors[-1000:]}"
        raise peer_fault("HARNESS_FAILED", self._suite.name, message)

    def _outcome(self, truncated: bool) -> Step:
        return Step(
            reward=self._task.reward,
            terminated=not truncated,
            truncated=truncated,
            tool_outcomes=self._task.outcomes,
        )

    async def close(self) -> None:
        """Free the task; the command's end is the step's business, which is over or cancelled."""
        self._suite.num_sessions -= 1
        await self._task.close()


def _absolute(word: str) -> str:
    return os.path.abspath(word) if os.path.isfile(word) else word


def _task_of(reset: Reset) -> dict[str, Any]:
    """What the command gets to know."""
    tools = [
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        for tool in reset.tools
    ]
    messages = [{"role": item.role, "content": item.content} for item in reset.messages]
    return {"task_id": reset.task_id, "messages": messages, "tools": tools}


def _answer(file: Path, output: str) -> str:
    """The answer file if there is one, else the last line of the output that is not blank."""
    if file.is_file() and not file.is_symlink():
        with file.open("rb") as stream:
            return stream.read(MAX_ANSWER_BYTES).decode("utf-8", "replace").strip()
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
