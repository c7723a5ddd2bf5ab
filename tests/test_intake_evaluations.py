"""Evaluations within a run: leased and stored like everything, in no batch, in nobody's way."""

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from actor.server import act
from conftest import serving
from inference.scripted import ScriptedEngine
from inference.servicer import InferenceServicer
from intake_rig import Rig, make_config, make_record, running, trajectory
from learner.audit import audit_run
from learner.intake.evaluations import ABANDONED
from learner.intake.leases import Lease
from learner.intake.ledger import Ledger
from learner.intake.state import RunState
from learner.intake.tasks import EVALUATION_ORDINALS, State, TaskKey
from processes import read_until, started, understudy
from test_actor import environments, intake
from test_actor import make_config as actor_config
from test_intake_batches import lines_of
from test_intake_ledger import (
    STEPS,
    Clock,
    Entries,
    deliver,
    facts,
    make_tasks,
    publish,
    replayed,
)
from understudy.client import ControlClient
from understudy.config import (
    Config,
    EvaluationConfig,
    InferenceConfig,
    LearnerConfig,
    NetworkConfig,
    ScriptedConfig,
)
from understudy.evaluation import episode_seed, interval_of, wilson_interval
from understudy.rpc import RoleControl, Service, open_channel
from understudy.v1 import batch_pb2, inference_pb2_grpc, task_pb2, trajectory_pb2

EVERY_TWO = {"every_steps": 2, "num_tasks": 3, "first_ordinal": 7}


def make_ledger(log: Entries | None = None, every_steps: int = 2, **tasks: object) -> Ledger:
    state = RunState(make_tasks(group_size=2, **tasks), STEPS, Clock())
    evaluation = EvaluationConfig(every_steps=every_steps, num_tasks=3, first_ordinal=7)
    ledger = Ledger(log or Entries(), state, evaluation)
    ledger.start_training(0, b"")
    return ledger


def heldout(leases: Sequence[Lease]) -> list[Lease]:
    return [lease for lease in leases if lease.sample.key.evaluation]


def take_step(ledger: Ledger, step: int) -> None:
    """Play, close and complete a step, and publish what came of it."""
    for lease in ledger.lease("a", 100):
        version = ledger.min_version(lease)
        assert deliver(ledger, lease, lease.sample.key.sample_index, version)
    ledger.assign(ledger.ready_groups())
    ledger.complete(step)
    publish(ledger, step + 1)


# The ledger.


def test_a_version_of_every_few_steps_is_evaluated_first_and_the_last_one() -> None:
    ledger = make_ledger(every_steps=4)
    publish(ledger, 0)
    leases = ledger.lease("a", 5)
    first = EVALUATION_ORDINALS
    assert [lease.sample.key for lease in leases[:3]] == [(first + i, 0) for i in range(3)]
    assert [lease.sample.key for lease in leases[3:]] == [(0, 0), (0, 1)]
    assert [ledger.task(lease.sample.key).ordinal for lease in leases[:3]] == [7, 8, 9]
    for lease in leases:
        assert deliver(ledger, lease, lease.sample.key.sample_index)
    for step in range(STEPS):
        assert not ledger.exhausted
        take_step(ledger, step)
    assert ledger.last_is_closed
    assert not ledger.exhausted  # the last version is there to be evaluated
    for lease in ledger.lease("a", 100):
        assert lease.sample.key.evaluation == 3
        deliver(ledger, lease, 1.0, ledger.min_version(lease))
    assert ledger.exhausted
    assert [(e.number, e.step, e.version) for e in ledger.take_ended()] == [
        (1, 0, 1),
        (2, 4, 5),
        (3, 6, 7),
    ]
    balance = ledger.state.balance()
    assert balance.holds
    assert balance.states[State.EVALUATED] == 9
    assert balance.states[State.TRAINED] == STEPS * 4
    assert balance.states[State.WAITING] == balance.states[State.LEASED] == 0


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_batches_are_the_same_with_and_without(max_staleness: int) -> None:
    digests = []
    for every_steps in (0, 1):
        ledger = make_ledger(every_steps=every_steps, max_staleness=max_staleness)
        publish(ledger, 0)
        for step in range(STEPS):
            take_step(ledger, step)
        digests.append(ledger.state.ledger_digests)
        assert ledger.state.num_evaluations == (STEPS + 1) * every_steps
    assert digests[0] == digests[1]


