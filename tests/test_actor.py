"""Actors against real servers: an environment server, the scripted engine, a real intake."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actor.environment_pool import EnvironmentPool
from actor.episode import Player
from actor.inference_pool import InferencePool
from actor.server import act
from actor.tokens import TokenPolicy
from actor.worker import Worker
from conftest import serving
from envserver.servicer import EnvironmentServicer
from inference.scripted import ScriptedEngine
from inference.servicer import InferenceServicer
from learner.intake.server import IntakeServer
from suites import EchoSuite, FaultySuite, WaitingSuite
from understudy.chat import ChatFormat
from understudy.client import Lease, PushRefusedError, TaskClient, TrajectoryClient
from understudy.client.trajectories import Uplink
from understudy.config import Config, NetworkConfig
from understudy.errors import PeerUnreachableError
from understudy.rpc import RoleControl, Service
from understudy.trajectory import Trajectory
from understudy.v1 import (
    batch_pb2,
    batch_pb2_grpc,
    common_pb2,
    environment_pb2_grpc,
    inference_pb2_grpc,
    trajectory_pb2,
)

CALL = '<tool_call>\n{"name": "echo", "arguments": {"text": "hi"}}\n</tool_call>'
NOWHERE = "127.0.0.1:9"


@asynccontextmanager
async def environments() -> AsyncIterator[str]:
    """An environment server of the test suites."""
    from understudy.config import EnvserverConfig

    control = RoleControl("envserver")
    control.serving()
    suites = {suite.name: suite for suite in (EchoSuite(), FaultySuite(), WaitingSuite())}
    servicer = EnvironmentServicer(suites, EnvserverConfig(step_timeout_seconds=0.3), control)
    add = environment_pb2_grpc.add_EnvironmentServiceServicer_to_server
    name = "understudy.v1.EnvironmentService"
    async with serving(Service(name=name, add=add, servicer=servicer)) as address:
        yield address


@asynccontextmanager
async def engine(
    bundle: Path, replies: Sequence[str], version: int = 1, *, router_replay: bool = False
) -> AsyncIterator[str]:
    """An inference server whose scripted engine serves one version."""
    from understudy.config import InferenceConfig, ScriptedConfig

    config = InferenceConfig(scripted=ScriptedConfig(latency_seconds=0, replies=tuple(replies)))
    scripted = ScriptedEngine(config, router_replay=router_replay)
    await scripted.start(bundle)
    await scripted.load_weights(None, version)  # type: ignore[arg-type]
    control = RoleControl("inference")
    control.serving()
    servicer = InferenceServicer(scripted, config, control)
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    name = "understudy.v1.InferenceService"
    async with serving(Service(name=name, add=add, servicer=servicer), role="inference") as address:
        yield address


def make_config(folder: Path, bundle: Path, **sections: Any) -> Config:
    """A run of two steps of two groups of two."""
    tasks = {"suite": "echo", "group_size": 2, "groups_per_batch": 2, "num_tasks": 50}
    return Config.model_validate(
        {
            "run": {"directory": folder},
            "model": {"path": bundle, "tools": "signatures"},
            "actor": {"metrics_listen": "127.0.0.1:0", "concurrency": 8},
            "learner": {
                "listen": "127.0.0.1:0",
                "metrics_listen": "127.0.0.1:0",
                "tasks": tasks,
                "train": {"steps": 2},
            },
            **sections,
        }
    )


def make_lease(suite: str, ordinal: int, **fields: Any) -> Lease:
    """A lease on one task."""
    sampling = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=100)
    values: dict[str, Any] = {
        "lease_id": 1,
        "ordinal": ordinal,
        "sample_index": 0,
        "suite": suite,
        "split": "train",
        "task_ordinal": ordinal,
        "sampling": sampling,
        "max_turns": 4,
        "max_tokens": 2000,
        "min_version": 0,
        "expires_after_seconds": 60.0,
        **fields,
    }
    return Lease(**values)


async def play(
    chat: ChatFormat,
    bundle: Path,
    replies: Sequence[str],
    lease: Lease,
    version: int = 1,
    *,
    router_replay: bool = False,
    **network: Any,
) -> Trajectory:
    """Play one lease against an environment server and a scripted engine."""
    served = engine(bundle, replies, version, router_replay=router_replay)
    async with environments() as environment, served as inference:
        config = Config.model_validate(
            {
                "model": {"path": bundle},
                "network": {"inference": [inference], "envservers": [environment], **network},
            }
        )
        pool = InferencePool(config.network, timeout_seconds=1.0, with_routes=router_replay)
        servers = EnvironmentPool(config.network, step_timeout_seconds=5.0)
        try:
            return await Player(TokenPolicy(chat, pool), servers).play(lease)
        finally:
            await pool.close()
            await servers.close()


async def test_an_episode_records_what_was_sampled(chat: ChatFormat, bundle: Path) -> None:
    trajectory = await play(chat, bundle, [CALL, "7"], make_lease("echo", 7))
    assert trajectory.outcome == trajectory_pb2.OUTCOME_COMPLETED
    assert (trajectory.reward, trajectory.task_id, trajectory.level) == (1.0, "echo-7", 1)
    (segment,) = trajectory.segments
    sampled = chat.decode(segment.token_ids[segment.loss_mask])
    assert sampled == f"{CALL}<|im_end|>7<|im_end|>"
    assert "<tool_response>\nhi\n</tool_response>" in chat.decode(segment.token_ids)
    assert [turn.num_tool_calls for turn in trajectory.turns] == [1, 0]
    assert trajectory.turns[1].end == len(segment.logprobs)


@pytest.mark.parametrize(
    ("replies", "lease", "outcome", "detail"),
    [
        (["7"], make_lease("nope", 7), "ENVIRONMENT_FAILED", "UNKNOWN_SUITE: suite 'nope'"),
        (["7"], make_lease("echo", 100), "ENVIRONMENT_FAILED", "UNKNOWN_TASK"),
        (["raise"], make_lease("faulty", 7), "ENVIRONMENT_FAILED", "ENVIRONMENT_FAILED"),
        (["hang"], make_lease("faulty", 7), "ENVIRONMENT_FAILED", "STEP_TIMEOUT"),
        (["truncate"], make_lease("faulty", 7), "TRUNCATED", "the environment cut"),
        (["long"], make_lease("faulty", 7), "TRUNCATED", "500000 characters"),
        (["longer"], make_lease("faulty", 7), "ENVIRONMENT_FAILED", "above 1048576"),
        ([CALL], make_lease("echo", 7), "TRUNCATED", "max_turns = 4"),
        (["7"], make_lease("echo", 7, max_tokens=10), "TRUNCATED", "max_tokens = 10"),
        (["x" * 200], make_lease("echo", 7), "TRUNCATED", "cut off at its token limit"),
        ([""], make_lease("echo", 7), "COMPLETED", ""),
        (["7"], make_lease("echo", 7, min_version=9), "INFERENCE_FAILED", "VERSION_NOT_REACHED"),
    ],
)
async def test_every_ending_is_attributed_once(
    chat: ChatFormat, bundle: Path, replies: list[str], lease: Lease, outcome: str, detail: str
) -> None:
    trajectory = await play(chat, bundle, replies, lease)
    assert trajectory_pb2.Outcome.Name(trajectory.outcome) == f"OUTCOME_{outcome}"
    assert detail in trajectory.detail
    assert trajectory.reward == 0.0


@pytest.mark.parametrize(
    ("max_version", "outcome"), [(0, "COMPLETED"), (1, "INFERENCE_FAILED"), (2, "COMPLETED")]
)
async def test_a_version_above_the_lease_s_fails_the_episode(
    chat: ChatFormat, bundle: Path, max_version: int, outcome: str
) -> None:
    lease = make_lease("echo", 7, max_version=max_version)
    trajectory = await play(chat, bundle, ["7"], lease, version=2)
    assert trajectory_pb2.Outcome.Name(trajectory.outcome) == f"OUTCOME_{outcome}"
    assert not trajectory.detail or "allows up to 1" in trajectory.detail


async def test_a_malformed_call_is_an_observation(chat: ChatFormat, bundle: Path) -> None:
    replies = ["<tool_call>{oops}</tool_call>", "7"]
    trajectory = await play(chat, bundle, replies, make_lease("echo", 7))
    assert trajectory.reward == 1.0
    assert trajectory.turns[0].malformed_call
    assert "Malformed call: the call is not valid JSON." in chat.decode(
        trajectory.segments[0].token_ids
    )


async def test_a_dead_replica_is_passed_over(chat: ChatFormat, bundle: Path) -> None:
    async with engine(bundle, ["7"]) as second:
        for ordinal in range(8):  # some of these prefer the dead one
            trajectory = await play(
                chat, bundle, ["unused"], make_lease("echo", ordinal), inference=[NOWHERE, second]
            )
            assert trajectory.outcome == trajectory_pb2.OUTCOME_COMPLETED


async def test_inference_that_never_answers_fails_the_episode(
    chat: ChatFormat, bundle: Path
) -> None:
    trajectory = await play(chat, bundle, [], make_lease("echo", 1), inference=[NOWHERE])
    assert trajectory.outcome == trajectory_pb2.OUTCOME_INFERENCE_FAILED
    assert "no replica answered within 1 s, last: UNAVAILABLE" in trajectory.detail


async def _train(address: str, config: Config, steps: int) -> list[batch_pb2.BatchHeader]:
    """Take every batch and complete it, as a trainer of one rank would."""
    headers = []
    async with TaskClient.connect(address) as client:
        stub = batch_pb2_grpc.BatchServiceStub(client.channel)
        for step in range(steps):
            request = batch_pb2.NextBatchRequest(step=step, world_size=1, epoch=1)
            async for response in stub.NextBatch(request, timeout=30):
                if response.HasField("header"):
                    headers.append(response.header)
            done = batch_pb2.CompleteStepRequest(step=step, epoch=1)
            await stub.CompleteStep(done, timeout=10)
    return headers


@asynccontextmanager
async def intake(config: Config, published: bool = True) -> AsyncIterator[tuple[IntakeServer, str]]:
    """A real intake, with a trainer that has published unless told otherwise."""
    server = await IntakeServer.open(config)
    port = await server.start()
    if published:
        epoch = await server.intake.start_training(0, b"")
        await server.intake.advance(0, epoch)
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=0.2)


async def test_an_actor_plays_a_run_to_its_end_and_exits(tmp_path: Path, bundle: Path) -> None:
    async with environments() as environment, engine(bundle, [CALL, "7"]) as inference:
        async with intake(make_config(tmp_path, bundle)) as (server, learner):
            network = {
                "learner": learner,
                "inference": [inference],
                "envservers": [environment],
            }
            config = make_config(tmp_path, bundle, network=network)
            code, headers = await asyncio.gather(act(config), _train(learner, config, 2))
            assert code == 0
            assert [header.step for header in headers] == [0, 1]
            balance = server.intake.balance()
            assert balance.holds
            figures = balance.figures()
            # Every group says the same, so all are uniform: dropped by name, none lost.
            assert figures["issued"] == sum(
                number for name, number in figures.items() if name != "issued"
            )
            assert figures["leased"] == figures["waiting"] == figures["stored"] == 0


class EndlessPlayer:
    """Plays episodes that never end."""

    async def play(self, lease: Lease) -> Trajectory:
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_drain_ends_an_actor_whose_slots_are_all_taken(
    tmp_path: Path, bundle: Path
) -> None:
    async with intake(make_config(tmp_path, bundle)) as (_, learner):
        async with TaskClient.connect(learner) as tasks:
            control = RoleControl("actor")
            control.serving()
            uplink = Uplink(tasks.channel, "run", "a", max_bytes=2**20)
            player: Any = EndlessPlayer()
            worker = Worker("run", "a", 1, tasks, player, uplink, control)
            working = asyncio.create_task(worker.run(grace=0.1))
            async with asyncio.timeout(30):
                while not worker.num_running:  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(0.02)
                control.drain()
                await working
            assert worker.num_running == 0


async def test_an_actor_whose_name_was_taken_ends_with_the_reason(
    tmp_path: Path, bundle: Path, chat: ChatFormat
) -> None:
    trajectory = await play(chat, bundle, ["7"], make_lease("echo", 0))
    async with environments() as environment, engine(bundle, ["7"]) as inference:
        config = make_config(tmp_path, bundle)
        async with intake(config) as (server, learner), asyncio.timeout(20):
            network = {"learner": learner, "inference": [inference], "envservers": [environment]}
            config = make_config(tmp_path, bundle, network=network)
            acting = asyncio.create_task(act(config))
            while server.intake.balance().figures()["stored"] < 8:  # noqa: ASYNC110 - all admitted
                await asyncio.sleep(0.05)
            ((name, _),) = server.trajectories.actors._newest.items()
            async with TrajectoryClient(learner, config.network, actor_id=name) as rival:
                await rival.push(make_lease("echo", 0), trajectory)
                await rival.flush()
            server.intake.ledger.end_with(3)
            state = server.intake.state  # more to play, and for version 1
            state.admission = state.admission.advanced(1, 1)
            with pytest.raises(PushRefusedError, match="names of living actors are unique"):
                await acting


async def test_records_survive_an_intake_that_restarts(
    tmp_path: Path, bundle: Path, chat: ChatFormat
) -> None:
    config = make_config(tmp_path, bundle)
    trajectory = await play(chat, bundle, ["7"], make_lease("echo", 7))
    async with intake(config) as (server, address):
        client = TaskClient.connect(address)
        first = (await client.lease("a", 4)).leases
        uplink = Uplink(client.channel, config.run.name, "a", max_bytes=2**20)
        sender = asyncio.create_task(uplink.run())
        await uplink.put(first[0], trajectory)
        await asyncio.wait_for(uplink.flush(), 5)
    # The learner is away: records wait, whatever became of their leases.
    for lease in first[1:]:
        await uplink.put(lease, trajectory)
    assert uplink.num_unacked == 3
    port = address.rpartition(":")[2]
    again = config.learner.model_copy(update={"listen": f"127.0.0.1:{port}"})
    async with intake(config.model_copy(update={"learner": again})) as (server, _):
        await asyncio.wait_for(uplink.flush(), 15)
        assert server.intake.balance().holds
    sender.cancel()
    await client.close()


async def test_the_uplink_holds_no_more_than_its_limit(chat: ChatFormat, bundle: Path) -> None:
    trajectory = await play(chat, bundle, ["7"], make_lease("echo", 7))
    async with TaskClient.connect(NOWHERE) as client:
        uplink = Uplink(client.channel, "run", "a", max_bytes=400)
        await uplink.put(make_lease("echo", 1), trajectory)

        async def put_ten_more() -> None:
            for ordinal in range(10):
                await uplink.put(make_lease("echo", ordinal), trajectory)

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(put_ten_more(), 0.2)
        assert 1 <= uplink.num_unacked < 10


async def test_an_absent_learner_is_named(tmp_path: Path, bundle: Path) -> None:
    network = {"learner": NOWHERE, "connect_timeout_seconds": 0.3}
    with pytest.raises(PeerUnreachableError, match="learner at 127.0.0.1:9 did not answer"):
        await act(make_config(tmp_path, bundle, network=network))


async def test_a_server_that_hangs_gets_no_new_episodes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hung:  # takes connections and says nothing
        async with environments() as address:
            network = NetworkConfig(
                envservers=(f"127.0.0.1:{hung.getsockname()[1]}", address),
                connect_timeout_seconds=5.0,
            )
            pool = EnvironmentPool(network, step_timeout_seconds=5.0)
            await pool.wait_ready()
            async with asyncio.timeout(3):
                for ordinal in range(4):
                    async with pool.episode("echo", "train", ordinal) as (_, opening):
                        assert opening.messages
            await pool.close()
