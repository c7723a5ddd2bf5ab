"""Learners that are two or die, stores and replicas that are killed or stopped: what is served by
anybody is what was published under its number, bit by bit, and nobody goes back."""

import asyncio
import contextlib
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from conftest import ROOT
from understudy.client import InferenceClient
from understudy.errors import UnderstudyError
from understudy.v1 import common_pb2, weight_pb2_grpc

from inference_helpers import write_word_bundle  # isort: skip
from weight_history import (  # isort: skip
    Follower,
    History,
    Trainer,
    following,
    look,
    store_address,
    training,
    until_taken,
)
from weight_processes import Processes, free_port, processes  # isort: skip
from weight_store_helpers import fetch_links, tensors_of  # isort: skip

INTAKE, STORE = "learner.intake", "learner.weights"
STORE_KILLS = tuple(f"weights.after_{what}:3" for what in ("issue", "write", "remove", "full_copy"))
LOG_KILLS = tuple(f"log.after_{what}:8" for what in ("append", "write", "fdatasync"))
PROMPT = np.array([2, 3], np.int32)
SAMPLING = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=4)
own_process = pytest.mark.parametrize("own", [False, True], ids=["in the intake", "own process"])


@contextlib.asynccontextmanager
async def learner(folder: Path, *, own: bool, keep_deltas: int = 32) -> AsyncIterator[Processes]:
    """The intake and the store, with a model that replicas can start with."""
    async with processes(folder, own=own, keep_deltas=keep_deltas) as running:
        write_word_bundle(folder / "model")
        await asyncio.gather(*(running.start(module) for module in modules(own)))
        yield running


def modules(own: bool) -> tuple[str, ...]:
    return (INTAKE, STORE) if own else (INTAKE,)


async def refused(trainer: Trainer) -> None:
    with pytest.raises(UnderstudyError, match="OLD_EPOCH"):
        await trainer.publish()


# Two learners.


@own_process
async def test_of_two_learners_only_the_newer_gets_through(tmp_path: Path, own: bool) -> None:
    history = History()
    async with learner(tmp_path, own=own) as running, following(running, history) as follower:
        async with training(running, history) as old:
            publishing = asyncio.create_task(old.publish_until(asyncio.Event()))
            await old.publishes(3)
            async with training(running, history) as new:
                for _ in range(5):
                    await new.publish()
                with pytest.raises(UnderstudyError, match="OLD_EPOCH"):
                    await asyncio.wait_for(publishing, 10)
                for _ in range(3):
                    await refused(old)
                    await new.publish()
                await asyncio.gather(*(new.publish(), refused(old)))
                await follower.serves(new.versions[-1])
    assert old.versions[-1] < new.versions[0]
    assert {old.epoch, new.epoch} == {1, 2}
    assert follower.version == new.versions[-1]
    history.check()


async def test_parts_of_two_learners_never_make_one_version(tmp_path: Path) -> None:
    history = History()
    async with learner(tmp_path, own=True) as running, following(running, history) as follower:
        async with training(running, history) as old:
            await old.publish()
            old.step += 1
            waiting = asyncio.create_task(old.publish_part(old.ranks[0]))
            await until_taken(running, old.epoch, taken=True)
            async with training(running, history) as new:
                new.step = old.step - 1
                await new.publish()  # discards what the old one began
                with pytest.raises(UnderstudyError, match="OLD_EPOCH"):
                    await waiting
                new.step += 1
                waiting = asyncio.create_task(new.publish_part(new.ranks[0]))
                await until_taken(running, new.epoch, taken=True)
                old.step = new.step
                with pytest.raises(UnderstudyError, match="OLD_EPOCH"):
                    await old.publish_part(old.ranks[1])
                version = await new.publish_part(new.ranks[1])
                assert await waiting == version
                history.publishes(version, tensors_of(new.tensors))
                await follower.serves(version)
    history.check()


# A learner that is killed.


