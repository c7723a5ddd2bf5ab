"""Who published what under which number, and who served what: compared from the outside.

Trainer (the trainer's own sender, two ranks) -> the store -> Follower (a replica's subscriber)
         |                                                          |
         +--> History.published                History.served <-----+
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import torch

from inference.scripted import ScriptedEngine
from inference.subscriber import Upstream, WeightSubscriber
from inference.weights import Shadow
from learner.trainer.architectures import ShardSlice
from learner.trainer.part import FrozenSlices
from learner.trainer.sender import PartSender
from learner.trainer.snapshot import HostCopy
from understudy.client import WeightClient
from understudy.config import InferenceConfig, NetworkConfig
from understudy.rpc import error_reason, open_sync_channel
from understudy.v1 import weight_pb2, weight_pb2_grpc
from understudy.weights.manifest import seal

from inference_helpers import write_word_bundle  # isort: skip
from intake_rig import make_part  # isort: skip
from weight_processes import Processes  # isort: skip
from weight_store_helpers import LOWER, UPPER, WEIGHTS, moved, tensors_of  # isort: skip

Values = dict[str, bytes]


class History:
    """What is known from the outside."""

    def __init__(self) -> None:
        self.published: dict[int, Values] = {}
        """By the number that the trainer was answered with."""
        self.served: dict[str, list[tuple[int, Values]]] = {}
        """By who served it, in order."""

    def publishes(self, version: int, values: Values) -> None:
        """A trainer was answered; no number stands for two things."""
        assert self.published.setdefault(version, values) == values

    def serves(self, who: str, version: int, values: Values) -> None:
        """Somebody serves a version from now on."""
        self.served.setdefault(who, []).append((version, values))

    def check(self) -> None:
        """Nobody went back, and all was bit-equal to what was published under its number."""
        for who, served in self.served.items():
            numbers = [version for version, _ in served]
            assert numbers == sorted(numbers), who
            for version, values in served:
                assert values == self.published[version], (who, version)


class Rank:
    """One rank of a trainer: a shard, its committed copy and its sender, as Publisher has them."""

    def __init__(self, network: NetworkConfig, index: int, rows: slice) -> None:
        self.index = index
        self.rows = rows
        pieces = list(self._cut(WEIGHTS))
        self._committed, self._spare = (
            HostCopy(pieces, "F32", torch.device("cpu")) for _ in range(2)
        )
        self._sender = PartSender(network, FrozenSlices(HostCopy([], "F32", torch.device("cpu"))))
        self._version = 0

    def publish(self, tensors: dict[str, np.ndarray], epoch: int, step: int) -> int:
        """Deliver this rank's part, however long that takes."""
        self._spare.fill(self._cut(tensors))
        header = weight_pb2.PartHeader(
            run_id="run", epoch=epoch, step=step, part_index=self.index, num_parts=2
        )
        self._version = self._sender.deliver(header, self._spare, self._committed, self._version)
        self._committed, self._spare = self._spare, self._committed
        return self._version

    def close(self) -> None:
        """End what is under way."""
        self._sender.close()

    def _cut(self, tensors: dict[str, np.ndarray]) -> Iterator[ShardSlice]:
        for name, tensor in tensors.items():
            width = tensor[0].size
            first = self.rows.indices(len(tensor))[0]
            yield ShardSlice(
                name=name,
                shape=tensor.shape,
                start=first * width,
                values=torch.from_numpy(tensor[self.rows].reshape(-1).copy()),
            )


