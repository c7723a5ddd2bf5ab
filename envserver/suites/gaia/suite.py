"""GaiaSuite and its Environment: tools until the policy answers, then GAIA's scoring."""

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path

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
from envserver.registry import import_object
from envserver.sandbox import Pool, Workspace
from envserver.suites.gaia.data import LEVELS, GaiaTask, read_copy
from envserver.suites.gaia_scoring import is_correct
from envserver.tools import (
    Browser,
    Calculator,
    OpenPage,
    PythonTool,
    ReadFile,
    Search,
    SearchProvider,
    Tool,
    Toolbox,
)
from understudy.config.base import Section
from understudy.evaluation import final_answer

SYSTEM_PROMPT = (
    "You are a general AI assistant. I will ask you a question. Report your thoughts, and "
    "finish your answer with the following template: FINAL ANSWER: [YOUR FINAL ANSWER]. YOUR "
    "FINAL ANSWER should be a number OR as few words as possible OR a comma separated list of "
    "numbers and/or strings. If you are asked for a number, don't use comma to write your "
    "number neither use units such as $ or percent sign unless specified otherwise. If you are "
    "asked for a string, don't use articles, neither abbreviations (e.g. for cities), and write "
    "the digits in plain text unless specified otherwise. If you are asked for a comma "
    "separated list, apply the above rules depending of whether the element to be put in the "
    "list is a number or a string."
)
"""The prompt of the paper (arXiv 2311.12983), word for word, so that figures compare."""


class GaiaOptions(Section):
    """[envserver.suites.gaia]"""

    path: Path
    """Folder of your copy of gaia-benchmark/GAIA, with 2023/validation and 2023/test, or one of
    them."""
    search: str = ""
    """`module:Class` of a SearchProvider, made without arguments, whose pages can be searched and
    read. Without one there are no such tools."""
    pages: Path | None = None
    """Folder of web pages that a browser shows; it reaches nothing else. Without one there is no
    browser."""


class GaiaSuite(Suite):
    """GAIA's validation and test tasks, as far as the copy has them."""

    Options = GaiaOptions
    blocking = False
    needs_sandbox = True

    def __init__(self, name: str, options: GaiaOptions) -> None:
        """Read the whole copy.

        Raises:
            OSError, ValueError: as read_copy.
            ConfigError: for a provider that cannot be imported.
            RuntimeError: a browser's parts are missing.
        """
        self.name = name
        self._tasks = read_copy(options.path)
        self._provider = _provider(options.search)
        self._pages = options.pages
        if options.pages:
            if not options.pages.is_dir():
                raise ValueError(f"pages = {str(options.pages)!r} is no folder")
            Browser(options.pages)  # says now what it lacks

    def describe(self) -> SuiteDescription:
        """The suite's splits, levels and digest."""
        return SuiteDescription(
            name=self.name,
            splits={split: len(tasks) for split, tasks in self._tasks.items()},
            levels=LEVELS,
            digest=_digest(self._tasks),
        )

    def open(self, split: str, task_ordinal: int) -> "GaiaEnvironment":
        """Make the environment of one task."""
        tasks = self._tasks[split]
        if not 0 <= task_ordinal < len(tasks):
            raise KeyError(f"{split} has tasks 0 to {len(tasks) - 1}, not {task_ordinal}")
        browser = Browser(self._pages) if self._pages else None
        return GaiaEnvironment(tasks[task_ordinal], self.sandbox, self._provider, browser)


def _provider(name: str) -> SearchProvider | None:
    if not name:
        return None
    made = import_object(name)
    if not callable(made):
        raise ValueError(f"search = {name!r} is no class")
    provider: SearchProvider = made()
    return provider


def _digest(tasks: dict[str, list[GaiaTask]]) -> str:
    """Of rows and attachments' sizes; not of where the copy lies."""
    parts = [
        (
            *(split, task.task_id, task.question, task.level, task.answer),
            task.attachment and (task.attachment.name, task.attachment.stat().st_size),
        )
        for split, of_split in tasks.items()
        for task in of_split
    ]
    return hashlib.sha256(repr((SYSTEM_PROMPT, parts)).encode()).hexdigest()[:16]


class GaiaEnvironment(AsyncEnvironment):
    """One episode: each turn calls tools, and the first turn without a call is the answer."""

    def __init__(
        self,
        task: GaiaTask,
        pool: Pool,
        provider: SearchProvider | None,
        browser: Browser | None,
    ) -> None:
        self._task = task
        self._pool = pool
        self._provider = provider
        self._browser = browser
        self._workspace: Workspace | None = None
        self._tools = Toolbox()

    async def reset(self) -> Reset:
        """The paper's prompt and the question, with the attachment's name if there is one."""
        attachment = self._task.attachment
        question, files = self._task.question, {}
        if attachment:
            question += f"\n\nAttached file: {attachment.name}"
            files[attachment.name] = await asyncio.to_thread(attachment.read_bytes)
        self._workspace = Workspace(self._pool, files)
        self._tools = Toolbox(*_tools(self._workspace, self._provider, self._browser))
        return Reset(
            task_id=self._task.task_id,
            level=self._task.level,
            messages=[Message(role="system", content=SYSTEM_PROMPT), user_message(question)],
            tools=self._tools.specs,
            tags=[f"file {attachment.suffix.lower()}" if attachment else "no file"],
            unscored=not self._task.is_scored,
        )

    async def step(self, action: Action) -> Step:
        """Run the calls, or grade the answer: reward 1 if it is correct, else 0."""
        if action.tool_calls:
            messages, outcomes = await self._tools.call(action.tool_calls)
            return Step(messages=messages, tool_outcomes=outcomes)
        if not self._task.is_scored:
            return Step(terminated=True)
        correct = is_correct(final_answer(action.text), self._task.answer)
        return Step(reward=float(correct), terminated=True)

    async def close(self) -> None:
        """End the episode's box, and its browser."""
        try:
            if self._workspace:
                await self._workspace.close()
        finally:
            if self._browser:
                await self._browser.close()


def _tools(
    workspace: Workspace, provider: SearchProvider | None, browser: Browser | None
) -> Sequence[Tool]:
    """The tools of an episode, in the order in which the policy is told of them."""
    tools: list[Tool] = [ReadFile(workspace), PythonTool(workspace), Calculator()]
    tools += [Search(provider), OpenPage(provider)] if provider else []
    return [*tools, *browser.tools] if browser else tools
