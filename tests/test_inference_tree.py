"""Inference servers that pass on what they hold: learner -> A -> B."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from inference.fetch import HeldVersion
from inference.server import serve_inference
from inference.shelf import Shelf
from inference.weights import ShadowPool
from inference_helpers import WeightStore, fill_shadow, nudge, pack, write_word_bundle
from understudy.client import ControlClient, InferenceClient, WeightClient, Weights
from understudy.config import Config
from understudy.rpc import error_reason
from understudy.v1 import common_pb2, weight_pb2
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import plan_layout
from understudy.weights.links import fetch_responses
from understudy.weights.transfer import HeldWeights

TENSORS = {
    "model.norm.weight": np.arange(64, dtype=np.float32),
    "lm_head.weight": np.arange(2**16, dtype=np.float32),
}
PROMPT = np.array([2, 3], np.int32)


class Tree:
    """A store, and servers below it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = WeightStore(write_word_bundle(folder / "bundle"))
        self.learner = ""
        self.tensors = TENSORS

    def address(self, name: str) -> str:
        return f"unix:{self.folder}/{name}"

    def config(self, name: str, upstream: str | None) -> Config:
        weights = {"weights": {"upstream": self.address(upstream)}} if upstream else {}
        return Config.model_validate(
            {
                "model": {"path": str(self.folder)},
                "network": {"learner": self.learner},
                "inference": {
                    "listen": self.address(name),
                    "metrics_listen": "127.0.0.1:0",
                    "engine": "scripted",
                    "scripted": {"latency_seconds": 0.0},
                    **weights,
                },
            }
        )

    @contextlib.asynccontextmanager
    async def node(self, name: str, upstream: str | None = None) -> AsyncIterator[InferenceClient]:
        life = asyncio.create_task(serve_inference(self.config(name, upstream)))
        async with InferenceClient.connect(self.address(name)) as client:
            yield client
        async with ControlClient.connect(self.address(name)) as control:
            await control.drain()
        assert await life == 0

    async def publish(self, version: int) -> None:
        """The next version: the first in full, then deltas."""
        if version == 1:
            await self.store.announce(pack(self.tensors, 1))
            return
        after = nudge(self.tensors, version)
        await self.store.announce(pack(after, version, base=(version - 1, self.tensors)))
        self.tensors = after

    async def fetch_from(self, name: str, base: Weights | None = None) -> Weights:
        async with WeightClient.connect(self.address(name)) as client:
            return await client.fetch(base)


@pytest.fixture
async def tree(tmp_path: Path) -> AsyncIterator[Tree]:
    found = Tree(tmp_path)
    found.learner = await found.store.start()
    yield found
    await found.store.server.stop(0)


