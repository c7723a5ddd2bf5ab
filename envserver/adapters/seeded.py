"""Environments without tasks of their own: a task is a seed."""

import hashlib
import json
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from envserver.environment import Message, SuiteDescription
from understudy.config.base import Section


class SeededOptions(Section):
    """Options of every suite whose tasks are seeds."""

    prompt: str = ""
    """What the first message says before the first observation: rules and goal."""
    train_tasks: PositiveInt = 1_000_000
    """Tasks of the split `train`: seeds from 0."""
    test_tasks: NonNegativeInt = 1_000
    """Tasks of the split `test`: the seeds after those of `train`."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest sum of rewards of an episode."""

    def seed(self, split: str, task_ordinal: int) -> int:
        """A task's seed. Raises KeyError for a task that there is not."""
        first, number = {
            "train": (0, self.train_tasks),
            "test": (self.train_tasks, self.test_tasks),
        }[split]
        if not 0 <= task_ordinal < number:
            raise KeyError(task_ordinal)
        return first + task_ordinal

    def describe(self, name: str, version: str) -> SuiteDescription:
        """A description whose digest changes with any option, and with the peer's version."""
        content = f"{version} {self.model_dump_json()}"
        return SuiteDescription(
            name=name,
            splits={"train": self.train_tasks, "test": self.test_tasks},
            levels=(1,),
            digest=hashlib.sha256(content.encode()).hexdigest()[:16],
            reward_range=self.reward_range,
        )


def opening(prompt: str, observation: str) -> Message:
    """The first message: the prompt, if there is one, and the first observation."""
    return Message(role="user", content="\n\n".join(filter(None, (prompt, observation))))


def as_text(value: object) -> str:
    """An observation as text: text as it is, all else as JSON with floats to 6 digits."""
    return value if isinstance(value, str) else json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
