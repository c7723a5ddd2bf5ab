"""A run whose episodes a plain client plays: actor, intake and batches are real."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from actor.evaluation.evaluate import evaluate
from actor.server import act
from actor.worker import Worker
from evaluation_helpers import plan_of
from inference.scripted import LOGPROB
from recording_helpers import EXAMPLE, call, harnesses, player
from test_actor import engine, intake, make_config
from test_harness import script
from understudy.chat import ChatFormat
from understudy.client import BatchClient, TaskClient
from understudy.client.trajectories import Uplink
from understudy.config import NetworkConfig
from understudy.rpc import RoleControl

REPLIES = [call("echo", '{"text": "hi"}'), "0"]
ONE_BATCH = {
    "listen": "127.0.0.1:0",
    "metrics_listen": "127.0.0.1:0",
    "tasks": {"suite": "mine", "group_size": 2, "groups_per_batch": 2, "num_tasks": 4},
    "train": {"steps": 1},
    "algorithm": {"name": "ppo"},  # which needs no rewards that differ in a group
}


async def test_what_is_trained_is_what_was_sampled(
    tmp_path: Path, bundle: Path, chat: ChatFormat
) -> None:
    async with AsyncExitStack() as stack:
        inference = await stack.enter_async_context(engine(bundle, REPLIES))
        table: dict[str, Any] = {"command": EXAMPLE, "tasks": "suites:EchoSuite"}
        environment = await stack.enter_async_context(harnesses({"mine": table}))
        config = make_config(tmp_path, bundle, learner=ONE_BATCH)
        _, learner = await stack.enter_async_context(intake(config))
        network = {"learner": learner, "inference": [inference], "envservers": [environment]}
        actor = {**config.actor.model_dump(), "recording_listen": "127.0.0.1:0"}
        config = make_config(tmp_path, bundle, learner=ONE_BATCH, network=network, actor=actor)
        batches = await stack.enter_async_context(BatchClient(learner, NetworkConfig()))
        code, trajectories = await asyncio.gather(act(config), _one_batch(batches))
    assert code == 0
    assert len(trajectories) == 4
    for trajectory in trajectories:
        (segment,) = trajectory.segments
        sampled = chat.decode(segment.token_ids[segment.loss_mask])
        assert sampled == f"{REPLIES[0]}<|im_end|>0<|im_end|>"
        assert set(segment.logprobs.tolist()) == {LOGPROB}
        assert [span.version for span in segment.version_spans] == [1]
        assert trajectory.reward == float(trajectory.task_ordinal == 0)


async def _one_batch(batches: BatchClient) -> list[Any]:
    batches.epoch = 1  # of the training that `intake` began
    batch = await batches.next_batch(0, timeout=120)
    await batches.complete_step(0)
    return [entry.trajectory for entry in batch.trajectories]


async def test_a_drain_ends_commands_that_never_end(
    tmp_path: Path, bundle: Path, chat: ChatFormat
) -> None:
    file = tmp_path / "pid"
    wait = ("ask()", f"open({str(file)!r}, 'w').write(str(os.getpid()))", "import time")
    table = script(*wait, "time.sleep(600)")
    async with AsyncExitStack() as stack:
        inference = await stack.enter_async_context(engine(bundle, REPLIES))
        environment = await stack.enter_async_context(harnesses({"mine": table}))
        play = await stack.enter_async_context(player(chat, bundle, inference, environment))
        config = make_config(tmp_path, bundle, learner=ONE_BATCH)
        _, learner = await stack.enter_async_context(intake(config))
        tasks = await stack.enter_async_context(TaskClient.connect(learner))
        control = RoleControl("actor")
        control.serving()
        uplink = Uplink(tasks.channel, "run", "a", max_bytes=2**20)
        worker = Worker("run", "a", 1, tasks, _Playing(play), uplink, control)  # type: ignore[arg-type]
        working = asyncio.create_task(worker.run(grace=0.1))
        async with asyncio.timeout(60):
            while not (file.exists() and file.read_text()):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.05)
            control.drain()
            await working
            pid = int(file.read_text())
            while psutil.pid_exists(pid):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.05)


class _Playing:
    """A player of one method."""

    def __init__(self, play: Any) -> None:
        self.play = play


async def test_an_evaluation_plays_harnesses_too(tmp_path: Path, bundle: Path) -> None:
    async with AsyncExitStack() as stack:
        inference = await stack.enter_async_context(engine(bundle, ["1"]))
        table = script("print(ask())")
        environment = await stack.enter_async_context(harnesses({"mine": table}))
        _, learner = await stack.enter_async_context(intake(make_config(tmp_path, bundle)))
        network = {"learner": learner, "inference": [inference], "envservers": [environment]}
        actor = {"metrics_listen": "127.0.0.1:0", "recording_listen": "127.0.0.1:0"}
        config = make_config(tmp_path, bundle, network=network, actor=actor)
        result = await evaluate(config, plan_of(suite="mine", k=1))
    assert (result["num_tasks"], result["num_failed"], result["turns_mean"]) == (3, 0, 1.0)
    assert result["accuracy"]["all"]["accuracy"] == pytest.approx(1 / 3)
