"""Who an intake deals with beside its trainer: actors, and a ghost of earlier epochs.

All of them go through crashes of the intake as the real ones do: calls are repeated until they are
answered, streams are opened again, and what is not acked is sent again. What they are told goes
into the history; what they must not be told, too.
"""

import asyncio
import contextlib
import hashlib
import random
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from tests.torture.history import History, Key, Played
from understudy.client import Lease, TaskClient, TrajectoryClient
from understudy.client import trajectories as uplink
from understudy.client.trajectories import PushRefusedError
from understudy.config import Config
from understudy.rpc import channels, error_reason, open_channel
from understudy.trajectory import (
    Segment,
    Trajectory,
    TrajectoryError,
    Turn,
    VersionSpan,
    encode_trajectory,
)
from understudy.v1 import common_pb2, trajectory_pb2, trajectory_pb2_grpc

COMPLETED = trajectory_pb2.OUTCOME_COMPLETED
FAILED = trajectory_pb2.OUTCOME_ENVIRONMENT_FAILED
VOCAB_SIZE = 1000
RETRY_SECONDS = 0.02
TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,  # "Stream removed": the connection broke
    grpc.StatusCode.ABORTED,
}


def be_impatient() -> None:
    """Have this process's clients connect again at once: a crash is to hit work, not waiting."""
    uplink._RECONNECT_SECONDS = RETRY_SECONDS
    channels.CHANNEL_OPTIONS = (
        *(o for o in channels.CHANNEL_OPTIONS if not o[0].endswith("_reconnect_backoff_ms")),
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 100),
    )


@dataclass(kw_only=True)
class World:
    """What all players share."""

    config: Config
    history: History
    random: random.Random
    newest_version: int = 0
    """The newest that the trainer was told of: the log has it."""
    spare_leases: deque[Lease] = field(default_factory=lambda: deque(maxlen=64))
    """Leases that somebody plays, and somebody else will play too."""
    acked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at each ack of a record."""
    step: int = 0
    """The trainer's next one."""
    trains: asyncio.Event = field(default_factory=asyncio.Event)
    """The trainer stands still while this is not set."""

    def __post_init__(self) -> None:
        self.trains.set()

    @property
    def address(self) -> str:
        """Where the intake listens."""
        return self.config.learner.listen


class Actor:
    """Plays leases with made-up episodes; ends and begins anew now and then, as processes do."""

    def __init__(self, world: World, name: str, leases: int = 8) -> None:
        self._world = world
        self._name = name
        self._num_leases = leases
        self._random = random.Random(world.random.random())

    async def run(self) -> None:
        """Play until cancelled."""
        while True:
            network = self._world.config.network
            async with (
                TaskClient(self._world.address, network) as tasks,
                TrajectoryClient(
                    self._world.address, network, actor_id=self._name, run_id="run"
                ) as learner,
            ):
                while self._random.random() > 0.02:
                    await self._round(tasks, learner)

    async def _round(self, tasks: TaskClient, learner: TrajectoryClient) -> None:
        world = self._world
        try:
            answer = await tasks.lease(self._name, self._num_leases, "run", timeout=0.5)
        except grpc.aio.AioRpcError as error:
            if error.code() not in TRANSIENT:
                world.history.violation(f"{self._name} got no lease: {error_reason(error)}")
            await asyncio.sleep(RETRY_SECONDS)
            return
        new = [(lease.lease_id, Key(lease.ordinal, lease.sample_index)) for lease in answer.leases]
        world.history.leased(self._name, new)
        await asyncio.sleep(self._random.uniform(0, 0.02))
        leases = [lease for lease in answer.leases if self._keeps(lease)]
        if world.spare_leases and self._random.random() < 0.5:
            leases.append(world.spare_leases.popleft())
        sent = [played for lease in leases if (played := await self._play(lease, learner))]
        await self._flush(learner, sent)

    def _keeps(self, lease: Lease) -> bool:
        """A few leases come to nothing and expire; a few are played by somebody else, too."""
        chance = self._random.random()
        if chance < 0.05:
            self._world.spare_leases.append(lease)
        return chance > 0.01

    async def _play(self, lease: Lease, learner: TrajectoryClient) -> Played | None:
        if lease.min_version > self._world.newest_version:
            return None  # no replica has that version yet: the lease expires
        failed = self._random.random() < 0.03
        played = self._episode(lease, FAILED if failed else COMPLETED)
        digest = hashlib.sha256(encode_trajectory(played)).digest()
        result = Played(Key(lease.ordinal, lease.sample_index), digest, failed)
        self._world.history.sent(result)
        try:
            await learner.push(lease, played)
        except PushRefusedError as error:
            self._world.history.violation(f"{self._name}: {error}")
        return result

    async def _flush(self, learner: TrajectoryClient, sent: Sequence[Played]) -> None:
        history = self._world.history
        try:
            await learner.flush()
        except TrajectoryError as error:
            history.violation(f"{self._name}: a sound record was rejected: {error}")
        except PushRefusedError as error:
            history.violation(f"{self._name}: {error}")
            await asyncio.sleep(1)
        else:
            if sent:
                history.ack(self._name, sent)
                self._world.acked.set()

    def _episode(self, lease: Lease, outcome: "trajectory_pb2.Outcome.ValueType") -> Trajectory:
        num_tokens = self._random.choice((40, 200, 1000))
        num_sampled = num_tokens // 2
        tokens = np.frombuffer(self._random.randbytes(2 * num_tokens), "<u2") % VOCAB_SIZE
        segment = Segment(
            token_ids=tokens.astype(np.int32),
            loss_mask=np.arange(num_tokens) >= num_tokens - num_sampled,
            logprobs=-np.frombuffer(self._random.randbytes(num_sampled), "u1").astype(np.float32),
            version_spans=(
                VersionSpan(version=max(lease.min_version, 1), start=0, end=num_sampled),
            ),
        )
        turn = Turn(
            segment=0,
            start=0,
            end=num_sampled,
            reward=0.0,
            num_tool_calls=0,
            malformed_call=False,
            generate_seconds=0.1,
            step_seconds=0.1,
        )
        return Trajectory(
            suite=lease.suite,
            split=lease.split,
            task_ordinal=lease.task_ordinal,
            task_id=f"task-{lease.task_ordinal}",
            level=1,
            outcome=outcome,
            detail="made up" if outcome == FAILED else "",
            segments=(segment,),
            turns=(turn,),
            reward=float(self._random.randrange(2)),
            temperature=lease.sampling.temperature,
            duration_seconds=0.1,
        )


