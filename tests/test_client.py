"""The public client against a real intake, and against servers that lie."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from itertools import product
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client import REGISTRY

from conftest import serving
from intake_rig import Rig, make_config, running, trajectory
from learner.weights.bundle import Bundle
from understudy.client import (
    BatchClient,
    Lease,
    PushRefusedError,
    TaskClient,
    TrajectoryClient,
    WeightClient,
    WeightsRefusedError,
)
from understudy.config import LoraConfig, NetworkConfig
from understudy.rpc import Service, error_reason
from understudy.trajectory import Trajectory, TrajectoryError
from understudy.v1 import common_pb2, task_pb2, weight_pb2, weight_pb2_grpc
from understudy.weights.encoding import digest_of
from understudy.weights.manifest import seal

RNG = np.random.default_rng(0)
TENSORS = {
    "model.embed.weight": RNG.normal(size=(700, 512)).astype(np.float32),
    "model.norm.weight": RNG.normal(size=(4,)).astype(np.float32),
}


def address_of(rig: Rig) -> str:
    return f"127.0.0.1:{rig.server._server.port}"


def played(lease: Lease, **fields: object) -> Trajectory:
    """A made-up episode of a lease."""
    key = common_pb2.TaskKey(ordinal=lease.ordinal, sample_index=lease.sample_index)
    task = common_pb2.TaskReference(
        suite=lease.suite, split=lease.split, task_ordinal=lease.task_ordinal
    )
    return trajectory(task_pb2.Lease(task_key=key, task=task), **fields)


def wire_bytes(direction: str, stage: str) -> float:
    labels = {"direction": direction, "stage": stage}
    return REGISTRY.get_sample_value("understudy_wire_bytes_total", labels) or 0.0


async def test_what_is_pushed_comes_back_in_a_batch(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        address = address_of(rig)
        async with (
            TaskClient.connect(address) as tasks,
            TrajectoryClient.connect(address) as trajectories,
            BatchClient.connect(address) as batches,
        ):
            kinds = [*product(("sent", "received"), ("raw", "compressed"))]
            before = [wire_bytes(*kind) for kind in kinds]
            leases = (await tasks.lease("a", 4)).leases
            for lease in leases:
                await trajectories.push(lease, played(lease))
            await trajectories.flush()
            assert trajectories.num_unacked == 0
            counted = [wire_bytes(*kind) - was for kind, was in zip(kinds, before, strict=True)]
            assert counted[:2] == counted[2:]
            assert counted[0] > 4 * 12 * 4  # four trajectories of twelve int32 tokens
            assert counted[1] > 0

            await batches.start_training("run")
            batch = await batches.next_batch(0)
            assert (batch.header.step, batch.header.num_trajectories) == (0, 4)
            for item in batch.trajectories:
                rewards = np.frombuffer(batch.header.groups[item.group_index].rewards, "<f4")
                assert rewards[item.reward_index] == item.trajectory.reward
                assert item.trajectory.num_tokens == 12
            await batches.complete_step(0, {"loss": 0.5})
            await batches.record_checkpoint(1, b"digest", oldest_kept_step=0)
            assert rig.intake.state.num_completed == 1


async def test_a_rejected_trajectory_is_raised_once(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        address = address_of(rig)
        async with (
            TaskClient.connect(address) as tasks,
            TrajectoryClient.connect(address) as client,
        ):
            one, other = (await tasks.lease("a", 2)).leases
            await client.push(one, played(one, versions=(9,)))
            with pytest.raises(TrajectoryError, match="UNKNOWN_VERSION: record 0: versions"):
                await client.flush()
            await client.push(other, played(other))
            await client.flush()


async def test_a_client_of_another_run_or_with_a_name_in_use_is_told(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        address, network = address_of(rig), NetworkConfig()
        async with (
            TaskClient.connect(address) as tasks,
            TrajectoryClient(address, network, run_id="other") as stranger,
            TrajectoryClient(address, network, actor_id="a") as first,
            TrajectoryClient(address, network, actor_id="a") as second,
            asyncio.timeout(10),
        ):
            leases = (await tasks.lease("a", 4)).leases
            with pytest.raises(PushRefusedError, match="served is 'run'"):
                await push_and_flush(stranger, leases[0])
            await push_and_flush(first, leases[1])
            await push_and_flush(second, leases[2])
            with pytest.raises(PushRefusedError, match="names of living actors are unique"):
                await push_and_flush(first, leases[3])


async def push_and_flush(client: TrajectoryClient, lease: Lease) -> None:
    await client.push(lease, played(lease))
    await client.flush()


async def test_what_is_published_is_announced_and_fetched(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        async with WeightClient.connect(address_of(rig)) as client:
            publish = {"tensors": TENSORS, "epoch": 1, "run_id": "run"}
            assert await client.publish(step=0, **publish) == 1
            async with contextlib.aclosing(client.watch_versions("r")) as versions:
                assert (await anext(versions)).version == 1
                assert await client.publish(step=1, **publish) == 2
                assert (await anext(versions)).step == 1
            weights = await client.fetch()
            assert (weights.version, weights.manifest.step) == (2, 1)
            assert_same(weights.arrays(), TENSORS)
            changed = {name: tensor.copy() for name, tensor in TENSORS.items()}
            changed["model.norm.weight"][1] = 3.5
            assert await client.publish(step=2, **publish | {"tensors": changed}) == 3
            assert_same((await client.fetch(base=weights)).arrays(), changed)
            assert_same(weights.arrays(), TENSORS)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await client.fetch(target_version=9)
            assert error_reason(error.value) == "UNKNOWN_VERSION"


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        np.testing.assert_array_equal(value, expected[name])


async def test_the_bundle_and_reports_of_replicas(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        folder = tmp_path / "fetched"
        folder.mkdir()
        async with WeightClient.connect(address_of(rig)) as client:
            assert (
                await client.fetch_model_bundle(folder)
                == Bundle.read(rig.intake.config.model.path, LoraConfig()).digest
            )
            await client.report_replica("r0", 1, pause_seconds=0.25)
        assert (folder / "tokenizer.json").exists()
        lines = (rig.intake.config.run.path / "metrics.jsonl").read_text().splitlines()
        report = json.loads(lines[-1])
        assert (report["replica_id"], report["version"], report["pause_seconds"]) == ("r0", 1, 0.25)


class LyingStore(weight_pb2_grpc.WeightServiceServicer):
    """Sends a payload that its manifest does not describe."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    async def FetchWeights(
        self, request: weight_pb2.FetchWeightsRequest, context: object
    ) -> AsyncIterator[weight_pb2.FetchWeightsResponse]:
        part = weight_pb2.TensorSlice(
            name="w", dtype="BF16", shape=[2], num_elements=2, num_bytes=4,
            encoding=weight_pb2.TENSOR_ENCODING_DENSE,
            digest=digest_of(np.frombuffer(b"good", np.uint8)),
        )  # fmt: skip
        manifest = weight_pb2.WeightManifest(version=1, slices=[part], payload_bytes=4)
        seal(manifest)
        yield weight_pb2.FetchWeightsResponse(manifest=manifest)
        yield weight_pb2.FetchWeightsResponse(chunk=self.payload)


@contextlib.asynccontextmanager
async def client_of(payload: bytes) -> AsyncIterator[WeightClient]:
    """A client of a store that sends a payload."""
    service = Service(
        name="understudy.v1.WeightService",
        add=weight_pb2_grpc.add_WeightServiceServicer_to_server,
        servicer=LyingStore(payload),
    )
    async with serving(service, role="learner") as address:
        async with WeightClient.connect(address) as client:
            yield client


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"evil", "BAD_DIGEST"),
        (b"goo", "BAD_PAYLOAD: 3 of 4 bytes"),
        (b"good!", "BAD_PAYLOAD: more than the 4 bytes"),
    ],
)
async def test_weights_that_lie_are_refused(payload: bytes, said: str) -> None:
    async with client_of(payload) as client:
        with pytest.raises(WeightsRefusedError, match=said):
            await client.fetch()


async def test_bfloat16_comes_as_the_same_values_in_float32() -> None:
    async with client_of(b"good") as client:
        value = (await client.fetch()).array("w")
        assert value.view("<u4").tolist() == [0x6F670000, 0x646F0000]
