"""What the store tells of versions, to whom it serves and to the intake."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from intake_rig import Rig, make_config, make_part, publish_part, running
from learner.intake.server import IntakeServer
from learner.weights import intake_link
from learner.weights.disk import WeightDisk
from learner.weights.head import Head
from learner.weights.server import StoreServer
from understudy.config import NetworkConfig
from understudy.rpc import open_channel
from understudy.v1 import weight_pb2, weight_pb2_grpc
from weight_processes import free_port
from weight_store_helpers import WEIGHTS, moved, reason_of


@contextlib.asynccontextmanager
async def apart(folder: Path) -> AsyncIterator[tuple[Rig, weight_pb2_grpc.WeightServiceStub]]:
    """An intake and a store of its own."""
    base = make_config(folder)
    learner, weights = (f"127.0.0.1:{free_port()}" for _ in range(2))
    update = {
        "network": NetworkConfig(learner=learner, weights=weights),
        "learner": base.learner.model_copy(update={"listen": learner}),
    }
    config = base.model_copy(update=update)
    intake = await IntakeServer.open(config)
    await intake.start()
    store = await StoreServer.open(config)
    await store.start()
    async with (
        open_channel(learner, config.network) as to_intake,
        open_channel(weights, config.network) as to_store,
    ):
        yield Rig(intake, to_intake), weight_pb2_grpc.WeightServiceStub(to_store)
    await store.stop(0.2)
    await intake.stop(0.2)


async def test_weights_that_are_on_their_way_to_the_disk_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_link, "ATTACH_SECONDS", 0.05)
    write, begun, gate = WeightDisk.write, threading.Event(), threading.Event()

    def write_slowly(*arguments: object) -> object:
        begun.set()
        gate.wait(30)
        return write(*arguments)

    monkeypatch.setattr(WeightDisk, "write", write_slowly)
    async with apart(tmp_path) as (rig, store):
        await rig.train()
        async with asyncio.timeout(10):
            while await reason_of(rig.batch(0, timeout=0.1)) != "WEIGHTS_LOST":
                pass
        part = make_part(WEIGHTS, epoch=rig.epoch)
        publishing = asyncio.create_task(publish_part(store, *part, timeout=30))
        assert await asyncio.to_thread(begun.wait, 10)
        assert await reason_of(rig.batch(0, timeout=0.5)) == "DEADLINE_EXCEEDED"
        gate.set()
        assert await publishing == 1
        assert await reason_of(rig.batch(0, timeout=0.5)) == "DEADLINE_EXCEEDED"


async def test_a_version_is_announced_once_it_can_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, applied, gate = Head.apply, threading.Event(), threading.Event()

    def apply_and_wait(*arguments: object) -> None:
        apply(*arguments)
        applied.set()
        gate.wait(30)

    async with running(make_config(tmp_path)) as rig:
        monkeypatch.setattr(Head, "apply", apply_and_wait)
        publishing = asyncio.create_task(rig.publish(1))
        assert await asyncio.to_thread(applied.wait, 10)
        watch = rig.weights.WatchVersions(weight_pb2.WatchVersionsRequest())
        assert (await watch.read()).version == 1
        assert rig.server.weights.store.newest_version == 1
        gate.set()
        assert (await watch.read()).version == await publishing == 2
        watch.cancel()


async def test_a_store_that_lost_its_newest_version_is_published_to_again(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        await rig.publish_part(*make_part(WEIGHTS))
        new = moved(WEIGHTS)
        await rig.publish_part(*make_part(new, 1, base=WEIGHTS, base_version=1))
    path = config.run.path / "weights" / "delta-00000002.weights"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    async with running(config, version=False) as rig:
        assert rig.server.weights.store.newest_version == 1
        assert rig.server.weights.store.version_to_attach == 0
        assert await reason_of(rig.batch(0, timeout=0.5)) == "WEIGHTS_LOST"
        assert await rig.publish_part(*make_part(new, 1, epoch=rig.epoch)) == 3
        assert rig.server.weights.store.version_to_attach == 3
        assert await reason_of(rig.batch(0, timeout=0.5)) == "DEADLINE_EXCEEDED"


async def test_what_is_published_again_counts_though_an_older_version_says_the_same(
    tmp_path: Path,
) -> None:
    """Else the trainer would be told for ever that the weights are lost."""
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        await rig.publish_part(*make_part(WEIGHTS))
        await rig.publish_part(*make_part(moved(WEIGHTS), 1, base=WEIGHTS, base_version=1))
    (config.run.path / "weights" / "delta-00000002.weights").write_bytes(b"lost")
    async with running(config, version=False, trainer=False) as rig:
        assert rig.server.weights.store.version_to_attach == 0
        part = make_part(WEIGHTS)  # as version 1, which is held
        assert await rig.publish_part(*part) == 3
        assert await rig.publish_part(*part) == 3
        assert rig.server.weights.store.version_to_attach == 3
        assert await reason_of(rig.batch(0, timeout=0.5)) == "DEADLINE_EXCEEDED"
