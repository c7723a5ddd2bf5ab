"""What an evaluation plays."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from understudy.config import Config
from understudy.evaluation import episode_seed
from understudy.v1 import environment_pb2

DEFAULT_TASKS = 600


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What the command line asks for."""

    suite: str
    split: str
    num_tasks: int | None = None
    """Tasks 0 .. num_tasks - 1 of the split; None: the first 600, or all if there are fewer."""
    k: int = 1
    """Attempts at each task."""
    temperature: float
    seed: int
    passing_reward: float | None = None
    """Reward from which an attempt has passed; None: the highest that the suite gives, if any."""
    max_tries: int = 3
    """Times that an attempt is played at most, as long as the infrastructure makes it fail."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What attempts must have in common to be put together. All of it is in the attempts file."""

    suite: str
    suite_digest: str
    split: str
    policy: str
    """E.g. "version 12 of run demo", or "gpt-x at https://host/v1"."""
    tools: str
    """How prompts list tools, as Backend has it."""
    agent: str
    """The agent of several parts that plays, by name and digest of its definitions; else empty."""
    temperature: float
    seed: int
    max_turns: int
    max_tokens: int
    max_new_tokens: int

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What another's fields say differently, e.g. `temperature = 1.0, not 0.0`."""
        mine = asdict(self)
        return [
            f"{name} = {other.get(name)!r}, not {value!r}"
            for name, value in mine.items()
            if other.get(name) != value
        ]


def settings_of(
    config: Config, plan: EvaluationPlan, suite_digest: str, policy: str, tools: str
) -> Settings:
    """The settings that a plan is played under."""
    tasks = config.learner.tasks
    return Settings(
        suite=plan.suite,
        suite_digest=suite_digest,
        split=plan.split,
        policy=policy,
        tools=tools,
        agent=_agent_of(config),
        temperature=plan.temperature,
        seed=plan.seed,
        max_turns=tasks.max_turns,
        max_tokens=tasks.max_tokens,
        max_new_tokens=tasks.max_new_tokens,
    )


def _agent_of(config: Config) -> str:
    if not config.actor.agent:
        return ""
    defined = config.model_dump_json(include={"agents", "policies"}).encode()
    return f"{config.actor.agent} {hashlib.sha256(defined).hexdigest()[:16]}"


def num_tasks_of(plan: EvaluationPlan, description: environment_pb2.DescribeSuiteResponse) -> int:
    """How many tasks a plan plays of the suite that was described."""
    if plan.num_tasks is not None:
        return plan.num_tasks
    sizes = {split.name: split.num_tasks for split in description.splits}
    return min(DEFAULT_TASKS, sizes.get(plan.split, 1))


def attempt_seed(seed: int, task: int, attempt: int) -> int:
    """Seed of an attempt. The first attempt's is that of evaluations within a run."""
    return (episode_seed(seed, task) + attempt * 0xD1B54A32D192ED03) % 2**63