class Ghost:
    """An actor that sends records as if an earlier intake, or another incarnation, had welcomed
    it. None may be acked."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._welcomes: deque[trajectory_pb2.Welcome] = deque(maxlen=8)

    async def run(self) -> None:
        """Haunt until cancelled."""
        channel = open_channel(self._world.address, self._world.config.network)
        stub = trajectory_pb2_grpc.TrajectoryServiceStub(channel)
        try:
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await self._haunt(stub)
                await asyncio.sleep(0.1)
        finally:
            await channel.close()

    async def _haunt(self, stub: Any) -> None:
        history = self._world.history
        async with _stream(stub) as call:
            hello = trajectory_pb2.Hello(run_id="run", actor_id="ghost")
            await call.write(trajectory_pb2.PushTrajectoriesRequest(hello=hello))
            welcome = (await _read(call)).welcome
            history.welcomed(welcome.epoch, welcome.incarnation)
            older = [w for w in self._welcomes if w.epoch < welcome.epoch]
            self._welcomes.append(welcome)
            if not older:
                return
            payload = b"ghost"
            record = trajectory_pb2.TrajectoryRecord(
                incarnation=older[-1].incarnation,
                epoch=older[-1].epoch,
                sequence=welcome.next_sequence,
                task_key=common_pb2.TaskKey(ordinal=0, sample_index=0),
                outcome=COMPLETED,
                encoding=common_pb2.ENCODING_RAW,
                payload=payload,
                payload_digest=hashlib.sha256(payload).digest(),
            )
            packed = trajectory_pb2.TrajectoryRecords(records=[record])
            await call.write(trajectory_pb2.PushTrajectoriesRequest(records=packed))
            try:
                answer = await _read(call)
            except grpc.aio.AioRpcError as error:
                refused = error_reason(error) in ("OLD_EPOCH", "OLD_INCARNATION")
                history.figures["ghosts refused"] += refused
                raise
            history.violation(
                f"a record of epoch {older[-1].epoch} was answered in epoch {welcome.epoch}: "
                f"{answer.WhichOneof('response')}"
            )


@contextlib.asynccontextmanager
async def _stream(stub: Any) -> AsyncIterator[Any]:
    call = stub.PushTrajectories(timeout=5)
    try:
        yield call
    finally:
        call.cancel()


async def _read(call: Any) -> Any:
    response = await call.read()
    if response is grpc.aio.EOF:
        raise grpc.aio.AioRpcError(
            await call.code(),
            await call.initial_metadata(),
            await call.trailing_metadata(),
            await call.details(),
        )
    return response
