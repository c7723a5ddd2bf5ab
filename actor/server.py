"""The actor's process: connects to its peers, then works until the run is over or it drains."""

import asyncio
import os
import socket
import tempfile
from pathlib import Path

from actor.environment_pool import EnvironmentPool
from actor.episode import Player
from actor.inference_pool import InferencePool
from actor.uplink import Uplink
from actor.worker import Worker
from understudy import metrics
from understudy.chat import ChatFormat
from understudy.client import TaskClient, fetch_model_bundle
from understudy.config import Config
from understudy.rpc import RoleControl, RoleServer


async def fetch_chat(config: Config, learner: TaskClient) -> ChatFormat:
    """The run's chat template and tokenizer, from the learner."""
    with tempfile.TemporaryDirectory(prefix="understudy-bundle-") as folder:
        await fetch_model_bundle(learner.channel, Path(folder))
        return ChatFormat.load(Path(folder), config.model.tools)


async def act(config: Config) -> int:
    """Play episodes for config's run. Returns the exit code."""
    control = RoleControl("actor")
    server = RoleServer("actor", config.actor.listen, config.network, [], control)
    await server.bind()
    metrics.start_exporter(config.actor.metrics_listen, "actor")
    learner = TaskClient(config.network.learner, config.network)
    inference = InferencePool(config.network, config.actor.generate_timeout_seconds)
    environments = EnvironmentPool(config.network, config.actor.step_timeout_seconds)
    for peer in (learner, inference, environments):
        await peer.wait_ready()
    actor_id = f"{socket.gethostname()[:40]}-{os.getpid()}"
    uplink = Uplink(learner.channel, config.run.name, actor_id, config.actor.max_unacked_bytes)
    player = Player(await fetch_chat(config, learner), inference, environments)
    worker = Worker(actor_id, config.actor.concurrency, learner, player, uplink, control)
    control.figures = lambda: {
        "running_episodes": worker.num_running,
        "unacked_records": uplink.num_unacked,
    }
    sender = asyncio.create_task(uplink.run())
    await server.set_serving()
    try:
        await worker.run()
    finally:
        sender.cancel()
        await server.stop()
        for peer in (learner, inference, environments):
            await peer.close()
    return 0
