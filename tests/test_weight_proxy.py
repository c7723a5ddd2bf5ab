"""Whatever is damaged on the way between a trainer, the store and a replica is never served."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from inference.scripted import ScriptedEngine
from inference.subscriber import WeightSubscriber
from inference.weights import Shadow
from inference_helpers import nudge, upstream_of, write_word_bundle
from understudy.config import InferenceConfig
from understudy.v1 import weight_pb2_grpc

from intake_rig import Rig, make_config, make_part, publish_part, running  # isort: skip
from weight_proxy import KINDS, Mischief, WeightProxy  # isort: skip
import grpc  # isort: skip

NUM_TRIES = 10
"""Times that each kind of damage is done."""
FIRST = {
    "model.norm.weight": np.arange(64, dtype=np.float32),
    "lm_head.weight": np.random.default_rng(0).normal(size=(1024, 700)).astype("f4"),
}
kinds = pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])


class CheckedEngine(ScriptedEngine):
    """Fails on weights that are not those which were published under their version."""

    def __init__(self) -> None:
        super().__init__(InferenceConfig())
        self.published: dict[int, dict[str, np.ndarray]] = {}
        self.loaded = asyncio.Condition()

    async def load_weights(self, shadow: Shadow, version: int) -> float:
        expected = self.published[version]
        assert {entry.name for entry in shadow.layout} == expected.keys()
        for entry, data in shadow:
            np.testing.assert_array_equal(
                data.view("<u4"), expected[entry.name].reshape(-1).view("<u4")
            )
        async with self.loaded:
            seconds = await super().load_weights(shadow, version)
            self.loaded.notify_all()
        return seconds

    async def wait_for(self, version: int) -> None:
        async with self.loaded, asyncio.timeout(20):
            await self.loaded.wait_for(lambda: self.version == version)


@contextlib.asynccontextmanager
async def proxied(tmp_path: Path) -> AsyncIterator[tuple[Rig, WeightProxy, str]]:
    async with running(make_config(tmp_path), version=False) as rig:
        proxy = WeightProxy(f"127.0.0.1:{rig.server._server.port}")
        address = await proxy.start()
        yield rig, proxy, address
        await proxy.stop()


@contextlib.asynccontextmanager
async def following(tmp_path: Path, address: str) -> AsyncIterator[CheckedEngine]:
    engine = CheckedEngine()
    await engine.start(write_word_bundle(tmp_path / "words"))
    async with upstream_of(address) as upstream:
        follower = asyncio.create_task(WeightSubscriber(upstream, engine, "replica").run())
        yield engine
        follower.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await follower  # an assertion in load_weights comes out here


@kinds
@pytest.mark.parametrize("as_delta", [True, False], ids=["delta", "full copy"])
async def test_a_damaged_fetch_is_refused_and_healed(
    tmp_path: Path, kind: Mischief, as_delta: bool
) -> None:
    rng = random.Random(1)
    async with (
        proxied(tmp_path) as (rig, proxy, address),
        following(tmp_path, address) as engine,
    ):
        tensors = engine.published[1] = FIRST
        assert await rig.publish_part(*make_part(tensors, epoch=rig.epoch)) == 1
        await engine.wait_for(1)
        for version in range(2, 2 + NUM_TRIES):
            before, tensors = tensors, nudge(tensors, version)
            base = {"base": before, "base_version": version - 1} if as_delta else {}
            engine.published[version] = tensors
            proxy.mischief = kind(rng)
            part = make_part(tensors, version - 1, epoch=rig.epoch, **base)
            assert await rig.publish_part(*part) == version
            await engine.wait_for(version)
        assert proxy.num_damaged == NUM_TRIES


@kinds
@pytest.mark.parametrize("as_delta", [True, False], ids=["delta", "full copy"])
async def test_a_damaged_part_is_refused_and_taken_when_sent_again(
    tmp_path: Path, kind: Mischief, as_delta: bool
) -> None:
    rng = random.Random(2)
    async with proxied(tmp_path) as (rig, proxy, address), grpc.aio.insecure_channel(address) as ch:
        stub = weight_pb2_grpc.WeightServiceStub(ch)
        tensors = FIRST
        await publish_part(stub, *make_part(tensors, epoch=rig.epoch))
        for version in range(2, 2 + NUM_TRIES):
            before, tensors = tensors, nudge(tensors, version)
            base = {"base": before, "base_version": version - 1} if as_delta else {}
            part = make_part(tensors, version - 1, epoch=rig.epoch, **base)
            proxy.mischief = kind(rng)
            with pytest.raises(grpc.aio.AioRpcError):
                await publish_part(stub, *part)
            assert rig.server.weights.store.newest_version == version - 1
            assert await publish_part(stub, *part) == version
        assert proxy.num_damaged == NUM_TRIES
