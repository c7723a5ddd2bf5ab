"""Weights all the way: the trainer's publisher, the intake's store, a client that follows."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from learner.intake.server import IntakeServer
from learner.trainer.intake_client import IntakeClient
from learner.trainer.ranks import Ranks, joined
from understudy.client.weights import WeightClient, Weights
from understudy.config import Config
from understudy.rpc import open_sync_channel
from understudy.weights.encoding import words

from intake_rig import make_config  # isort: skip
from publishing import CASES, Case, Published  # isort: skip


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as only:
        yield only


def config_of(folder: Path, case: Case) -> Config:
    config = make_config(folder)
    return config.model_copy(update={"run": config.run.model_copy(update={"name": case.name})})


def start_training(address: str, config: Config, ranks: Ranks) -> int:
    with open_sync_channel(address, config.network) as channel:
        return IntakeClient(channel, config, ranks).start_training(0, b"")


def publish(run: Published, step: int) -> None:
    run.publisher.submit(step)
    run.publisher.flush()


def assert_holds(held: Weights, run: Published) -> None:
    state = run.state()
    assert state.keys() == {entry.name for entry in held.buffer.layout}
    for entry in held.buffer.layout:
        found = words(entry.dtype, held.buffer.tensor_bytes(entry.name))
        np.testing.assert_array_equal(found, state[entry.name].ravel(), err_msg=entry.name)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
async def test_who_follows_the_store_holds_the_trainers_state(
    tmp_path: Path, case: Case, ranks: Ranks
) -> None:
    config = config_of(tmp_path, case)
    server = await IntakeServer.open(config)
    address = f"127.0.0.1:{await server.start()}"
    epoch = await asyncio.to_thread(start_training, address, config, ranks)
    run = Published(case.make_bundle(tmp_path), case, address, ranks, epoch=epoch)
    held: Weights | None = None
    async with WeightClient(address, config.network) as client:
        for step in range(4):
            if step:
                run.step(step)
            await asyncio.to_thread(publish, run, step)
            held = await client.fetch(held)
            assert held.manifest.base_version == step
            assert_holds(held, run)
    run.publisher.close()
    await server.stop()


async def test_a_store_that_lost_its_disk_is_sent_all_values(tmp_path: Path, ranks: Ranks) -> None:
    case = CASES[0]
    config = config_of(tmp_path, case)
    server = await IntakeServer.open(config)
    port = await server.start()
    address = f"127.0.0.1:{port}"
    epoch = await asyncio.to_thread(start_training, address, config, ranks)
    run = Published(case.make_bundle(tmp_path), case, address, ranks, epoch=epoch)
    await asyncio.to_thread(publish, run, 0)
    await server.stop()
    shutil.rmtree(config.run.path / "weights")
    run.step(1)
    run.publisher.submit(1)  # while nobody is there
    learner = config.learner.model_copy(update={"listen": address})
    server = await IntakeServer.open(config.model_copy(update={"learner": learner}))
    await server.start()
    await asyncio.to_thread(run.publisher.flush)
    async with WeightClient(address, config.network) as client:
        held = await client.fetch()
    assert held.version == 2
    assert held.manifest.base_version == 0
    assert_holds(held, run)
    run.publisher.close()
    await server.stop()