def test_an_evaluation_neither_waits_for_admission_nor_counts_for_it() -> None:
    ledger = make_ledger(max_staleness=0)
    publish(ledger, 0)
    leases = ledger.lease("a", 100)
    assert len(heldout(leases)) == 3
    assert len(leases) == 3 + 4  # one batch, as without
    for lease in leases:
        if not lease.sample.key.evaluation:
            deliver(ledger, lease, lease.sample.key.sample_index)
    assert not ledger.can_lease
    ledger.assign(ledger.ready_groups())  # a batch does not wait for it
    ledger.complete(0)
    publish(ledger, 1)
    for lease in heldout(leases):
        assert deliver(ledger, lease, 1.0, version=1)  # however old by now
    (ended,) = ledger.take_ended()
    assert [sample.state for sample in ended.samples] == [State.EVALUATED] * 3
    assert ledger.state.evaluations == {}


def test_failed_and_expired_episodes_are_played_again_within_the_limit() -> None:
    ledger = make_ledger(max_attempts=2)
    publish(ledger, 0)
    for _ in range(2):
        (lease,) = ledger.lease("a", 1)
        assert lease.sample.key == TaskKey(EVALUATION_ORDINALS, 0)
        ledger.fail(lease.sample.key, lease.lease_id, "failed")
    first, second = ledger.lease("a", 2)
    ledger.expire(100.0)
    assert deliver(ledger, first, 1.0)  # late, but the first
    (again,) = heldout(ledger.lease("b", 1))
    assert again.sample is second.sample
    assert deliver(ledger, again, 1.0)
    assert not deliver(ledger, second, 0.0)
    (ended,) = ledger.take_ended()
    assert [sample.state.value for sample in ended.samples] == ["dropped", *["evaluated"] * 2]
    assert ledger.state.balance().dropped == {"failed": 1}


def test_task_keys_that_were_never_issued_are_not_known() -> None:
    ledger = make_ledger()
    publish(ledger, 0)
    for ordinal, sample_index, known in [
        *((EVALUATION_ORDINALS, 0, True), (EVALUATION_ORDINALS + 2, 0, True)),
        *((EVALUATION_ORDINALS, 1, False), (EVALUATION_ORDINALS + 3, 0, False)),
        *((2 * EVALUATION_ORDINALS, 0, False), (2**64 - 1, 2**32 - 1, False)),
    ]:
        assert ledger.knows(TaskKey(ordinal, sample_index)) == known


def test_a_trainer_that_goes_back_leaves_a_later_version_s_evaluation() -> None:
    """What is left of it would be played by the weights of an earlier step."""
    log = Entries()
    ledger = make_ledger(log)
    publish(ledger, 0)
    take_step(ledger, 0)
    take_step(ledger, 1)
    first, *rest = ledger.lease("a", 3)
    deliver(ledger, first, 1.0, 3)
    ledger.start_training(2, ledger.state.ledger_digests[2])
    publish(ledger, 2)
    assert ledger.state.num_evaluations == 2  # the same step: it goes on
    ledger.start_training(0, b"")
    assert [evaluation.number for evaluation in ledger.take_ended()] == [1, 2]
    assert ledger.state.balance().dropped == {ABANDONED: 2}
    assert not deliver(ledger, rest[0], 1.0, 3)
    publish(ledger, 0)
    assert ledger.state.num_evaluations == 2  # step 0 has been evaluated to the end
    again = Ledger(log, replayed(log, ledger.tasks), EvaluationConfig(every_steps=2, num_tasks=3))
    for step in range(2):
        again.complete(step)
        publish(again, step + 1)
    assert again.state.num_evaluations == 3  # step 2 has not
    assert again.state.balance().holds