class Trainer:
    """Two ranks that publish WEIGHTS, and then one version after another; each epoch goes another
    way."""

    def __init__(self, network: NetworkConfig, epoch: int, history: History) -> None:
        self.epoch = epoch
        self.tensors = WEIGHTS
        self.step = -1
        self.versions: list[int] = []
        self.ranks = tuple(Rank(network, i, rows) for i, rows in enumerate((UPPER, LOWER)))
        self.may_begin = asyncio.Event()
        """Cleared, `publish_until` begins no other version."""
        self.may_begin.set()
        self._history = history
        self._threads = ThreadPoolExecutor(len(self.ranks))

    async def publish(self) -> int:
        """Publish the next step's weights; returns their number. Raises as PartSender.deliver."""
        self.step += 1
        if self.step:
            self.tensors = moved(self.tensors, seed=1000 * self.epoch + self.step)
        parts = [self.publish_part(rank) for rank in self.ranks]
        outcomes = await asyncio.gather(*parts, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        version, *others = outcomes
        assert others == [version]
        self._history.publishes(version, tensors_of(self.tensors))
        self.versions.append(version)
        return version

    async def publish_part(self, rank: Rank) -> int:
        """One rank's part alone."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, rank.publish, self.tensors, self.epoch, self.step
        )

    async def publish_until(self, end: asyncio.Event) -> None:
        """Publish without a pause; the last version is the one after the end."""
        ending = False
        while not ending:
            await self.may_begin.wait()
            ending = end.is_set()
            await self.publish()

    async def publishes(self, number: int) -> None:
        """Wait until so many more versions are there, of a trainer that publishes on its own."""
        goal = len(self.versions) + number
        async with asyncio.timeout(30):
            while len(self.versions) < goal:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.01)

    def close(self) -> None:
        """End what is under way."""
        for rank in self.ranks:
            rank.close()
        self._threads.shutdown()


class Follower(ScriptedEngine):
    """Writes down what it is given to serve."""

    def __init__(self, history: History, name: str) -> None:
        super().__init__(InferenceConfig())
        self._history = history
        self._name = name

    async def load_weights(self, shadow: Shadow, version: int) -> float:
        values = {entry.name: data.tobytes() for entry, data in shadow}
        self._history.serves(self._name, version, values)
        return await super().load_weights(shadow, version)

    async def serves(self, version: int) -> None:
        """Wait until it serves this version, or a newer one."""
        async with asyncio.timeout(30):
            while self.version < version:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def training(running: Processes, history: History) -> AsyncIterator[Trainer]:
    """A trainer, which replaces those before it."""
    trainer = Trainer(running.config.network, await running.train(), history)
    try:
        yield trainer
    finally:
        await asyncio.to_thread(trainer.close)


@contextlib.asynccontextmanager
async def following(
    running: Processes, history: History, name: str = "follower"
) -> AsyncIterator[Follower]:
    """A replica in this process, which is never killed."""
    engine = Follower(history, name)
    await engine.start(write_word_bundle(running.config.run.directory / name))
    upstream = Upstream(
        channel=running.weight_channel,
        learner=running.intake_channel,
        address="the store",
        patience_seconds=30.0,
    )
    life = asyncio.create_task(WeightSubscriber(upstream, engine, name).run())
    try:
        yield engine
        assert not life.done()
    finally:
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)


async def look(address: str, history: History, who: str) -> int:
    """Take a whole version from a node, every digest checked; returns its number."""
    async with WeightClient.connect(address) as client:
        await client.wait_ready()
        held = await client.fetch()
    values = {name: array.tobytes() for name, array in held.arrays().items()}
    history.serves(who, held.version, values)
    return held.version


def store_address(running: Processes) -> str:
    """Where parts are sent."""
    return running.config.network.weights or running.config.network.learner


def is_taken(running: Processes, epoch: int) -> bool:
    """Whether a publication is under way; asked with a part that is never good."""
    header, payload = make_part(WEIGHTS, 99, num_parts=9, epoch=epoch)
    header.slices[0].digest = bytes(32)
    seal(header)
    messages = [{"header": header}, {"chunk": payload}]
    with open_sync_channel(store_address(running), running.config.network) as channel:
        stub = weight_pb2_grpc.WeightServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refusal:
            stub.PublishWeights(iter(weight_pb2.PublishWeightsRequest(**one) for one in messages))
    reason = error_reason(refusal.value)
    assert reason in ("PART_CONFLICT", "BAD_DIGEST")
    return reason == "PART_CONFLICT"


async def until_taken(running: Processes, epoch: int, *, taken: bool) -> None:
    """Wait until a publication is under way, or none is."""
    async with asyncio.timeout(10):
        while await asyncio.to_thread(is_taken, running, epoch) != taken:  # noqa: ASYNC110 - as seen
            await asyncio.sleep(0.02)
