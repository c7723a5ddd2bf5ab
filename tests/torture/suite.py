"""The system's suite: the rollout benchmark's, but a coin decides about the reward.

Groups of equal rewards would be dropped as uniform, and there would be nothing to train.
"""

import random
from dataclasses import replace

from benchmarks.suite import SlowToolEnvironment, SlowToolSuite
from envserver.environment import Action, AsyncEnvironment, Environment, Step, SuiteDescription


class CoinEnvironment(SlowToolEnvironment):
    """Any answer ends the episode, well or not."""

    async def step(self, action: Action) -> Step:
        taken = await super().step(action)
        return replace(taken, reward=float(random.randrange(2))) if taken.terminated else taken


class CoinSuite(SlowToolSuite):
    """As many tasks as anybody wants."""

    name = "coin"

    def describe(self) -> SuiteDescription:
        return replace(super().describe(), digest="coin-1")

    def open(self, split: str, task_ordinal: int) -> Environment | AsyncEnvironment:
        return CoinEnvironment()