async def serves(client: InferenceClient, version: int) -> None:
    """Wait until a server serves a version."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                if (await client.describe()).version == version:
                    return
            await asyncio.sleep(0.02)


def assert_held(weights: Weights, tensors: dict[str, np.ndarray]) -> None:
    for name, value in weights.arrays().items():
        np.testing.assert_array_equal(value, tensors[name])


async def test_weights_and_model_come_from_the_node_above(tree: Tree) -> None:
    async with tree.node("a") as first:
        await tree.publish(1)
        await serves(first, 1)
        async with tree.node("b", upstream="a") as second:
            await serves(second, 1)
            assert len(tree.store.requests) == 1
            assert (await second.describe()).bundle_digest == "b1"
            for version in (2, 3, 4):
                await tree.publish(version)
                await serves(second, version)
            assert [request.base_version for request in tree.store.requests] == [0, 1, 2, 3]
            assert_held(await tree.fetch_from("b"), tree.tensors)
            sampling = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=4)
            reply = await second.generate(PROMPT, sampling)
            assert [span.version for span in reply.version_spans] == [4]


async def test_a_node_that_starts_before_the_one_above_waits_for_it(tree: Tree) -> None:
    async with tree.node("b", upstream="a") as second:
        await asyncio.sleep(0.2)
        async with tree.node("a"):
            await asyncio.sleep(0.2)
            await tree.publish(1)
            await serves(second, 1)


async def test_node_goes_on_without_the_one_above_and_finds_it_again(tree: Tree) -> None:
    async with contextlib.AsyncExitStack() as second_life:
        async with tree.node("a") as first:
            await tree.publish(1)
            await serves(first, 1)
            second = await second_life.enter_async_context(tree.node("b", upstream="a"))
            await serves(second, 1)
        await tree.publish(2)
        sampling = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=4)
        reply = await second.generate(PROMPT, sampling)
        assert [span.version for span in reply.version_spans] == [1]
        async with tree.node("a"):
            await serves(second, 2)


async def test_joining_while_versions_come_ends_on_the_newest(tree: Tree) -> None:
    async with tree.node("a") as first:
        await tree.publish(1)
        await serves(first, 1)

        async def train() -> None:
            for version in range(2, 12):
                await tree.publish(version)
                await asyncio.sleep(0.05)

        training = asyncio.create_task(train())
        async with tree.node("b", upstream="a") as second, tree.node("c", upstream="b") as third:
            await training
            await serves(second, 11)
            await serves(third, 11)
            assert_held(await tree.fetch_from("c"), tree.tensors)


async def test_the_holder_of_an_older_version_is_sent_the_deltas(tree: Tree) -> None:
    async with tree.node("a") as first:
        await tree.publish(1)
        await serves(first, 1)
        old = await tree.fetch_from("a")
        for version in (2, 3):
            await tree.publish(version)
            await serves(first, version)
        new = await tree.fetch_from("a", base=old)
        assert new.manifest.base_version == 2
        assert_held(new, tree.tensors)
        assert_held(old, TENSORS)
        assert await tree.fetch_from("a", base=new) is new


async def test_publishing_to_a_node_that_passes_on_is_refused(tree: Tree) -> None:
    async with tree.node("a"), WeightClient.connect(tree.address("a")) as client:
        await client.wait_ready()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.publish(TENSORS, step=0, epoch=1, run_id="r")
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.fetch()
        assert error_reason(refused.value) == "UNKNOWN_VERSION"


async def test_watch_ends_when_the_node_does(tree: Tree) -> None:
    async with WeightClient.connect(tree.address("a")) as client:
        async with tree.node("a"):
            await client.wait_ready()
            watch = asyncio.create_task(anext(client.watch_versions()))
            await asyncio.sleep(0.1)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await watch
        assert error_reason(ended.value) == "DRAINING"


LAYOUT = plan_layout([("w", "F32", (4,))])


def test_shadow_that_is_read_is_left_alone_while_there_is_room() -> None:
    pool = ShadowPool()
    served = pool.take(LAYOUT, ())
    read = pool.take(LAYOUT, {served})
    read.version = 7
    with read.reading():
        third = pool.take(LAYOUT, {served})
        assert third not in (served, read)
        assert read.version == 7
        assert pool.take(LAYOUT, {served, third}) is read  # no room for a fourth
        assert read.version == 0
    assert len(pool._shadows) == 3
    pool.take(LAYOUT, {served})
    assert len(pool._shadows) == 2


async def test_stream_of_a_copy_that_had_to_make_room_ends() -> None:
    link, shadow = pack(TENSORS, 3), fill_shadow(TENSORS)
    shelf, shadow.version = Shelf(), 3
    weights = HeldWeights(manifest=link.manifest, buffer=shadow)
    shelf.put(HeldVersion(weights=weights, shadow=shadow))
    request = weight_pb2.FetchWeightsRequest()
    stream = fetch_responses(shelf.links, request, lambda link, num_bytes: None)
    assert (await anext(stream)).manifest == link.manifest
    assert (await shelf.links.full.payload.read(0, link.num_bytes)) == (
        await link.payload.read(0, link.num_bytes)
    )
    shadow.version = 0
    with pytest.raises(WeightsRefusedError, match="UNKNOWN_VERSION"):
        await anext(stream)
