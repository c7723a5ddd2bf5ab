"""A real intake on port 0 with a tiny model folder, and small clients to talk to it."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from learner.intake.server import IntakeServer
from understudy.config import Config, ModelConfig, NetworkConfig, RunConfig
from understudy.config.learner import (
    EvaluationConfig,
    LearnerConfig,
    LogConfig,
    TasksConfig,
    TrainConfig,
)
from understudy.rpc import open_channel
from understudy.trajectory import Segment, Trajectory, Turn, VersionSpan, encode_trajectory
from understudy.v1 import (
    batch_pb2,
    batch_pb2_grpc,
    common_pb2,
    task_pb2,
    task_pb2_grpc,
    trajectory_pb2,
    trajectory_pb2_grpc,
    weight_pb2,
    weight_pb2_grpc,
)
from understudy.weights.encoding import Delta, encode
from understudy.weights.layout import ByteArray
from understudy.weights.manifest import describe_slice, seal

COMPLETED = trajectory_pb2.OUTCOME_COMPLETED
DENSE = weight_pb2.TENSOR_ENCODING_DENSE


def make_config(
    folder: Path,
    *,
    steps: int = 4,
    max_seconds: float | None = None,
    seed: int = 0,
    log: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    **tasks: Any,
) -> Config:
    """A run of two groups of two a batch, unless told otherwise."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (model / name).write_text(f"{{}} {name}")
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "model.safetensors.index.json").write_text("{}")
    shape = {"group_size": 2, "groups_per_batch": 2, "max_staleness": 1, **tasks}
    return Config(
        model=ModelConfig(path=model),
        run=RunConfig(directory=folder / "runs", seed=seed),
        learner=LearnerConfig(
            listen="127.0.0.1:0",
            metrics_listen="127.0.0.1:0",
            log=LogConfig(**(log or {})),
            tasks=TasksConfig(**shape),
            evaluation=EvaluationConfig(**(evaluation or {})),
            train=TrainConfig(steps=steps, max_seconds=max_seconds),
        ),
    )


