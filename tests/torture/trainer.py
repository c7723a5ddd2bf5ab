"""A trainer of two ranks, and ghosts of its earlier epochs, through crashes of the intake."""

import asyncio
import contextlib
import hashlib
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import numpy as np

from tests.torture.history import Key, Share
from tests.torture.players import RETRY_SECONDS, TRANSIENT, World
from understudy.client import WeightClient
from understudy.rpc import error_reason, open_channel
from understudy.v1 import batch_pb2, batch_pb2_grpc

T = TypeVar("T")

WORLD_SIZE = 2
CHECKPOINT_EVERY_STEPS = 3


class Trainer:
    """Both ranks of a trainer that takes steps, saves checkpoints and starts again from them."""

    def __init__(self, world: World, restart_share: float = 0.05) -> None:
        self._world = world
        self._history = world.history
        self._restart_share = restart_share
        """Share of the steps after which the trainer starts again from a checkpoint."""
        self._random = random.Random(world.random.random())
        self._kept: list[int] = [0]
        """Steps of the checkpoints that are on the trainer's disk."""
        self._digests: dict[int, bytes] = {0: b""}
        self._epoch = 0
        self._channel = open_channel(world.address, world.config.network)
        self._stub = batch_pb2_grpc.BatchServiceStub(self._channel)

    async def run(self) -> None:
        """Train until cancelled."""
        async with WeightClient(self._world.address, self._world.config.network) as weights:
            try:
                while True:
                    await self._start(weights)
                    while self._random.random() >= self._restart_share:
                        await self._world.trains.wait()
                        await self._step(weights)
            finally:
                await self._channel.close()

    async def _start(self, weights: WeightClient) -> None:
        """Begin an epoch at a checkpoint that is kept, mostly the newest."""
        step = self._random.choice((self._kept[-1], self._kept[-1], self._kept[0]))
        self._kept = [kept for kept in self._kept if kept <= step]  # newer ones were no good
        request = batch_pb2.StartTrainingRequest(
            run_id="run", step=step, ledger_digest=self._digests[step]
        )
        before = self._epoch
        answer = await self._asked("StartTraining", request)
        self._epoch, self._world.step = answer.epoch, step
        self._history.training(answer.epoch, step)
        await self._publish(weights)
        if before:
            await self._haunt(weights, before)

    async def _step(self, weights: WeightClient) -> None:
        world, step = self._world, self._world.step
        await self._take_batch(weights, step)
        if self._random.random() < 0.2:
            await self._take_batch(weights, step)
        await self._asked(
            "CompleteStep",
            batch_pb2.CompleteStepRequest(step=step, epoch=self._epoch, metrics={"loss": 1.0}),
        )
        self._history.completed.append((step, self._epoch))
        self._history.figures["steps"] += 1
        self._digests[step + 1] = self._history.headers[step].ledger_digest
        world.step = step + 1
        if world.step % CHECKPOINT_EVERY_STEPS == 0:
            await self._save(world.step)
        await self._publish(weights)
        if self._random.random() < 0.05:
            await self._haunt(weights, self._epoch - 1)

    async def _take_batch(self, weights: WeightClient, step: int) -> None:
        """Each rank takes its share; the weights are published again to an intake without any."""
        while True:
            shares = await asyncio.gather(
                *(self._share(step, rank) for rank in range(WORLD_SIZE)), return_exceptions=True
            )
            lost = [share for share in shares if isinstance(share, BaseException)]
            if not lost:
                return
            if "WEIGHTS_LOST" in [self._why_lost(step, error) for error in lost]:
                await self._publish(weights)  # once, however many ranks were told
            await asyncio.sleep(RETRY_SECONDS)

    def _why_lost(self, step: int, error: BaseException) -> str:
        if not isinstance(error, grpc.aio.AioRpcError):
            raise error
        reason = error_reason(error)
        if reason != "WEIGHTS_LOST" and error.code() not in TRANSIENT:
            self._refused(f"NextBatch({step})", error)
        return reason

    async def _share(self, step: int, rank: int) -> None:
        request = batch_pb2.NextBatchRequest(
            step=step, rank=rank, world_size=WORLD_SIZE, epoch=self._epoch
        )
        header, got = None, []
        async for response in self._stub.NextBatch(request, timeout=5):
            if response.HasField("header"):
                header = response.header
                continue
            record = response.trajectory.record
            digest = hashlib.sha256(record.payload).digest()
            if digest != record.payload_digest:
                self._history.violation(f"step {step}: the payload of {record.task_key} changed")
            got.append((Key(record.task_key.ordinal, record.task_key.sample_index), digest))
        assert header is not None
        groups = tuple((group.ordinal, group.rewards, group.uniform) for group in header.groups)
        self._history.batch(
            Share(
                step=step,
                rank=rank,
                world_size=WORLD_SIZE,
                ledger_digest=header.ledger_digest,
                head_version=header.head_version,
                groups=groups,
                trajectories=frozenset(got),
            )
        )

    async def _save(self, step: int) -> None:
        """A checkpoint is on disk first, then told; older ones go once that is answered."""
        kept = [self._kept[-1], step]
        self._kept = [*self._kept, step] if step not in self._kept else self._kept
        request = batch_pb2.RecordCheckpointRequest(
            step=step, epoch=self._epoch, manifest_digest=b"m" * 32, oldest_kept_step=min(kept)
        )
        await self._asked("RecordCheckpoint", request)
        self._history.checkpoints.append((step, min(kept), self._epoch))
        self._history.figures["checkpoints"] += 1
        self._kept = sorted(set(kept))

    async def _publish(self, weights: WeightClient) -> None:
        step = self._world.step
        tensors = {"w": np.full(16, step, np.float32)}

        async def publish() -> int:
            return await weights.publish(
                tensors, step=step, epoch=self._epoch, run_id="run", timeout=5
            )

        version = await self._until_answered(f"PublishWeights({step})", publish)
        self._history.published(version, step, self._epoch)
        self._world.newest_version = max(self._world.newest_version, version)

    async def _haunt(self, weights: WeightClient, epoch: int) -> None:
        """A trainer that was followed by another must be refused, whatever it asks."""
        if epoch <= 0:
            return
        step = self._world.step
        last = max(step - 1, 0)
        ghosts: dict[str, Callable[[], Awaitable[object]]] = {
            "NextBatch": lambda: self._first(
                batch_pb2.NextBatchRequest(step=step, rank=0, world_size=WORLD_SIZE, epoch=epoch)
            ),
            "CompleteStep": lambda: self._stub.CompleteStep(
                batch_pb2.CompleteStepRequest(step=last, epoch=epoch), timeout=2
            ),
            "RecordCheckpoint": lambda: self._stub.RecordCheckpoint(
                batch_pb2.RecordCheckpointRequest(step=0, epoch=epoch), timeout=2
            ),
            "PublishWeights": lambda: weights.publish(
                {"w": np.zeros(16, np.float32)}, step=step, epoch=epoch, run_id="run", timeout=2
            ),
        }
        for name, call in ghosts.items():
            try:
                await call()
            except grpc.aio.AioRpcError as error:
                refused = error_reason(error) == "OLD_EPOCH"
                if not refused and error.code() not in TRANSIENT:
                    self._history.violation(f"{name} of epoch {epoch}: {error_reason(error)}")
                self._history.figures["ghosts refused"] += refused
            else:
                self._history.violation(
                    f"{name} of a trainer of epoch {epoch} was answered after {self._epoch}"
                )

    async def _first(self, request: batch_pb2.NextBatchRequest) -> None:
        call = self._stub.NextBatch(request, timeout=2)
        with contextlib.suppress(StopAsyncIteration):
            await anext(aiter(call))

    async def _asked(self, name: str, request: Any) -> Any:
        return await self._until_answered(
            name, lambda: getattr(self._stub, name)(request, timeout=5)
        )

    async def _until_answered(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() not in TRANSIENT and error_reason(error) != "PART_CONFLICT":
                    self._refused(name, error)
                await asyncio.sleep(RETRY_SECONDS)

    def _refused(self, name: str, error: grpc.aio.AioRpcError) -> None:
        self._history.violation(f"{name} was refused: {error_reason(error)}: {error.details()}")
        raise RefusedForGoodError(name)


class RefusedForGoodError(Exception):
    """The trainer cannot go on; the history says why."""
