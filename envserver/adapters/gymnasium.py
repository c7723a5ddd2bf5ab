"""Gymnasium's environments as a suite: a tool `act`, observations as text, tasks as seeds.

    [envserver.suites.lake]
    adapter = "gymnasium"
    env = "FrozenLake-v1"
    kwargs = { render_mode = "ansi", is_slippery = false }
    actions = ["left", "down", "right", "up"]

Calls of one environment follow each other but need not run in the same thread.
"""

import re
from typing import Any

import gymnasium
from gymnasium import spaces
from pydantic import Field

from envserver.adapters.seeded import SeededOptions, as_text, opening
from envserver.environment import (
    Action,
    Environment,
    Message,
    Reset,
    Step,
    Suite,
    SuiteDescription,
    ToolCall,
    ToolOutcome,
    ToolSpec,
    user_message,
)

_COLOURED = re.compile(r"\x1b\[[\d;]+m(.*?)\x1b\[0m")


class GymnasiumOptions(SeededOptions):
    """Options of a suite of Gymnasium."""

    env: str
    """Registered id, such as `FrozenLake-v1`, or `module:id`."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to gymnasium.make. With `render_mode = "ansi"` the rendering is the observation."""
    actions: tuple[str, ...] = ()
    """Names of a Discrete space's actions, in order; without them they are integers."""


class GymnasiumSuite(Suite):
    """Tasks of one environment of Gymnasium. Actions are Discrete or Text."""

    Options = GymnasiumOptions

    def __init__(self, name: str, options: GymnasiumOptions) -> None:
        """Make the environment once, to look at it.

        Raises:
            ValueError: for one that cannot be made or played.
        """
        self.name = name
        self.options = options
        env = self._make()
        self.tool = _tool(options, env.action_space)
        env.close()

    def describe(self) -> SuiteDescription:
        """The suite's splits and digest."""
        return self.options.describe(self.name, gymnasium.__version__)

    def open(self, split: str, task_ordinal: int) -> "GymnasiumEnvironment":
        """Make the environment of one seed."""
        seed = self.options.seed(split, task_ordinal)
        task_id = f"{self.name}-{split}-{task_ordinal}"
        return GymnasiumEnvironment(self._make(), self.options, self.tool, task_id, seed)

    def _make(self) -> gymnasium.Env[Any, Any]:
        try:
            return gymnasium.make(self.options.env, disable_env_checker=True, **self.options.kwargs)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            raise ValueError(f"env = {self.options.env!r} cannot be made: {error}") from error


class GymnasiumEnvironment(Environment):
    """One episode. Rewards are Gymnasium's own, and so are `terminated` and `truncated`."""

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        options: GymnasiumOptions,
        tool: ToolSpec,
        task_id: str,
        seed: int,
    ) -> None:
        self._env = env
        self._options = options
        self._tool = tool
        self._task_id = task_id
        self._seed = seed

    def reset(self) -> Reset:
        """The prompt and the first observation."""
        observation, _ = self._env.reset(seed=self._seed)
        message = opening(self._options.prompt, self._text(observation))
        return Reset(task_id=self._task_id, level=1, messages=[message], tools=[self._tool])

    def step(self, action: Action) -> Step:
        """Act once a call, until the episode ends. In a Text space a bare reply is an action."""
        calls = list(action.tool_calls)
        if not calls and isinstance(self._env.action_space, spaces.Text):
            calls = [ToolCall(name=self._tool.name, arguments={"action": action.text})]
        if not calls:
            return Step(messages=[user_message(f"Call the tool {self._tool.name}.")])
        played = Step()
        for call in calls:
            played = _join(played, self._act(call))
            if played.terminated or played.truncated:
                break
        return played

    def close(self) -> None:
        """Free the environment."""
        self._env.close()

    def _act(self, call: ToolCall) -> Step:
        try:
            action = self._parse(call)
        except ValueError as error:
            name = self._tool.name if call.name == self._tool.name else "unknown"
            return Step(
                messages=[Message(role="tool", content=str(error))],
                tool_outcomes=[ToolOutcome(name=name, ok=False)],
            )
        observation, reward, terminated, truncated, _ = self._env.step(action)
        return Step(
            messages=[Message(role="tool", content=self._text(observation))],
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated),
            tool_outcomes=[ToolOutcome(name=self._tool.name, ok=True)],
        )

    def _parse(self, call: ToolCall) -> int | str:
        """The action of a call. Raises ValueError with what the policy is told."""
        if call.name != self._tool.name:
            raise ValueError(f"Unknown tool; use {self._tool.name}.")
        value = call.arguments.get("action")
        space = self._env.action_space
        if isinstance(space, spaces.Text):
            if not isinstance(value, str) or not space.contains(value):
                raise ValueError(
                    f"Give action as text of {space.min_length} to {space.max_length} "
                    "of the known characters."
                )
            return value
        assert isinstance(space, spaces.Discrete)
        names = self._options.actions
        if names and value in names:
            return names.index(value) + int(space.start)
        if not names and type(value) is int and space.contains(value):
            return value
        last = int(space.start + space.n) - 1
        raise ValueError(
            f"Give action as one of {', '.join(names)}."
            if names
            else f"Give action as an integer from {space.start} to {last}."
        )

    def _text(self, observation: object) -> str:
        if self._env.render_mode != "ansi":
            return as_text(observation)
        # Colour is all that tells some renderings' player from the ground.
        return _COLOURED.sub(r"[\1]", str(self._env.render())).strip("\n")


def _join(first: Step, second: Step) -> Step:
    return Step(
        messages=[*first.messages, *second.messages],
        reward=first.reward + second.reward,
        terminated=second.terminated,
        truncated=second.truncated,
        tool_outcomes=[*first.tool_outcomes, *second.tool_outcomes],
    )


def _tool(options: GymnasiumOptions, space: gymnasium.Space[Any]) -> ToolSpec:
    """The tool `act`. Raises ValueError for a space that it cannot express."""
    if isinstance(space, spaces.Text):
        schema: dict[str, Any] = {"type": "string", "maxLength": int(space.max_length)}
    elif not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"env = {options.env!r}: its actions are {space}; only Discrete and Text can be played"
        )
    elif options.actions:
        if len(options.actions) != space.n:
            raise ValueError(f"actions names {len(options.actions)} of {space.n}; name all of them")
        schema = {"type": "string", "enum": list(options.actions)}
    else:
        start = int(space.start)
        schema = {"type": "integer", "minimum": start, "maximum": start + int(space.n) - 1}
    return ToolSpec(
        name="act",
        description="Act in the environment.",
        parameters={"type": "object", "properties": {"action": schema}, "required": ["action"]},
    )