def trajectory(
    lease: task_pb2.Lease,
    *,
    reward: float | None = None,
    versions: Sequence[int] = (1,),
    num_tokens: int = 12,
    outcome: "trajectory_pb2.Outcome.ValueType" = COMPLETED,
) -> Trajectory:
    """An episode of one turn; its reward is the sample index unless told."""
    num_sampled = num_tokens // 2
    mask = np.arange(num_tokens) >= num_tokens - num_sampled
    edges = np.linspace(0, num_sampled, len(versions) + 1).astype(int).tolist()
    spans = tuple(
        VersionSpan(version=version, start=start, end=end)
        for version, start, end in zip(versions, edges, edges[1:], strict=False)
    )
    segment = Segment(
        # Hard to compress, so that a record is about as large as it says.
        token_ids=np.random.default_rng(0).integers(5_000, size=num_tokens, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.full(num_sampled, -0.5, np.float32),
        version_spans=spans,
    )
    turn = Turn(
        segment=0,
        start=0,
        end=num_sampled,
        reward=0.0,
        num_tool_calls=1,
        malformed_call=False,
        generate_seconds=0.1,
        step_seconds=0.1,
    )
    return Trajectory(
        suite=lease.task.suite,
        split=lease.task.split,
        task_ordinal=lease.task.task_ordinal,
        task_id=f"task-{lease.task.task_ordinal}",
        level=1 + lease.task.task_ordinal % 2,
        outcome=outcome,
        detail="",
        segments=(segment,),
        turns=(turn,),
        reward=float(lease.task_key.sample_index) if reward is None else reward,
        temperature=1.0,
        duration_seconds=1.0,
    )


def make_record(lease: task_pb2.Lease, played: Trajectory) -> trajectory_pb2.TrajectoryRecord:
    """The envelope, without the numbers that a stream gives it."""
    payload = encode_trajectory(played)
    return trajectory_pb2.TrajectoryRecord(
        lease_id=lease.lease_id,
        task_key=lease.task_key,
        outcome=played.outcome,
        encoding=common_pb2.ENCODING_ZSTD,
        payload=payload,
        payload_digest=hashlib.sha256(payload).digest(),
    )


class Pusher:
    """One stream of one actor."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.welcome = trajectory_pb2.Welcome()
        self.sequence = 0

    async def hello(self, actor_id: str = "a", **fields: Any) -> trajectory_pb2.Welcome:
        hello = trajectory_pb2.Hello(actor_id=actor_id, **fields)
        await self.call.write(trajectory_pb2.PushTrajectoriesRequest(hello=hello))
        self.welcome = (await self.read()).welcome
        self.sequence = self.welcome.next_sequence
        return self.welcome

    async def send(self, record: trajectory_pb2.TrajectoryRecord, **fields: int) -> None:
        """Number a record, unless a field is given, and send it."""
        record.sequence = fields.get("sequence", self.sequence)
        record.epoch = fields.get("epoch", self.welcome.epoch)
        record.incarnation = fields.get("incarnation", self.welcome.incarnation)
        self.sequence = record.sequence + 1
        packed = trajectory_pb2.TrajectoryRecords(records=[record])
        await self.call.write(trajectory_pb2.PushTrajectoriesRequest(records=packed))

    async def read(self) -> trajectory_pb2.PushTrajectoriesResponse:
        response = await asyncio.wait_for(self.call.read(), 5)
        if response is grpc.aio.EOF:
            raise grpc.aio.AioRpcError(
                await self.call.code(),
                await self.call.initial_metadata(),
                await self.call.trailing_metadata(),
                await self.call.details(),
            )
        return response

    async def acked(self) -> list[trajectory_pb2.Nack]:
        """Read until all that was sent is acked; returns the nacks on the way."""
        nacks = []
        while True:
            response = await self.read()
            if response.HasField("nack"):
                nacks.append(response.nack)
            elif response.ack.next_sequence >= self.sequence:
                return nacks


class Rig:
    """A serving intake and stubs of its services."""

    def __init__(self, server: IntakeServer, channel: grpc.aio.Channel, address: str = "") -> None:
        self.server = server
        self.address = address
        self.intake = server.intake
        self.epoch = 0
        """Of the trainer that this rig plays."""
        self.tasks = task_pb2_grpc.TaskServiceStub(channel)
        self.trajectories = trajectory_pb2_grpc.TrajectoryServiceStub(channel)
        self.batches = batch_pb2_grpc.BatchServiceStub(channel)
        self.weights = weight_pb2_grpc.WeightServiceStub(channel)
        self.versions = weight_pb2_grpc.VersionServiceStub(channel)

    async def lease(
        self, number: int = 1024, actor_id: str = "a", timeout: float = 2.0
    ) -> list[task_pb2.Lease]:
        request = task_pb2.LeaseTasksRequest(actor_id=actor_id, max_leases=number)
        return list((await self.tasks.LeaseTasks(request, timeout=timeout)).leases)

    @contextlib.asynccontextmanager
    async def pusher(self, **hello: Any) -> AsyncIterator[Pusher]:
        call = self.trajectories.PushTrajectories()
        pusher = Pusher(call)
        try:
            await pusher.hello(**hello)
            yield pusher
        finally:
            call.cancel()

    async def push(self, *records: trajectory_pb2.TrajectoryRecord) -> list[trajectory_pb2.Nack]:
        """Send records over a stream of their own and wait for their acks."""
        async with self.pusher(actor_id=f"pusher-{id(records)}") as pusher:
            for record in records:
                await pusher.send(record)
            return await pusher.acked()

    async def play(self, leases: Sequence[task_pb2.Lease], **fields: Any) -> None:
        """Play leases with made-up episodes."""
        await self.push(*(make_record(lease, trajectory(lease, **fields)) for lease in leases))

    async def batch(
        self, step: int, rank: int = 0, world_size: int = 1, timeout: float = 5.0
    ) -> tuple[batch_pb2.BatchHeader, list[batch_pb2.BatchTrajectory]]:
        request = batch_pb2.NextBatchRequest(
            step=step, rank=rank, world_size=world_size, epoch=self.epoch
        )
        responses = [r async for r in self.batches.NextBatch(request, timeout=timeout)]
        return responses[0].header, [response.trajectory for response in responses[1:]]

    async def complete(self, step: int, **metrics: float) -> None:
        await self.batches.CompleteStep(
            batch_pb2.CompleteStepRequest(step=step, metrics=metrics, epoch=self.epoch), timeout=5
        )

    async def train(self, step: int = 0) -> int:
        """Start as a trainer with so many steps behind it; returns the epoch."""
        digest = self.intake.state.ledger_digests[step]
        request = batch_pb2.StartTrainingRequest(run_id="run", step=step, ledger_digest=digest)
        self.epoch = (await self.batches.StartTraining(request, timeout=5)).epoch
        return self.epoch

    async def checkpoint(self, step: int, oldest_kept_step: int = 0) -> None:
        """Say that a checkpoint is durable."""
        request = batch_pb2.RecordCheckpointRequest(
            step=step, oldest_kept_step=oldest_kept_step, epoch=self.epoch
        )
        await self.batches.RecordCheckpoint(request, timeout=5)

    async def publish(self, step: int = 0, **fields: Any) -> int:
        """Publish a small version in one part."""
        fields.setdefault("epoch", self.epoch)
        return await self.publish_part(*make_part({"w": np.ones(4, np.float32)}, step, **fields))

    async def publish_part(
        self, header: weight_pb2.PartHeader, payload: bytes, timeout: float = 5.0
    ) -> int:
        return await publish_part(self.weights, header, payload, timeout)


async def publish_part(
    stub: weight_pb2_grpc.WeightServiceStub,
    header: weight_pb2.PartHeader,
    payload: bytes,
    timeout: float = 5.0,
) -> int:
    """Send one part, whatever it says under a right checksum; returns the version."""
    seal(header)
    call = stub.PublishWeights(timeout=timeout)
    try:
        await call.write(weight_pb2.PublishWeightsRequest(header=header))
        for start in range(0, len(payload), 2**20):
            chunk = payload[start : start + 2**20]
            await call.write(weight_pb2.PublishWeightsRequest(chunk=chunk))
        await call.done_writing()
    except asyncio.InvalidStateError:  # the call has ended: awaiting it says how
        pass
    return (await call).version


def make_part(
    tensors: dict[str, np.ndarray],
    step: int = 0,
    *,
    part: int = 0,
    num_parts: int = 1,
    epoch: int = 1,
    rows: slice | None = None,
    base: dict[str, np.ndarray] | None = None,
    base_version: int = 0,
) -> tuple[weight_pb2.PartHeader, bytes]:
    """One part: all of float32 tensors, or some of their rows; as a delta if there is a base."""
    slices, payload = [], b""
    for name, tensor in tensors.items():
        first, end, _ = (rows or slice(None)).indices(len(tensor))
        width = tensor[0].size
        values = _bytes_of(tensor[first:end])
        delta = Delta(encoding=DENSE, values=values)
        if base is not None:
            delta = encode("F32", _bytes_of(base[name][first:end]), values)
        payload += b"".join(delta.payload)
        slices.append(describe_slice(name, "F32", tensor.shape, first * width, values, delta))
    header = weight_pb2.PartHeader(
        run_id="run",
        epoch=epoch,
        step=step,
        part_index=part,
        num_parts=num_parts,
        base_version=base_version,
        slices=slices,
    )
    seal(header)
    return header, payload


def _bytes_of(tensor: np.ndarray) -> ByteArray:
    return np.frombuffer(tensor.astype("<f4").tobytes(), np.uint8)


@contextlib.asynccontextmanager
async def running(config: Config, version: bool = True, trainer: bool = True) -> AsyncIterator[Rig]:
    """Serve an intake, with a trainer started at the last completed step and a version published,
    unless told otherwise: without a new trainer, the last one goes on."""
    server = await IntakeServer.open(config)
    port = await server.start()
    address = f"127.0.0.1:{port}"
    channel = open_channel(address, NetworkConfig())
    try:
        rig = Rig(server, channel, address)
        step = server.intake.state.num_completed
        rig.epoch = server.intake.state.trainer_epoch
        if trainer:
            await rig.train(step)
        if version:
            await rig.publish(step)
        yield rig
    finally:
        await channel.close()
        await server.stop(grace=0.2)
