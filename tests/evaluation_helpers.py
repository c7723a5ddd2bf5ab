"""Suites, models and plans that tests of evaluations share."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from actor.evaluation.backends import EndpointPlan
from actor.evaluation.plan import EvaluationPlan
from conftest import serving
from endpoint_server import Answer, Request, says
from envserver.environment import (
    Action,
    Environment,
    Reset,
    Step,
    Suite,
    user_message,
)
from envserver.servicer import EnvironmentServicer
from suites import EchoEnvironment, EchoSuite
from test_actor import make_config
from understudy.config import Config, EnvserverConfig
from understudy.rpc import RoleControl, Service
from understudy.v1 import environment_pb2_grpc


@asynccontextmanager
async def serve_suites(*suites: Suite) -> AsyncIterator[str]:
    """An environment server of some suites."""
    control = RoleControl("envserver")
    control.serving()
    by_name = {suite.name: suite for suite in suites}
    servicer = EnvironmentServicer(by_name, EnvserverConfig(), control)
    add = environment_pb2_grpc.add_EnvironmentServiceServicer_to_server
    service = Service(name="understudy.v1.EnvironmentService", add=add, servicer=servicer)
    async with serving(service) as address:
        yield address


def config_of(folder: Path, bundle: Path, **network: Any) -> Config:
    """A run's configuration with quick timeouts."""
    network = {"connect_timeout_seconds": 20.0, **network}
    return make_config(folder, bundle, network=network)


def plan_of(**fields: Any) -> EvaluationPlan:
    """Two attempts at each of three echo tasks."""
    values = {"suite": "echo", "split": "train", "num_tasks": 3, "k": 2, "temperature": 1.0}
    return EvaluationPlan(**{**values, "seed": 5, **fields})


def endpoint_plan(url: str, key_file: Path | None = None) -> EndpointPlan:
    """The scripted model at an endpoint, without a key."""
    return EndpointPlan(url=url, model="scripted", key_variable="NO_SUCH_KEY", key_file=key_file)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TaggedSuite(EchoSuite):
    """Three levels, two tags, and answers that are not known where `unscored`."""

    def __init__(self, unscored: bool = False) -> None:
        self.unscored = unscored

    def open(self, split: str, task_ordinal: int) -> Environment:
        return Tagged(task_ordinal, self.unscored)


class Tagged(EchoEnvironment):
    """A task of a level and a tag by its ordinal."""

    def __init__(self, ordinal: int, unscored: bool) -> None:
        super().__init__(ordinal)
        self.unscored = unscored

    def reset(self) -> Reset:
        return Reset(
            task_id=f"00000000-0000-4000-8000-{self.ordinal:012}",
            level=1 + self.ordinal % 2,
            messages=[user_message(f"Say {self.ordinal}.")],
            tags=["even"] if self.ordinal % 2 == 0 else ["odd", "rare"],
            unscored=self.unscored,
        )


class BrokenSuite(TaggedSuite):
    """Fails each task as often as told."""

    def __init__(self, failures: dict[int, int]) -> None:
        super().__init__()
        self.failures = failures

    def open(self, split: str, task_ordinal: int) -> Environment:
        return Broken(task_ordinal, self.failures)


class Broken(Tagged):
    """Raises at a step while failures of its task are left."""

    def __init__(self, ordinal: int, failures: dict[int, int]) -> None:
        super().__init__(ordinal, unscored=False)
        self.failures = failures

    def step(self, action: Action) -> Step:
        if self.failures.get(self.ordinal, 0):
            self.failures[self.ordinal] -= 1
            raise RuntimeError("broken")
        return super().step(action)


def says_the_number(request: Request) -> Answer:
    """Answers `Say 7.` with 7."""
    text = request["messages"][-1]["content"]
    return says(f"Of course. FINAL ANSWER: {text[4:-1]}" if "FINAL" in text else text[4:-1])
