"""Agents of several parts in the practice suite."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from actor.agents.opening import agent_policy
from actor.environment_pool import EnvironmentPool
from actor.episode import Player
from actor.inference_pool import InferencePool
from actor.tokens import TokenPolicy
from conftest import serving
from envserver.servicer import EnvironmentServicer
from envserver.suites.practice import PracticeSuite
from understudy.chat import ChatFormat
from understudy.client import Lease
from understudy.config import Config, EnvserverConfig
from understudy.rpc import RoleControl, Service
from understudy.trajectory import Trajectory
from understudy.v1 import environment_pb2_grpc


@asynccontextmanager
async def practice() -> AsyncIterator[str]:
    """An environment server of the practice suite."""
    control = RoleControl("envserver")
    control.serving()
    servicer = EnvironmentServicer({"practice": PracticeSuite()}, EnvserverConfig(), control)
    add = environment_pb2_grpc.add_EnvironmentServiceServicer_to_server
    name = "understudy.v1.EnvironmentService"
    async with serving(Service(name=name, add=add, servicer=servicer)) as address:
        yield address


async def play_practice(
    chat: ChatFormat,
    bundle: Path,
    inference: str,
    agents: Mapping[str, Mapping[str, Any]],
    lease: Lease,
) -> Trajectory:
    """Play one lease with the first of the agents, by an inference server."""
    async with practice() as environment:
        config = Config.model_validate(
            {
                "model": {"path": bundle},
                "network": {"inference": [inference], "envservers": [environment]},
                "actor": {"agent": next(iter(agents))},
                "agents": agents,
            }
        )
        pool = InferencePool(config.network, timeout_seconds=60.0)
        servers = EnvironmentPool(config.network, step_timeout_seconds=60.0)
        try:
            async with agent_policy(config, TokenPolicy(chat, pool)) as policy:
                return await Player(policy, servers).play(lease)
        finally:
            await pool.close()
            await servers.close()