@pytest.mark.parametrize("num_bytes", [10**6, 10], ids=["whole part", "beginning of one"])
async def test_a_learner_killed_between_its_parts_leaves_nothing(
    tmp_path: Path, num_bytes: int
) -> None:
    history, replica = History(), f"127.0.0.1:{free_port()}"
    async with learner(tmp_path, own=False) as running:
        async with training(running, history) as old:
            assert await old.publish() == 1
            await running.start_replica(replica)
            async with client_of(replica) as generating:
                await send_and_die(running, old.epoch, num_bytes)
                assert await look(store_address(running), history, "the store") == 1
                # The rank that lives on sends its part, and waits for the other.
                old.step += 1
                alone = asyncio.create_task(old.publish_part(old.ranks[1]))
                await until_taken(running, old.epoch, taken=True)
                assert await generate(generating) == 1
                async with training(running, history) as new:
                    assert await new.publish() == 2
                    with pytest.raises(UnderstudyError, match="OLD_EPOCH"):
                        await alone
                    await serves(generating, 2)
        links = await fetch_links(running.weights)
        assert [(manifest.version, manifest.base_version) for manifest, _ in links] == [(2, 0)]
        assert await look(replica, history, "replica") == 2
        assert await look(store_address(running), history, "the store") == 2
    history.check()


async def send_and_die(running: Processes, epoch: int, num_bytes: int) -> None:
    """A rank sends part 0 of 2, or the beginning, and is killed once that is at the store."""
    rank = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "tests/weight_child.py"), store_address(running)),
        *map(str, (epoch, 1, num_bytes)),
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    try:
        await until_taken(running, epoch, taken=True)
    finally:
        rank.kill()
        await rank.wait()
    await until_taken(running, epoch, taken=False)


# A store that is killed.


@pytest.mark.parametrize(
    "kills",
    [{INTAKE: (*STORE_KILLS, *LOG_KILLS)}, {STORE: STORE_KILLS, INTAKE: LOG_KILLS[-1:]}],
    ids=["in the intake", "own process"],
)
async def test_a_kill_at_any_point_of_a_commit_loses_nothing(
    tmp_path: Path, kills: dict[str, tuple[str, ...]]
) -> None:
    own, history, end = STORE in kills, History(), asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(learner(tmp_path, own=own, keep_deltas=2))
        follower = await stack.enter_async_context(following(running, history))
        trainer = await stack.enter_async_context(training(running, history))
        publishing = asyncio.create_task(trainer.publish_until(end))
        await trainer.publishes(1)
        for module, failpoint in [(one, name) for one in kills for name in (*kills[one], "")]:
            answered = trainer.versions[-1]
            trainer.may_begin.clear()  # what is begun is not enough for the failpoint
            await running.kill(module)
            await running.start(module, failpoint)
            assert await look(store_address(running), history, "the store") >= answered
            trainer.may_begin.set()
            if failpoint:
                async with asyncio.timeout(30):
                    assert await running.running[module].wait() == -signal.SIGKILL
        await finish(trainer, follower, end, publishing)
    assert trainer.versions == sorted(set(trainer.versions))
    history.check()


@own_process
async def test_no_follower_ever_serves_what_was_not_published(tmp_path: Path, own: bool) -> None:
    """Kills at random moments, also of a process that is starting, under deltas without a pause."""
    rng, history, end = random.Random(5), History(), asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(learner(tmp_path, own=own, keep_deltas=4))
        follower = await stack.enter_async_context(following(running, history))
        trainer = await stack.enter_async_context(training(running, history))
        publishing = asyncio.create_task(trainer.publish_until(end))
        await trainer.publishes(1)
        for attempt in range(3 + own):
            module = modules(own)[attempt % (1 + own)]
            await asyncio.sleep(rng.uniform(0, 0.3))
            await running.kill(module)
            await running.spawn(module, "-m", module)
            await asyncio.sleep(rng.uniform(0.2, 0.8))
            await running.kill(module)
            await running.start(module)
            await look(store_address(running), history, "the store")
        async with asyncio.timeout(60):
            while len(history.served["follower"]) <= 10:  # noqa: ASYNC110 - the history wakes nobody
                await asyncio.sleep(0.02)
        await finish(trainer, follower, end, publishing)
        late = await stack.enter_async_context(following(running, history, "late"))
        await late.serves(trainer.versions[-1])
    assert trainer.versions == sorted(set(trainer.versions))
    history.check()