def test_the_end_is_not_waited_for_where_nobody_plays() -> None:
    ledger = make_ledger()
    publish(ledger, 0)
    for step in range(STEPS):
        assert not ledger.abandon_evaluations()  # before the end there may be actors again
        take_step(ledger, step)
    (lease, *_) = ledger.lease("a", 1)
    deliver(ledger, lease, 1.0, STEPS + 1)
    assert ledger.abandon_evaluations()
    assert ledger.exhausted
    assert ledger.state.balance().dropped == {ABANDONED: 2}


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_in_an_evaluation_loses_nothing(seed: int) -> None:
    """The state after any number of entries is the state that their replay gives."""
    rng, log = random.Random(seed), Entries()
    ledger = make_ledger(log, max_attempts=2)
    publish(ledger, 0)
    while not ledger.exhausted:
        for lease in ledger.lease("a", rng.randint(1, 6)):
            if rng.random() < 0.2:
                ledger.fail(lease.sample.key, lease.lease_id, "failed")
            else:
                reward, version = float(rng.randint(0, 1)), ledger.state.admission.version
                deliver(ledger, lease, reward, version)
        if groups := ledger.ready_groups():
            ledger.assign(groups)
            ledger.complete(ledger.state.num_completed)
            publish(ledger, ledger.state.num_completed)
        assert facts(replayed(log, ledger.tasks)) == facts(ledger.state)
    assert ledger.state.num_evaluations == STEPS // 2 + 1


# Through real streams.


def split_leases(
    leases: Sequence[task_pb2.Lease],
) -> tuple[list[task_pb2.Lease], list[task_pb2.Lease]]:
    """Held-out ones, and those that are trained on."""
    apart = [[], []]  # type: ignore[var-annotated]
    for lease in leases:
        apart[lease.task_key.ordinal < EVALUATION_ORDINALS].append(lease)
    return apart[0], apart[1]


def evaluations_of(rig: Rig) -> list[dict[str, object]]:
    return [line for line in lines_of(rig) if line["kind"] == "evaluation"]


async def finish_step(rig: Rig, step: int) -> None:
    await rig.batch(step)
    await rig.publish(step + 1)
    await rig.complete(step)


async def test_a_lease_says_what_is_held_out_and_the_line_says_how_it_went(tmp_path: Path) -> None:
    config = make_config(tmp_path, seed=5, evaluation={**EVERY_TWO, "temperature": 0.0})
    async with running(config) as rig:
        tested, trained = split_leases(await rig.lease())
        assert [(lease.task.split, lease.task.task_ordinal) for lease in tested] == [
            ("test", 7),
            ("test", 8),
            ("test", 9),
        ]
        assert {(lease.sampling.temperature, lease.min_version) for lease in tested} == {(0.0, 1)}
        assert [lease.sampling.seed for lease in tested] == [episode_seed(5, o) for o in (7, 8, 9)]
        assert [lease.task_key.ordinal for lease in trained] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert {lease.sampling.temperature for lease in trained} == {1.0}
        assert not trained[0].sampling.HasField("seed")
        await rig.play(tested[:2], reward=1.0)
        assert evaluations_of(rig) == []
        await rig.publish(1)
        await rig.play(tested[2:], reward=0.0, versions=(1, 2))
        (line,) = evaluations_of(rig)
        assert (line["step"], line["version"], line["newest_version"]) == (0, 1, 2)
        assert line["heldout_accuracy"] == pytest.approx(2 / 3)
        assert (line["heldout_level1"], line["heldout_level2"]) == (1.0, 0.5)
        low, high = line["heldout_ci95"]  # type: ignore[misc]
        assert 0.2 < low < 2 / 3 < high < 0.95
        assert (line["num_tasks"], line["dropped"], line["split"]) == (3, 0, "test")
        assert 0 <= line["seconds"] < 60  # type: ignore[operator]
        figures = rig.server.figures()
        assert (figures["evaluated"], figures["evaluating"], figures["stored"]) == (3, 0, 0)
        await rig.play(trained)
        assert [len((await rig.batch(step))[1]) for step in range(2)] == [4, 4]


async def test_the_same_tasks_and_seeds_are_played_each_time(tmp_path: Path) -> None:
    config = make_config(tmp_path, steps=4, max_staleness=0, evaluation=EVERY_TWO)
    seen = []
    async with running(config) as rig:
        for step in range(4):
            tested, trained = split_leases(await rig.lease())
            if tested:
                seen.append([(lease.task, lease.sampling) for lease in tested])
            await rig.play([*tested, *trained], versions=(step + 1,))
            await finish_step(rig, step)
    assert len(seen) == 2
    assert seen[0] == seen[1]


