"""Batches that look for groups whose rewards differ: which groups they take, and that they end."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from intake_rig import make_config, running
from learner.audit import audit_run
from learner.intake.batches import overlong_penalty
from learner.intake.ledger import Ledger
from learner.intake.tasks import State
from test_intake_batches import lines_of, rewards_of
from test_intake_ledger import STEPS, Entries, deliver, make_ledger, make_tasks, publish, replayed
from understudy.config import LearnerConfig, TasksConfig, load_config
from understudy.errors import ConfigError
from understudy.v1 import log_pb2

UNIFORM, MIXED = (1.0, 1.0), (0.0, 1.0)


def play(ledger: Ledger, kinds: Callable[[int], tuple[float, float]], version: int = 1) -> int:
    """Play all that may be leased, group by group; returns how many groups."""
    ordinals = set()
    while leases := ledger.lease("a", 1):
        key = leases[0].sample.key
        ordinals.add(key.ordinal)
        assert deliver(ledger, leases[0], kinds(key.ordinal)[key.sample_index], version)
    return len(ordinals)


def test_a_batch_goes_on_until_enough_groups_differ() -> None:
    ledger = make_ledger(group_size=2, max_resample=3, max_staleness=0)
    publish(ledger, 0)
    leases = ledger.lease("a", 100)
    assert len(leases) == 4  # no more than are needed if all of them differ
    for lease in leases:
        deliver(ledger, lease, UNIFORM[0])
    assert ledger.ready_groups() == []
    kinds = [UNIFORM, UNIFORM, MIXED, UNIFORM, MIXED]
    assert play(ledger, kinds.__getitem__) == 3
    batch = ledger.assign(ledger.ready_groups())
    assert [group.ordinal for group in batch.groups] == [0, 1, 2, 3, 4]
    assert [group.uniform for group in batch.groups] == [True, True, False, True, False]
    assert {item.key.ordinal for item in batch.items} == {2, 4}
    assert ledger.state.balance().dropped == {"uniform_group": 6}


def test_a_batch_ends_though_all_groups_are_uniform() -> None:
    ledger = make_ledger(group_size=2, max_resample=3, max_staleness=0)
    for step in range(STEPS):
        publish(ledger, step)
        assert play(ledger, lambda _: UNIFORM, step + 1) == 6
        batch = ledger.assign(ledger.ready_groups())
        assert (len(batch.groups), batch.items) == (6, [])
        ledger.complete(step)
    assert ledger.exhausted


def test_without_resampling_groups_are_taken_as_they_come() -> None:
    ledger = make_ledger(group_size=2, max_staleness=0)
    publish(ledger, 0)
    assert play(ledger, lambda _: UNIFORM) == 2
    assert len(ledger.assign(ledger.ready_groups()).groups) == 2


def test_a_failed_group_makes_room_without_a_further_one() -> None:
    ledger = make_ledger(group_size=2, max_resample=2, max_staleness=0, max_attempts=1)
    publish(ledger, 0)
    leases = ledger.lease("a", 4)
    ledger.fail(leases[0].sample.key, leases[0].lease_id, "failed")  # its group cannot be compared
    for lease in leases[2:]:
        deliver(ledger, lease, UNIFORM[0])
    assert len(ledger.lease("a", 100)) == 4  # one group for the failed one, one for the uniform


@pytest.mark.parametrize("seed", range(6))
def test_batches_are_the_shortest_stretches_and_never_wait_for_nothing(seed: int) -> None:
    """Actors that end in any order, expiries, failures, restarts of the intake and of the trainer;
    groups of two, of which some are uniform."""
    rng = random.Random(seed)
    tasks = make_tasks(
        group_size=2, max_resample=rng.choice((2, 3)), max_staleness=seed % 3, max_attempts=2
    )
    share, log = rng.choice((0.2, 0.6, 0.95)), Entries()
    ledger = Ledger(log, replayed(log, tasks))
    ledger.start_training(0, b"")
    publish(ledger, 0)
    running, now = [], 0.0
    for _ in range(20_000):
        running += ledger.lease("a", rng.randint(0, 2))
        if running and rng.random() < 0.8:
            lease = running.pop(rng.randrange(len(running)))
            key, head = lease.sample.key, ledger.state.admission.version
            kind = UNIFORM if random.Random(key.ordinal).random() < share else MIXED
            if rng.random() < 0.05:
                ledger.fail(key, lease.lease_id, "failed")
            elif ledger.knows(key):
                deliver(ledger, lease, kind[key.sample_index], head)
        if rng.random() < 0.02:
            now += 6.0
            ledger.expire(now)
        if rng.random() < 0.01:
            before, now = vars(ledger._lineup), 0.0
            ledger = Ledger(log, replayed(log, tasks))
            assert vars(ledger._lineup) == before
        if rng.random() < 0.003 and ledger.state.num_completed:
            ledger.start_training(0, b"")
            publish(ledger, 0)
        state = ledger.state
        if groups := ledger.ready_groups():
            expect_shortest(ledger, [g.ordinal for g in groups])
            if not ledger.last_is_closed and state.num_closed <= state.num_completed + 1:
                ledger.assign(groups)
        if state.num_completed < state.num_closed and rng.random() < 0.3:
            ledger.complete(state.num_completed)
            publish(ledger, state.num_completed)
        assert state.balance().holds
        if state.num_completed == STEPS:
            break
    assert ledger.state.num_completed == STEPS


def expect_shortest(ledger: Ledger, ordinals: list[int]) -> None:
    tasks, groups = ledger.tasks, list(ledger.state.open.values())[: len(ordinals)]
    assert ordinals == [group.ordinal for group in groups]
    differ = [
        len({s.summary.reward for s in g.in_state(State.STORED) if s.summary}) > 1 for g in groups
    ]
    if len(groups) < tasks.groups_per_batch * tasks.max_resample:
        assert sum(differ) == tasks.groups_per_batch
        assert differ[-1]
    else:
        assert sum(differ[:-1]) < tasks.groups_per_batch


async def test_a_run_that_resamples_counts_what_it_left_out(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_resample=2, max_staleness=0)
    async with running(config) as rig:
        first = await rig.lease()
        assert len(first) == 4
        await rig.play(first, reward=1.0)
        more = await rig.lease()
        assert [lease.task_key.ordinal for lease in more] == [2, 2, 3, 3]
        await rig.play(more)
        header, items = await rig.batch(0)
        assert [group.uniform for group in header.groups] == [True, True, False, False]
        assert {item.group_index for item in items} == {2, 3}
        await rig.complete(0)
        line = lines_of(rig)[-1]
        assert (line["groups"], line["uniform_groups"], line["episodes"]) == (4, 2, 8)
    report = audit_run(config.run.path)
    assert report.passed
    assert (report.groups, report.uniform_groups) == (4, 2)


async def test_algorithms_that_learn_from_uniform_groups_get_them(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_staleness=0)
    algorithm = config.learner.algorithm.model_copy(update={"estimator": "vtrace"})
    learner = config.learner.model_copy(update={"algorithm": algorithm})
    config = config.model_copy(update={"learner": learner})
    async with running(config) as rig:
        leases = await rig.lease()
        await rig.play(leases[:2], reward=1.0)
        await rig.play(leases[2:])
        header, items = await rig.batch(0)
        assert [group.uniform for group in header.groups] == [True, False]
        assert {item.group_index for item in items} == {0, 1}
        assert header.num_trajectories == 4
        await rig.complete(0)
        assert rig.intake.balance().figures()["trained"] == 4
        assert rig.intake.balance().dropped == {}
    assert audit_run(config.run.path).passed


# The length of episodes.


def summary(longest_reply: int = 0, longest_segment: int = 0) -> log_pb2.EpisodeSummary:
    return log_pb2.EpisodeSummary(longest_reply=longest_reply, longest_segment=longest_segment)


def test_the_penalty_rises_towards_the_nearest_limit() -> None:
    tasks = TasksConfig(
        max_new_tokens=100, max_tokens=400, overlong_tokens=20, overlong_penalty=0.5
    )
    penalties = {80: 0.0, 81: 0.025, 90: 0.25, 100: 0.5, 120: 0.5}
    for length, penalty in penalties.items():
        assert overlong_penalty(summary(length, 300), tasks) == pytest.approx(penalty)
        assert overlong_penalty(summary(10, length + 300), tasks) == pytest.approx(penalty)
    assert overlong_penalty(summary(), tasks) == 0.0  # of a log that does not say
    assert overlong_penalty(summary(100, 400), TasksConfig()) == 0.0


@pytest.mark.parametrize("shuffled", [False, True])
async def test_long_episodes_are_trained_with_less(tmp_path: Path, shuffled: bool) -> None:
    shape = {"max_new_tokens": 100, "max_tokens": 100, "overlong_tokens": 40}
    config = make_config(tmp_path, max_staleness=0, shuffle_rewards=shuffled, **shape)
    async with running(config) as rig:
        leases = await rig.lease()
        await rig.play(leases[:1], num_tokens=90, reward=1.0)
        await rig.play(leases[1:], reward=1.0)
        header, items = await rig.batch(0)
        rewards = rewards_of(header)
        assert sorted(itertools.chain(*rewards)) == [0.25, 1.0, 1.0, 1.0]
        assert shuffled or rewards == [[0.25, 1.0], [1.0, 1.0]]
        assert len(items) == 2  # lengths alone make a group differ
        await rig.complete(0)
        line = lines_of(rig)[-1]
        assert (line["reward_mean"], line["overlong_penalty_mean"]) == (1.0, 0.1875)
    assert audit_run(config.run.path).passed


async def test_an_episode_s_lengths_are_in_the_log(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        (lease,) = await rig.lease(1)
        await rig.play([lease], num_tokens=30)
        stored = rig.intake.state.open[0].samples[0].summary
        assert (stored.longest_segment, stored.longest_reply) == (30, 15)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("top_p = 0.9", "learner.tasks: top_p = 0.9 would sample from another distribution"),
        ("top_k = 40", "only temperature can be set"),
        ("repetition_penalty = 1.1", "leave it out"),
        ("max_resample = 2\nshuffle_rewards = true", "set max_resample = 1"),
        ("overlong_tokens = 2000", "overlong_tokens = 2000 is not below max_new_tokens"),
        ("max_resample = 0", "learner.tasks.max_resample = 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"[model]\npath = 'm'\n[learner.tasks]\n{text}")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert said in str(caught.value)


def test_resampling_comes_before_what_the_algorithm_learns_from() -> None:
    vtrace = {"name": "vtrace"}
    assert LearnerConfig.model_validate({"algorithm": vtrace}).keeps_uniform_groups
    assert not LearnerConfig().keeps_uniform_groups
    tasks = {"max_resample": 2}
    resampled = LearnerConfig.model_validate({"algorithm": vtrace, "tasks": tasks})
    assert not resampled.keeps_uniform_groups