async def finish(
    trainer: Trainer, follower: Follower, end: asyncio.Event, publishing: "asyncio.Task[None]"
) -> None:
    """Publish one version more, and have it served."""
    end.set()
    await asyncio.wait_for(publishing, 30)
    await follower.serves(trainer.versions[-1])


# Replicas that are killed or stopped.


@contextlib.asynccontextmanager
async def client_of(address: str) -> AsyncIterator[InferenceClient]:
    async with InferenceClient.connect(address) as client:
        yield client


async def generate(client: InferenceClient) -> int:
    """The version that a reply is of."""
    reply = await client.generate(PROMPT, SAMPLING, timeout=2)
    [span] = reply.version_spans
    return span.version


async def serves(client: InferenceClient, version: int) -> None:
    """Wait until a replica serves a version or a newer one."""
    async with asyncio.timeout(30):
        while await generate(client) < version:  # noqa: ASYNC110 - what a client can see
            await asyncio.sleep(0.02)


async def generate_until(client: InferenceClient, end: asyncio.Event) -> list[int]:
    """Generate without a pause and without an error; the versions of the replies."""
    versions = []
    while not end.is_set():
        versions.append(await generate(client))
        await asyncio.sleep(0.01)
    return versions


async def test_a_replica_killed_before_its_engine_has_the_weights_comes_back(
    tmp_path: Path,
) -> None:
    history, end = History(), asyncio.Event()
    dies, lives = (f"127.0.0.1:{free_port()}" for _ in range(2))
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(learner(tmp_path, own=False))
        trainer = await stack.enter_async_context(training(running, history))
        await trainer.publish()
        await running.start_replica(dies, "inference.after_verify:2")
        await running.start_replica(lives)
        other = await stack.enter_async_context(client_of(lives))
        generating = asyncio.create_task(generate_until(other, end))
        await trainer.publish()
        async with asyncio.timeout(10):
            assert await running.running[dies].wait() == -signal.SIGKILL
        await serves(other, 2)
        await trainer.publish()
        await running.start_replica(dies)
        assert await look(dies, history, "dies") == 3
        back = await stack.enter_async_context(client_of(dies))
        assert await generate(back) == 3
        await trainer.publish()
        await asyncio.gather(serves(back, 4), serves(other, 4))
        for address in (dies, lives):
            assert await look(address, history, address) == 4
        end.set()
        versions = await generating
    assert versions == sorted(versions)
    assert set(versions) >= {1, 2}
    history.check()


async def test_a_replica_that_stands_still_catches_up(tmp_path: Path) -> None:
    """One misses few versions and is sent deltas, one misses many and is sent a full copy."""
    history, end = History(), asyncio.Event()
    few, many, goes_on = (f"127.0.0.1:{free_port()}" for _ in range(3))
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(learner(tmp_path, own=False, keep_deltas=6))
        trainer = await stack.enter_async_context(training(running, history))
        await trainer.publish()
        await asyncio.gather(*(running.start_replica(one) for one in (few, many, goes_on)))
        other = await stack.enter_async_context(client_of(goes_on))
        generating = asyncio.create_task(generate_until(other, end))
        stands_still = {}
        for address, num_versions in ((many, 12), (few, 3)):
            stands_still[address] = await look(address, history, address)
            running.running[address].send_signal(signal.SIGSTOP)
            for _ in range(num_versions):
                await trainer.publish()
                await serves(other, trainer.versions[-1])
        await asyncio.sleep(5)
        await trainer.publish()
        await serves(other, trainer.versions[-1])
        for address, by_deltas in ((many, False), (few, True)):
            running.running[address].send_signal(signal.SIGCONT)
            client = await stack.enter_async_context(client_of(address))
            await serves(client, trainer.versions[-1])
            assert await look(address, history, address) == trainer.versions[-1]
            assert await passes_on_deltas(address, stands_still[address]) == by_deltas
        end.set()
        versions = await generating
    assert versions == sorted(versions)
    history.check()


async def passes_on_deltas(address: str, base: int) -> bool:
    """Whether a replica has the deltas since a version, and so was sent them."""
    async with grpc.aio.insecure_channel(address) as channel:
        links = await fetch_links(weight_pb2_grpc.WeightServiceStub(channel), base=base)
    return bool(links[0][0].base_version)