async def test_an_older_version_than_the_evaluated_one_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_staleness=0, evaluation={**EVERY_TWO, "every_steps": 1})
    async with running(config) as rig:
        await rig.play(await rig.lease())
        await finish_step(rig, 0)
        tested, _ = split_leases(await rig.lease())
        (nack,) = await rig.push(make_record(tested[0], trajectory(tested[0], versions=(1, 2))))
        assert nack.reason == "BAD_PAYLOAD"
        (again,) = await rig.lease(1)
        assert again.task_key == tested[0].task_key
        assert await rig.push(make_record(again, trajectory(again, versions=(2,)))) == []


async def test_another_task_than_the_leased_one_is_refused(tmp_path: Path) -> None:
    async with running(make_config(tmp_path, evaluation=EVERY_TWO)) as rig:
        (lease,) = await rig.lease(1)
        played = trajectory(lease)
        lease.task_key.ordinal += 1
        (nack,) = await rig.push(make_record(lease, played))
        assert nack.reason == "BAD_PAYLOAD"
        lease.task_key.ordinal += EVALUATION_ORDINALS
        (nack,) = await rig.push(make_record(lease, played))
        assert nack.reason == "UNKNOWN_TASK_KEY"


async def ask(rig: Rig) -> task_pb2.LeaseTasksResponse:
    request = task_pb2.LeaseTasksRequest(actor_id="a", max_leases=9)
    return await rig.tasks.LeaseTasks(request, timeout=10)


async def test_actors_stay_until_the_last_version_is_evaluated(tmp_path: Path) -> None:
    config = make_config(tmp_path, steps=1, max_staleness=0, evaluation=EVERY_TWO)
    async with running(config) as rig:
        await rig.play(await rig.lease())
        await rig.batch(0)
        waiting = asyncio.create_task(ask(rig))
        await asyncio.sleep(0.1)
        assert not waiting.done()  # the last batch is closed, and nobody is told that it is over
        await rig.publish(1)
        await rig.complete(0)
        response = await waiting
        assert not response.exhausted
        last = asyncio.create_task(ask(rig))
        await rig.play(response.leases, versions=(2,))
        response = await last
        assert (response.exhausted, list(response.leases)) == (True, [])
        assert [line["step"] for line in evaluations_of(rig)] == [0, 1]


async def test_the_end_is_said_though_no_actor_is_left(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, steps=1, max_staleness=0, lease_seconds=0.3, evaluation=EVERY_TWO
    )
    async with running(config) as rig:
        await rig.play(await rig.lease())
        await finish_step(rig, 0)
        (lease,) = await rig.lease(1)
        await rig.play([lease], versions=(2,), reward=1.0)
        assert rig.server.figures()["evaluating"] == 2
        async with asyncio.timeout(10):
            while rig.server.figures()["evaluating"]:  # noqa: ASYNC110 - the clock decides
                await asyncio.sleep(0.05)
        line = evaluations_of(rig)[-1]
        assert (line["heldout_accuracy"], line["dropped"], line["num_tasks"]) == (1.0, 2, 3)
        assert rig.intake.ledger.exhausted
    report = audit_run(config.run.path)
    assert report.passed
    assert report.dropped == {ABANDONED: 2}


async def test_an_actor_that_waits_is_not_forgotten(tmp_path: Path) -> None:
    """One episode is played for longer than a lease lasts, renewed; another actor asks for more."""
    config = make_config(
        tmp_path, steps=1, max_staleness=0, lease_seconds=1.5, evaluation=EVERY_TWO
    )
    async with running(config) as rig:
        await rig.play(await rig.lease())
        await finish_step(rig, 0)
        leases = await rig.lease()
        for _ in range(13):
            await asyncio.sleep(0.25)
            ids = [lease.lease_id for lease in leases]
            request = task_pb2.RenewLeasesRequest(actor_id="a", lease_ids=ids)
            assert not (await rig.tasks.RenewLeases(request, timeout=2)).gone_lease_ids
        assert rig.server.figures()["evaluating"] == 3
        await rig.play(leases, versions=(2,))
        assert evaluations_of(rig)[-1]["dropped"] == 0


