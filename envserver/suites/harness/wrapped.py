"""A task of another suite while a harness works at it: its tools, its grader, its reward so far."""

import asyncio
from collections.abc import Callable
from typing import Any

from envserver.environment import (
    Action,
    AsyncEnvironment,
    Environment,
    Reset,
    Step,
    ToolCall,
    ToolOutcome,
)

OVER = "The task has ended; give your answer."


class Wrapped:
    """Calls follow each other, whoever makes them."""

    def __init__(self, environment: Environment | AsyncEnvironment, blocking: bool) -> None:
        """Take an opened environment; its calls are made by threads where they may block."""
        self._environment = environment
        self._blocking = blocking and isinstance(environment, Environment)
        self._lock = asyncio.Lock()
        self.reward = 0.0
        self.terminated = False
        self.truncated = False
        self.outcomes: list[ToolOutcome] = []

    async def reset(self) -> Reset:
        """Begin the task."""
        reset: Reset = await self._run(self._environment.reset)
        return reset

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Call a tool of the task's and return its observation."""
        step = await self._step(Action(tool_calls=(ToolCall(name=name, arguments=arguments),)))
        return "\n".join(message.content for message in step.messages) if step else OVER

    async def answer(self, text: str) -> None:
        """Put the harness's answer to the task; a task that then wants more is cut short."""
        if await self._step(Action(text=text)) and not self.terminated:
            self.truncated = True

    async def close(self) -> None:
        """Free the task."""
        await self._run(self._environment.close)

    async def _step(self, action: Action) -> Step | None:
        async with self._lock:
            if self.terminated or self.truncated:
                return None
            step: Step = await self._run(self._environment.step, action)
            self.reward += step.reward
            self.terminated, self.truncated = step.terminated, step.truncated
            self.outcomes += step.tool_outcomes
            return step

    async def _run(self, function: Callable[..., Any], *arguments: object) -> Any:
        if self._blocking:
            return await asyncio.to_thread(function, *arguments)
        result = function(*arguments)
        return await result if isinstance(self._environment, AsyncEnvironment) else result
