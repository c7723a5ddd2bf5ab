"""An actor's recording endpoint before a scripted engine, and environments that lead."""

import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import openai

from actor.environment_pool import EnvironmentPool
from actor.episode import Player
from actor.inference_pool import InferencePool
from actor.recording.server import Recordings, serve_recordings
from actor.tokens import TokenPolicy
from conftest import ROOT, serving
from envserver.registry import load_suites
from envserver.servicer import EnvironmentServicer
from test_actor import engine
from understudy.chat import ChatFormat
from understudy.client import Lease
from understudy.config import Config, EnvserverConfig
from understudy.rpc import RoleControl, Service
from understudy.trajectory import Trajectory
from understudy.v1 import environment_pb2_grpc

HARNESS = "envserver.suites.harness:HarnessSuite"
EXAMPLE = (sys.executable, str(ROOT / "examples" / "harness_openai.py"))


def call(name: str, arguments: str) -> str:
    """A call as the policy writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def client_of(url: str) -> Any:
    """The plain client, which does not try again by itself."""
    return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)


def config_of(bundle: Path, inference: str, *envservers: str) -> Config:
    """A configuration with the endpoint on a free port."""
    return Config.model_validate(
        {
            "model": {"path": bundle, "tools": "signatures"},
            "network": {
                "inference": [inference],
                "envservers": list(envservers),
                "connect_timeout_seconds": 20.0,
            },
            "actor": {"recording_listen": "127.0.0.1:0"},
        }
    )


@asynccontextmanager
async def recordings(
    chat: ChatFormat, bundle: Path, inference: str, *, router_replay: bool = False
) -> AsyncIterator[Recordings]:
    """The endpoint of an actor without episodes."""
    config = config_of(bundle, inference)
    pool = InferencePool(config.network, timeout_seconds=10.0, with_routes=router_replay)
    try:
        async with serve_recordings(config, chat, pool) as endpoint:
            yield endpoint
    finally:
        await pool.close()


@asynccontextmanager
async def harnesses(tables: dict[str, dict[str, Any]], **settings: Any) -> AsyncIterator[str]:
    """An environment server of harness suites, by their tables."""
    by_class = {name: {**table, "adapter": HARNESS} for name, table in tables.items()}
    control = RoleControl("envserver")
    control.serving()
    config = EnvserverConfig(**settings)
    service = Service(
        name="understudy.v1.EnvironmentService",
        add=environment_pb2_grpc.add_EnvironmentServiceServicer_to_server,
        servicer=EnvironmentServicer(load_suites(by_class), config, control),
    )
    async with serving(service) as address:
        yield address


@asynccontextmanager
async def player(
    chat: ChatFormat, bundle: Path, inference: str, environment: str, timeout: float = 3.0
) -> AsyncIterator[Callable[[Lease], Any]]:
    """Plays leases with the endpoint on."""
    config = config_of(bundle, inference, environment)
    pool = InferencePool(config.network, timeout_seconds=timeout)
    servers = EnvironmentPool(config.network, step_timeout_seconds=60.0)
    try:
        async with serve_recordings(config, chat, pool) as endpoint:
            yield Player(TokenPolicy(chat, pool, endpoint), servers).play
    finally:
        await pool.close()
        await servers.close()


async def play_harness(
    chat: ChatFormat,
    bundle: Path,
    replies: Sequence[str],
    lease: Lease,
    table: dict[str, Any],
    **settings: Any,
) -> Trajectory:
    """One episode of a harness suite named as the lease says."""
    async with AsyncExitStack() as stack:
        inference = await stack.enter_async_context(engine(bundle, replies))
        server = await stack.enter_async_context(harnesses({lease.suite: table}, **settings))
        play = await stack.enter_async_context(player(chat, bundle, inference, server))
        trajectory: Trajectory = await play(lease)
        return trajectory