async def test_a_run_goes_on_in_the_middle_of_an_evaluation(tmp_path: Path) -> None:
    config = make_config(tmp_path, evaluation=EVERY_TWO)
    async with running(config) as rig:
        tested, _ = split_leases(await rig.lease())
        await rig.play(tested[:1], reward=1.0)
        await rig.play(tested[1:2], outcome=trajectory_pb2.OUTCOME_ENVIRONMENT_FAILED)
    async with running(config) as rig:  # its trainer publishes the same step again
        assert rig.intake.balance().figures()["evaluated"] == 1
        assert rig.server.figures()["evaluating"] == 2
        (again, *others) = await rig.lease()
        assert again.task_key == tested[1].task_key
        assert not split_leases(others)[0]
        await rig.play([again, tested[2]], reward=0.0)  # one is late, of a lease of the first life
        (line,) = evaluations_of(rig)
        assert line["heldout_accuracy"] == pytest.approx(1 / 3)
        balance = rig.intake.balance()
    report = audit_run(config.run.path)
    assert report.violations == ()
    assert report.states == {state.value: balance.states[state] for state in State}
    assert (report.states["evaluated"], report.evaluations) == (3, 1)


async def test_payloads_of_evaluations_may_be_trimmed(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        max_staleness=0,
        evaluation={**EVERY_TWO, "every_steps": 1},
        log={"segment_bytes": 3000, "retention": "checkpoint"},
    )
    async with running(config) as rig:
        for step in range(3):
            await rig.play(await rig.lease(), versions=(step + 1,))
            await finish_step(rig, step)
            await rig.checkpoint(step + 1, oldest_kept_step=step + 1)
            if rig.intake._trimming:
                await rig.intake._trimming
    report = audit_run(config.run.path)
    assert report.passed
    assert report.trimmed_payloads > 0
    assert report.states["evaluated"] == 9


# A process that is killed.


def config_of(folder: Path, address: str) -> Path:
    base = make_config(folder, evaluation={"every_steps": 1, "num_tasks": 40}, lease_seconds=0.5)
    learner = base.learner.model_copy(update={"listen": address})
    network = NetworkConfig(learner=address)
    config = base.model_copy(update={"learner": learner, "network": network})
    path = folder / "run.json"
    path.write_text(config.model_dump_json())
    return path


async def test_a_killed_intake_evaluates_every_task_once(tmp_path: Path) -> None:
    """kill -9 of the intake, three times, while an actor plays an evaluation: some leases are not
    played, and one record is on its way."""
    address = f"unix:{tmp_path / 'intake'}"
    path = config_of(tmp_path, address)
    config = Config.model_validate_json(path.read_text())
    command = understudy("learner", "--part", "intake", "--config", str(path))
    acked: set[int] = set()
    unacked: trajectory_pb2.TrajectoryRecord | None = None
    for life in range(4):
        with started(*command) as intake:
            await asyncio.to_thread(read_until, intake, "is serving")
            channel = open_channel(address, NetworkConfig())
            rig = Rig(RemoteServer(), channel)  # type: ignore[arg-type]
            await start_trainer(rig)
            if unacked:
                assert await rig.push(unacked) == []
                acked.add(unacked.task_key.ordinal)
            while life == 3 and len(acked) < 40:
                await play_heldout(rig, await rig.lease(40), acked)
            if life < 3:
                leases = split_leases(await rig.lease(11))[0]
                await play_heldout(rig, leases[:8], acked)
                unacked = make_record(leases[8], trajectory(leases[8], reward=1.0))
                async with rig.pusher(actor_id="cut off") as pusher:
                    await pusher.send(unacked)
                    os.kill(intake.pid, signal.SIGKILL)
            await channel.close()
    report = audit_run(config.run.path)
    assert report.violations == ()
    assert report.states["evaluated"] == 40
    assert report.duplicates <= 3
    lines = (config.run.path / "metrics.jsonl").read_text().splitlines()
    (line,) = [x for x in map(json.loads, lines) if x["kind"] == "evaluation"]
    assert (line["heldout_accuracy"], line["num_tasks"], line["dropped"]) == (1.0, 40, 0)


async def play_heldout(rig: Rig, leases: Sequence[task_pb2.Lease], acked: set[int]) -> None:
    for lease in split_leases(leases)[0]:
        await rig.play([lease], reward=1.0)
        acked.add(lease.task_key.ordinal)


class RemoteServer:
    """What a rig of another process's intake knows of it."""

    intake = None


async def start_trainer(rig: Rig) -> None:
    request = batch_pb2.StartTrainingRequest(run_id="run")
    rig.epoch = (await rig.batches.StartTraining(request, timeout=5)).epoch
    await rig.publish(0)


