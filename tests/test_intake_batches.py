"""Batches through real streams: repeatable, split by tokens, journaled."""

import asyncio
import itertools
import json
from pathlib import Path

import grpc
import numpy as np
import pytest

from intake_rig import Rig, make_config, running
from understudy.rpc import error_reason
from understudy.v1 import batch_pb2


async def reason_of(call: object) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error_reason(error.value)


def rewards_of(header: batch_pb2.BatchHeader) -> list[list[float]]:
    return [np.frombuffer(group.rewards, "<f4").tolist() for group in header.groups]


def lines_of(rig: Rig, name: str = "metrics.jsonl") -> list[dict[str, object]]:
    path = rig.intake.config.run.path / name
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_a_batch_waits_for_its_groups_and_repeats(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        leases = await rig.lease(4)
        waiting = asyncio.create_task(rig.batch(0))
        await rig.play(leases[:3])
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await rig.play(leases[3:])
        header, items = await waiting
        assert (header, items) == await rig.batch(0)
        assert (header.step, header.head_version, header.last) == (0, 1, False)
        assert (header.num_trajectories, header.num_sampled_tokens) == (4, 24)
        assert [group.ordinal for group in header.groups] == [0, 1]
        assert rewards_of(header) == [[0.0, 1.0], [0.0, 1.0]]
        for item in items:
            assert header.groups[item.group_index].ordinal == item.record.task_key.ordinal
            assert item.reward_index == item.record.task_key.sample_index


async def test_batches_take_groups_in_order_of_issue_not_of_completion(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        leases = await rig.lease(8)
        waiting = asyncio.create_task(rig.batch(0))
        await rig.play(leases[2:])  # all but the first group: enough for a batch, were it allowed
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await rig.play(leases[:2])
        header, _ = await waiting
        assert [group.ordinal for group in header.groups] == [0, 1]
        assert rig.intake.balance().dropped == {}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
async def test_shares_are_disjoint_complete_and_balanced(tmp_path: Path, world_size: int) -> None:
    config = make_config(tmp_path, group_size=8, groups_per_batch=4, max_staleness=0)
    rng = np.random.default_rng(world_size)
    async with running(config) as rig:
        for lease in await rig.lease():
            await rig.play([lease], num_tokens=int(rng.integers(10, 400)))
        shares = await asyncio.gather(
            *(rig.batch(0, rank, world_size) for rank in range(world_size))
        )
        keys, loads = [], []
        for header, items in shares:
            assert header == shares[0][0]
            keys += [tuple(item.record.task_key.ListFields()) for item in items]
            loads.append(sum(rig_tokens(rig, item) for item in items))
        assert len(keys) == len(set(map(str, keys))) == 32 == shares[0][0].num_trajectories
        assert max(loads) - min(loads) < 400
        assert (await rig.batch(0, 0, world_size))[1] == shares[0][1]


def rig_tokens(rig: Rig, item: batch_pb2.BatchTrajectory) -> int:
    key = (item.record.task_key.ordinal, item.record.task_key.sample_index)
    batch = rig.intake.state.batches[0]
    return next(i.summary.num_tokens for i in batch.episodes if tuple(i.key) == key)


async def test_steps_out_of_order_and_wrong_ranks_are_refused(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        assert await reason_of(rig.batch(1)) == "STEP_OUT_OF_ORDER"
        assert await reason_of(rig.complete(0)) == "STEP_OUT_OF_ORDER"
        assert await reason_of(rig.batch(0, rank=2, world_size=2)) == "BAD_RANK"
        assert await reason_of(rig.batch(0, rank=0, world_size=0)) == "BAD_RANK"
        await rig.play(await rig.lease(4))
        await rig.batch(0, rank=0, world_size=2)
        assert await reason_of(rig.batch(0, rank=0, world_size=1)) == "BAD_RANK"
        await rig.batch(0, rank=1, world_size=2)
        await rig.complete(0)
        await rig.complete(0)
        # Until a checkpoint has it behind itself, a completed step can be asked for again.
        await rig.batch(0, rank=0, world_size=1)
        await rig.checkpoint(1, oldest_kept_step=1)
        assert await reason_of(rig.batch(0, rank=0, world_size=1)) == "STEP_OUT_OF_ORDER"
        assert await reason_of(rig.checkpoint(2)) == "STEP_OUT_OF_ORDER"


async def test_uniform_groups_are_dropped_but_listed(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        leases = await rig.lease(4)
        await rig.play(leases[:2], reward=1.0)
        await rig.play(leases[2:])
        header, items = await rig.batch(0)
        assert [group.uniform for group in header.groups] == [True, False]
        assert rewards_of(header) == [[1.0, 1.0], [0.0, 1.0]]
        assert {item.group_index for item in items} == {1}
        assert header.num_trajectories == 2
        await rig.complete(0)
        balance = rig.intake.balance()
        assert balance.dropped == {"uniform_group": 2}
        assert balance.figures()["trained"] == 2
        assert lines_of(rig)[-1]["uniform_groups"] == 1


async def test_a_batch_of_uniform_groups_only_is_empty(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        await rig.play(await rig.lease(4), reward=0.0)
        header, items = await rig.batch(0)
        assert (header.num_trajectories, items) == (0, [])
        await rig.complete(0)


async def test_shuffled_rewards_are_the_same_rewards(tmp_path: Path) -> None:
    shape = {"group_size": 8, "groups_per_batch": 4, "max_staleness": 0}
    config = make_config(tmp_path, seed=7, shuffle_rewards=True, **shape)
    async with running(config) as rig:
        await rig.play(await rig.lease())
        header, _ = await rig.batch(0)
        shuffled = rewards_of(header)
        assert shuffled != [[float(index) for index in range(8)]] * 4
        assert sorted(itertools.chain(*shuffled)) == sorted([float(i) for i in range(8)] * 4)
        await rig.complete(0)
        assert lines_of(rig)[-1]["reward_mean"] == 3.5


async def test_stale_trajectories_are_replaced_before_the_batch_closes(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_staleness=0)
    async with running(config) as rig:
        await rig.play(await rig.lease())
        await rig.batch(0)
        await rig.complete(0)
        await rig.publish(1)
        leases = await rig.lease()
        await rig.play(leases[:1], versions=(2,))
        await rig.play(leases[1:2], versions=(1, 2))  # a replica that was too slow
        assert rig.intake.balance().dropped == {"stale": 1, "short_group": 1}
        replacements = await rig.lease()
        assert {lease.min_version for lease in replacements} == {2}
        await rig.play([*leases[2:], *replacements], versions=(2,))
        header, items = await rig.batch(1)
        assert header.head_version == 2
        assert len(items) == 4


async def test_a_batch_tells_the_steps_behind_the_versions_that_played_it(tmp_path: Path) -> None:
    async with running(make_config(tmp_path, max_staleness=1)) as rig:
        await rig.play(await rig.lease(4))
        await rig.batch(0)
        await rig.complete(0)
        await rig.publish(1)
        await rig.train(step=0)  # a trainer that starts again, without a checkpoint
        await rig.publish(0)
        header, _ = await rig.batch(0)
        assert dict(header.steps_behind) == {1: 0}
        await rig.complete(0)
        await rig.publish(1)
        leases = await rig.lease(4)
        await rig.play(leases[:1], versions=(3, 4))
        await rig.play(leases[1:], versions=(4,))
        header, _ = await rig.batch(1)
        assert dict(header.steps_behind) == {1: 0, 2: 1, 3: 0, 4: 1}
        await rig.complete(1)
        await rig.publish(2)
        await rig.play(await rig.lease(4), versions=(5,))
        header, _ = await rig.batch(2)
        assert dict(header.steps_behind) == {5: 2}


async def test_a_prefetched_batch_waits_for_experience_that_will_be_fresh(tmp_path: Path) -> None:
    async with running(make_config(tmp_path, max_staleness=0)) as rig:
        await rig.play(await rig.lease())
        await rig.batch(0)
        prefetch = asyncio.create_task(rig.batch(1))
        assert await rig.lease(timeout=0.3) == []
        await rig.complete(0)
        await rig.publish(1)
        await rig.play(await rig.lease(), versions=(2,))
        header, _ = await prefetch
        assert header.head_version == 2


async def test_the_last_batch_says_so(tmp_path: Path) -> None:
    async with running(make_config(tmp_path, steps=2)) as rig:
        await rig.play(await rig.lease())
        assert not (await rig.batch(0))[0].last
        assert (await rig.batch(1))[0].last
        assert await reason_of(rig.batch(2)) == "STEP_OUT_OF_ORDER"


async def test_the_batch_closed_after_the_time_limit_is_the_last(tmp_path: Path) -> None:
    async with running(make_config(tmp_path, max_seconds=0.05)) as rig:
        waiting = asyncio.create_task(rig.batch(0))
        await asyncio.sleep(0.1)
        await rig.play(await rig.lease(4))
        header, _ = await waiting
        assert header.last
        assert await reason_of(rig.batch(1)) == "STEP_OUT_OF_ORDER"
        assert await rig.lease(4) == []
        assert rig.intake.balance().holds


async def test_a_step_is_journaled(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        await rig.play(await rig.lease())
        await rig.batch(0)
        await rig.complete(0, loss=0.25, grad_norm=float("nan"))
        await rig.publish(1)
        await rig.batch(1)
        await rig.complete(1)
        steps = [line for line in lines_of(rig) if line["kind"] == "step"]
        first, second = steps
        assert first["loss"] == 0.25
        assert first["grad_norm"] is None
        assert (first["step"], first["version"], first["trajectories"]) == (0, 1, 4)
        assert first["reward_mean"] == 0.5
        assert first["reward_level1"] == first["reward_level2"] == 0.5
        assert (first["turns_mean"], first["tokens_mean"]) == (1, 12)
        assert (first["staleness_mean"], second["staleness_max"]) == (0, 1)
        assert second["version"] == 2
        samples = lines_of(rig, "samples.jsonl")
        assert [line["step"] for line in samples] == [0, 0, 1, 1]
        assert [line["reward"] for line in samples[:2]] == [1.0, 0.0]
        assert len(samples[0]["segments"][0]["token_ids"]) == 12


async def test_a_stop_ends_the_wait_for_a_batch(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        waiting = asyncio.create_task(rig.batch(0))
        await asyncio.sleep(0.05)
        await rig.intake.close()
        assert await reason_of(waiting) == "DRAINING"
