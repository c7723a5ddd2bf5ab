"""The actor's process: connects to its peers, then works until the run is over or it drains."""

import asyncio
import contextlib
import os
import socket
import tempfile
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from actor.agents.opening import agent_policy
from actor.environment_pool import EnvironmentPool
from actor.episode import Player
from actor.inference_pool import InferencePool
from actor.tokens import TokenPolicy
from actor.worker import Worker
from understudy import metrics
from understudy.chat import ChatFormat
from understudy.client import TaskClient, fetch_model_bundle
from understudy.client.trajectories import Uplink
from understudy.config import Config
from understudy.errors import ConfigError, PeerUnreachableError
from understudy.rpc import RoleControl, RoleServer, error_reason

if TYPE_CHECKING:
    from actor.recording.server import Recordings


async def fetch_chat(config: Config, learner: TaskClient) -> ChatFormat:
    """The run's chat template and tokenizer, from the learner.

    Raises:
        PeerUnreachableError: the learner went away meanwhile.
        ConfigError: its model folder has no usable tokenizer or template.
    """
    with tempfile.TemporaryDirectory(prefix="understudy-bundle-") as folder:
        try:
            await fetch_model_bundle(learner.channel, Path(folder))
        except grpc.aio.AioRpcError as error:
            raise PeerUnreachableError(
                f"the learner at {learner.address} did not send its model: "
                f"{error_reason(error)}: {error.details()}; start again"
            ) from None
        try:
            return ChatFormat.load(Path(folder), config.model.tools)
        except ConfigError as error:
            raise ConfigError(f"what the learner at {learner.address} sent: {error}") from None


def recording_endpoint(
    config: Config, chat: ChatFormat, inference: InferencePool
) -> AbstractAsyncContextManager["Recordings | None"]:
    """The recording endpoint, if there is to be one. Raises ConfigError as it says."""
    if not config.actor.recording_listen:
        return contextlib.nullcontext()
    try:
        from actor.recording.server import serve_recordings
    except ImportError as error:
        raise ConfigError(
            f"actor.recording_listen: {error}; install the extra: pip install "
            "'understudy[recording]'"
        ) from None
    return serve_recordings(config, chat, inference)


async def act(config: Config) -> int:
    """Play episodes for config's run. Returns the exit code.

    Raises:
        ConfigError: an address that is not usable, or tasks that the environment servers lack.
        PeerUnreachableError: no learner, no inference or no environment server.
        LearnerRefusedError, PushRefusedError: the learner serves another run, or another actor
            goes by this one's name.
    """
    control = RoleControl("actor")
    server = RoleServer("actor", config.actor.listen, config.network, [], control)
    learner = TaskClient(config.network.learner, config.network)
    inference = InferencePool(
        config.network,
        config.actor.generate_timeout_seconds,
        with_routes=config.model.router_replay,
    )
    environments = EnvironmentPool(config.network, config.actor.step_timeout_seconds)
    try:
        await server.bind()
        metrics.start_exporter(config.actor.metrics_listen, "actor")
        chat = await _connect(config, control, learner, inference, environments)
        if chat:
            async with recording_endpoint(config, chat, inference) as recordings:
                own = TokenPolicy(chat, inference, recordings)
                async with agent_policy(config, own) as policy:
                    player = Player(policy, environments)
                    await _play(config, control, server, learner, player)
    finally:
        await server.stop()
        for peer in (learner, inference, environments):
            await peer.close()
    return 0


async def _connect(
    config: Config,
    control: RoleControl,
    learner: TaskClient,
    inference: InferencePool,
    environments: EnvironmentPool,
) -> ChatFormat | None:
    """Wait for all peers and get the chat format; None if the process is to end meanwhile."""

    async def connect() -> ChatFormat:
        for peer in (learner, inference, environments):
            await peer.wait_ready()
        tasks = config.learner.tasks
        await environments.check_tasks(
            tasks.suite, tasks.split, tasks.first_ordinal + tasks.num_tasks
        )
        if config.learner.evaluation.every_steps:
            heldout = config.learner.evaluation
            await environments.check_tasks(
                tasks.suite, heldout.split, heldout.first_ordinal + heldout.num_tasks
            )
        return await fetch_chat(config, learner)

    connecting = asyncio.create_task(connect())
    draining = asyncio.create_task(control.draining.wait())
    try:
        await asyncio.wait((connecting, draining), return_when=asyncio.FIRST_COMPLETED)
        return connecting.result() if connecting.done() else None
    finally:
        connecting.cancel()
        draining.cancel()
        await asyncio.gather(connecting, draining, return_exceptions=True)


async def _play(
    config: Config, control: RoleControl, server: RoleServer, learner: TaskClient, player: Player
) -> None:
    actor_id = f"{socket.gethostname()[:40]}-{os.getpid()}"
    uplink = Uplink(learner.channel, config.run.name, actor_id, config.actor.max_unacked_bytes)
    worker = Worker(
        config.run.name, actor_id, config.actor.concurrency, learner, player, uplink, control
    )
    control.figures = lambda: {
        "running_episodes": worker.num_running,
        "unacked_records": uplink.num_unacked,
    }
    sender = asyncio.create_task(uplink.run())
    sender.add_done_callback(lambda _: control.drain())  # refused for good: no use in playing on
    await server.set_serving()
    try:
        await worker.run()
        if sender.done():
            sender.result()  # raises what ended it
    finally:
        sender.cancel()