# A real actor.


@asynccontextmanager
async def scripted_engine(bundle: Path, reply: str) -> AsyncIterator[tuple[str, ScriptedEngine]]:
    """An inference server at version 1, and its engine, to be given later versions."""
    config = InferenceConfig(scripted=ScriptedConfig(latency_seconds=0, replies=(reply,)))
    engine = ScriptedEngine(config)
    await engine.start(bundle)
    await engine.load_weights(None, 1)  # type: ignore[arg-type]
    control = RoleControl("inference")
    control.serving()
    service = Service(
        name="understudy.v1.InferenceService",
        add=inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        servicer=InferenceServicer(engine, config, control),
    )
    async with serving(service, role="inference") as address:
        yield address, engine


async def test_an_actor_plays_the_last_evaluation_before_it_exits(
    tmp_path: Path, bundle: Path
) -> None:
    """Two steps with a real actor, environment server and scripted engine, which says 62 always."""
    async with environments() as environment, scripted_engine(bundle, "62") as (address, engine):
        config = actor_config(tmp_path, bundle)
        heldout = EvaluationConfig(every_steps=2, num_tasks=5, split="train", first_ordinal=60)
        learner = config.learner.model_copy(update={"evaluation": heldout})
        config = config.model_copy(update={"learner": learner})
        async with intake(config) as (server, learner_address):
            network = NetworkConfig(
                learner=learner_address, inference=(address,), envservers=(environment,)
            )
            acting = asyncio.create_task(act(config.model_copy(update={"network": network})))
            for step in range(2):
                await server.intake.next_batch(step, 0, 1, 1)
                await server.intake.advance(step + 1, 1)
                await engine.load_weights(None, step + 2)  # type: ignore[arg-type]
                await server.intake.complete_step(step, 1, {})
            assert await asyncio.wait_for(acting, 20) == 0
            balance = server.intake.balance()
            assert balance.holds
            assert balance.figures()["evaluated"] == 10
        lines = (config.run.path / "metrics.jsonl").read_text().splitlines()
        ended = [line for line in map(json.loads, lines) if line["kind"] == "evaluation"]
        assert [(line["step"], line["version"]) for line in ended] == [(0, 1), (2, 3)]
        assert {line["heldout_accuracy"] for line in ended} == {0.2}
    report = audit_run(config.run.path)
    assert report.violations == ()
    assert report.states["evaluated"] == 10


# The configuration.


async def test_operators_see_how_much_is_left_to_evaluate(tmp_path: Path) -> None:
    async with running(make_config(tmp_path, evaluation=EVERY_TWO)) as rig:
        address = f"127.0.0.1:{rig.server._server.port}"
        async with ControlClient(address, NetworkConfig()) as control:
            assert (await control.status()).figures["evaluating"] == 3


@pytest.mark.parametrize(
    ("tasks", "evaluation", "fits"),
    [
        ({}, {"split": "train"}, False),
        ({"first_ordinal": 60}, {"split": "train"}, True),
        ({"first_ordinal": 59}, {"split": "train"}, False),
        ({"num_tasks": 10}, {"split": "train", "first_ordinal": 10}, True),
        ({"num_tasks": 11}, {"split": "train", "first_ordinal": 10}, False),
        ({}, {"split": "test"}, True),
        ({}, {"split": "train", "every_steps": 0}, True),
    ],
)
def test_tasks_that_are_trained_on_are_not_held_out(
    tasks: dict[str, object], evaluation: dict[str, object], fits: bool
) -> None:
    values = {"tasks": tasks, "evaluation": {"every_steps": 5, **evaluation}}
    if fits:
        LearnerConfig.model_validate(values)
        return
    with pytest.raises(ValueError, match="has tasks that are trained on: learner.tasks plays"):
        LearnerConfig.model_validate(values)


@pytest.mark.parametrize("reward", [-1.0, 2.0])
def test_rewards_of_any_size_have_an_interval(reward: float) -> None:
    """Environments may give any finite reward; an interval of shares would be of no use."""
    low, high = interval_of([reward, 0.5, 0.5])
    assert low < (reward + 1) / 3 < high
    assert interval_of([0.0, 1.0]) == wilson_interval(1, 2)
    assert interval_of([]) == (0.0, 1.0)
