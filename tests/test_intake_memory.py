"""Memory of the intake while far more is offered than the disk takes."""

import asyncio
import json
import socket
from pathlib import Path

import numpy as np
import psutil

from processes import read_until, started, understudy
from understudy.client import BatchClient, TaskClient, TrajectoryClient, WeightClient
from understudy.client.tasks import Lease
from understudy.config import NetworkConfig
from understudy.trajectory import Segment, Trajectory, VersionSpan
from understudy.v1 import trajectory_pb2

NUM_ACTORS, RECORD_TOKENS = 8, 200_000
MIB = 2**20
BUFFER_BYTES, QUOTA_BYTES = 16 * MIB, 48 * MIB
WINDOW_BYTES = 4 * MIB
"""What gRPC takes in of a stream that is not read."""


async def test_memory_stays_within_its_budget_while_nobody_trains(tmp_path: Path) -> None:
    address = free_address()
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config_of(tmp_path, address)))
    command = understudy("learner", "--part", "intake", "--config", str(path))
    with started(*command) as intake:
        await asyncio.to_thread(read_until, intake, "is serving")
        process = psutil.Process(intake.pid)
        await publish(address)
        base = process.memory_info().rss
        flood = [asyncio.create_task(play(address, f"actor-{i}")) for i in range(NUM_ACTORS)]
        highest, stored_at = 0, []
        for _ in range(60):
            await asyncio.sleep(0.1)
            highest = max(highest, process.memory_info().rss)
            stored_at.append(log_bytes(tmp_path))
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
    # The log stopped at its quota, and what was offered beyond it waits with the actors.
    assert QUOTA_BYTES <= stored_at[-1] < QUOTA_BYTES + BUFFER_BYTES + NUM_ACTORS * MIB
    assert stored_at[-1] == stored_at[-10]
    assert highest - base < BUFFER_BYTES + NUM_ACTORS * WINDOW_BYTES + 32 * MIB


async def play(address: str, actor_id: str) -> None:
    """Lease and push about 1 MiB at a time, as fast as the intake lets it."""
    network = NetworkConfig()
    async with (
        TaskClient(address, network) as tasks,
        TrajectoryClient(
            address, network, actor_id=actor_id, max_unacked_bytes=4 * MIB
        ) as trajectories,
    ):
        while True:
            for lease in (await tasks.lease(actor_id, 8)).leases:
                await trajectories.push(lease, trajectory(lease))


def trajectory(lease: Lease) -> Trajectory:
    rng = np.random.default_rng(lease.lease_id)
    segment = Segment(
        token_ids=rng.integers(100, size=RECORD_TOKENS, dtype="i4"),
        loss_mask=np.arange(RECORD_TOKENS) > 0,
        logprobs=-rng.exponential(0.5, RECORD_TOKENS - 1).astype("f4"),
        version_spans=(VersionSpan(version=1, start=0, end=RECORD_TOKENS - 1),),
    )
    return Trajectory(
        suite="practice",
        split="train",
        task_ordinal=lease.task_ordinal,
        task_id="t",
        level=1,
        outcome=trajectory_pb2.OUTCOME_COMPLETED,
        detail="",
        segments=(segment,),
        turns=(),
        reward=1.0,
        temperature=1.0,
        duration_seconds=1.0,
    )


async def publish(address: str) -> None:
    async with BatchClient.connect(address) as batches, WeightClient.connect(address) as weights:
        epoch = await batches.start_training("flooded")
        await weights.publish({"w": np.ones(4, "f4")}, step=0, epoch=epoch, run_id="flooded")


def log_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("runs/flooded/log/*.seg"))


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def config_of(folder: Path, address: str) -> dict[str, object]:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 100}')
    return {
        "run": {"name": "flooded", "directory": str(folder / "runs")},
        "model": {"path": str(model)},
        "network": {"learner": address},
        "inference": {"max_model_len": 2**20},
        "learner": {
            "listen": address,
            "metrics_listen": "127.0.0.1:0",
            "log": {"buffer_bytes": BUFFER_BYTES, "quota_bytes": QUOTA_BYTES},
            "tasks": {"groups_per_batch": 100_000, "max_tokens": 2**20},
        },
    }
