"""The ledger alone: balance under any order of events, restarts, and admission by staleness."""

import random
from dataclasses import replace

import pytest

from learner.intake.admission import Admission
from learner.intake.leases import Lease
from learner.intake.ledger import Ledger, Result
from learner.intake.refusals import RefusedError
from learner.intake.state import RunState
from learner.intake.tasks import State, TaskKey
from learner.log.segments import Location
from understudy.config import EvaluationConfig, TasksConfig
from understudy.v1 import common_pb2, log_pb2, trajectory_pb2

STEPS = 6


class Entries:
    """A log in memory."""

    def __init__(self) -> None:
        self.all: list[bytes] = []

    def append(self, entry: log_pb2.LogEntry, payload: bytes = b"") -> Location:
        self.all.append(entry.SerializeToString())
        return self.location(len(self.all) - 1)

    def location(self, index: int) -> Location:
        return Location(1 + index // 50, index % 50, 1)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_tasks(**tasks: object) -> TasksConfig:
    shape = {"group_size": 3, "groups_per_batch": 2, "lease_seconds": 10.0, **tasks}
    return TasksConfig.model_validate(shape)


def make_ledger(log: Entries | None = None, clock: Clock | None = None, **tasks: object) -> Ledger:
    ledger = Ledger(log or Entries(), RunState(make_tasks(**tasks), STEPS, clock or Clock()))
    ledger.start_training(0, b"")
    return ledger


def replayed(log: Entries, tasks: TasksConfig) -> RunState:
    """The state that a start makes of a log."""
    state = RunState(tasks, STEPS, Clock())
    for index, entry in enumerate(log.all):
        state.apply(log_pb2.LogEntry.FromString(entry), log.location(index))
    return state


def facts(state: RunState) -> object:
    """All that a restart has to keep."""
    groups = {
        ordinal: [(s.state, s.num_failures, s.lease_id, s.location) for s in group.samples]
        for ordinal, group in state.open.items()
    }
    batches = {
        step: [(item.key, item.location, item.staleness) for item in batch.items]
        for step, batch in state.batches.items()
    }
    evaluations = [
        (
            e.number,
            e.version,
            e.step,
            [(s.key, s.state, s.num_failures, s.lease_id) for s in e.samples],
        )
        for e in state.evaluations.values()
    ]
    return (
        state.balance(),
        groups,
        (evaluations, state.num_evaluations, state.evaluated_steps),
        [sample.key for sample in state.heldout],
        batches,
        [sample.key for sample in state.waiting],
        [(lease.lease_id, lease.actor_id) for lease in state.leases.expired(1e9)],
        (state.epoch, state.trainer_epoch, state.num_groups, state.num_closed),
        (state.num_completed, state.oldest_step, state.steps_behind, state.admission),
        state.ledger_digests,
        state.oldest_segment(),
    )


def deliver(ledger: Ledger, lease: Lease, reward: float = 0.0, version: int = 1) -> bool:
    key = lease.sample.key
    record = trajectory_pb2.TrajectoryRecord(
        task_key=common_pb2.TaskKey(ordinal=key.ordinal, sample_index=key.sample_index),
        lease_id=lease.lease_id,
    )
    summary = log_pb2.EpisodeSummary(
        task_id="t",
        level=1,
        reward=reward,
        oldest_version=version,
        oldest_step=ledger.oldest_step([version]),
        num_tokens=10,
        num_sampled_tokens=5,
        num_turns=1,
    )
    origin = log_pb2.RecordOrigin(actor_id="a", incarnation=1)
    return ledger.deliver(
        Result(key=key, origin=origin, record=record, payload=b"x", summary=summary)
    )


def publish(ledger: Ledger, step: int) -> None:
    """The next version, with so many steps behind it."""
    assert ledger.publish(step, ledger.state.trainer_epoch) == len(ledger.state.steps_behind)


def close_next(ledger: Ledger) -> int:
    """Close the next batch if it is ready; returns how many trajectories it trains."""
    groups = ledger.ready_groups()
    if not groups:
        return 0
    batch = ledger.assign(groups)
    assert all(item.staleness <= ledger.tasks.max_staleness for item in batch.items)
    return len(batch.items)


class Walk:
    """Random events on one ledger, restarts of both processes among them."""

    def __init__(self, seed: int, max_staleness: int) -> None:
        self.random = random.Random(seed)
        self.log = Entries()
        self.tasks = make_tasks(
            max_staleness=max_staleness, max_attempts=2, max_resample=self.random.choice((1, 3))
        )
        self.clock = Clock()
        self.ledger = self.make(RunState(self.tasks, STEPS, self.clock))
        self.ledger.start_training(0, b"")
        self.leases: list[Lease] = []
        self.checkpoints = [0]
        publish(self.ledger, 0)

    def make(self, state: RunState) -> Ledger:
        evaluation = EvaluationConfig(every_steps=2, num_tasks=3)
        return Ledger(self.log, state, evaluation, keeps_uniform=self.tasks.max_resample == 1)

    @property
    def state(self) -> RunState:
        return self.ledger.state

    def publish(self) -> None:
        publish(self.ledger, min(self.state.admission.step + 1, self.state.num_completed))

    def lease(self) -> None:
        self.leases += self.ledger.lease("a", self.random.randint(1, 4))

    def deliver(self) -> None:
        if self.leases:
            lease = self.random.choice(self.leases)  # not removed: it may come twice
            head = self.state.admission.version
            version = self.random.randint(max(head - 2, 1), head)
            deliver(self.ledger, lease, float(self.random.randint(0, 1)), version)

    def fail(self) -> None:
        if self.leases:
            lease = self.random.choice(self.leases)
            self.ledger.fail(lease.sample.key, lease.lease_id, "failed")

    def pass_time(self) -> None:
        self.clock.now += self.random.uniform(0, 8)
        self.ledger.expire(self.clock.now)

    def close(self) -> None:
        close_next(self.ledger)

    def complete(self) -> None:
        if self.state.num_completed < self.state.num_closed:
            self.ledger.complete(self.state.num_completed)

    def checkpoint(self) -> None:
        self.checkpoints = [*self.checkpoints, self.state.num_completed][-2:]
        self.ledger.record_checkpoint(self.checkpoints[-1], self.checkpoints[0], b"")

    def restart_trainer(self) -> None:
        step = self.random.choice(self.checkpoints)
        self.checkpoints = [kept for kept in self.checkpoints if kept <= step]
        self.ledger.start_training(step, self.state.ledger_digests[step])
        publish(self.ledger, step)

    def restart_intake(self) -> None:
        state = replayed(self.log, self.tasks)
        self.clock = Clock()
        state._clock = self.clock
        self.ledger = self.make(state)

    def step(self) -> None:
        moves = (self.lease, self.deliver, self.deliver, self.deliver, self.close)
        rare = (self.fail, self.pass_time, self.complete, self.publish, self.checkpoint)
        restarts = (self.restart_trainer, self.restart_intake)
        luck = self.random.random()
        chosen = moves if luck < 0.8 else rare if luck < 0.98 else restarts
        self.random.choice(chosen)()


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_balance_holds_at_every_moment(seed: int, max_staleness: int) -> None:
    walk = Walk(seed, max_staleness)
    for _ in range(1500):
        walk.step()
        assert walk.ledger.state.balance().holds
    assert walk.ledger.state.balance().issued > 20


@pytest.mark.parametrize("seed", range(8))
def test_a_restart_changes_nothing(seed: int) -> None:
    walk = Walk(seed, max_staleness=1)
    for _ in range(60):
        for _ in range(20):
            walk.step()
        assert facts(replayed(walk.log, walk.tasks)) == facts(walk.state)


def test_a_trainer_that_starts_again_gets_the_same_batches() -> None:
    ledger = make_ledger(group_size=2)
    publish(ledger, 0)
    for lease in ledger.lease("a", 100):
        deliver(ledger, lease, lease.sample.key.sample_index)
    close_next(ledger)
    close_next(ledger)
    before = {step: [item.key for item in b.items] for step, b in ledger.state.batches.items()}
    digests = list(ledger.state.ledger_digests)
    ledger.complete(0)
    assert ledger.state.balance().states[State.TRAINED] == 4
    assert ledger.start_training(0, b"") == 2
    assert ledger.state.balance().states[State.TRAINED] == 0
    assert {s: [item.key for item in b.items] for s, b in ledger.state.batches.items()} == before
    ledger.complete(0)
    ledger.record_checkpoint(1, 1, b"")
    assert list(ledger.state.batches) == [1]
    for step, digest, reason in (
        (0, b"", "STEP_OUT_OF_ORDER"),
        (3, b"", "STEP_OUT_OF_ORDER"),
        (1, digests[2], "LEDGER_MISMATCH"),
    ):
        with pytest.raises(RefusedError, match=reason):
            ledger.start_training(step, digest)
    assert ledger.start_training(1, digests[1]) == 3
    with pytest.raises(RefusedError, match="OLD_EPOCH"):
        ledger.require_trainer(2)
    # A checkpoint of a step whose completion was never told: it learned from the same batches.
    assert ledger.start_training(2, digests[2]) == 4
    assert ledger.state.balance().states[State.TRAINED] == 8


def test_old_versions_count_by_their_steps_after_a_restart() -> None:
    """A trainer goes back from step 2 to step 0: tokens of the old version 3 are as fresh as ever,
    those of the new version 4, whose weights are of step 0, are too old."""
    ledger = make_ledger(group_size=2, max_staleness=1)
    for step in range(2):
        publish(ledger, step)
        for lease in ledger.lease("a", 4):
            deliver(ledger, lease, lease.sample.key.sample_index, step + 1)
        assert close_next(ledger) == 4
        ledger.complete(step)
    publish(ledger, 2)
    leases = ledger.lease("a", 100)
    ledger.start_training(0, b"")
    publish(ledger, 0)
    assert not ledger.can_lease
    deliver(ledger, leases[0], version=3)
    deliver(ledger, leases[1], version=4)
    assert ledger.state.balance().states[State.STORED] == 0  # the group lost its second sample
    assert ledger.state.balance().dropped == {"stale": 1, "short_group": 1}
    deliver(ledger, leases[2], version=3)
    assert ledger.state.balance().states[State.STORED] == 1
    ledger.complete(0)
    publish(ledger, 1)
    ledger.expire(100.0)
    assert {ledger.min_version(lease) for lease in ledger.lease("a", 100)} == {5}


def test_a_run_ends_with_every_key_trained_or_dropped() -> None:
    ledger = make_ledger(group_size=2)
    for step in range(STEPS):
        publish(ledger, step)
        for lease in ledger.lease("a", 100):
            reward, version = lease.sample.key.sample_index, ledger.min_version(lease)
            assert deliver(ledger, lease, reward, version)
        assert close_next(ledger) == 4
        ledger.complete(step)
    balance = ledger.state.balance()
    assert ledger.exhausted
    assert not ledger.can_lease
    assert balance.states[State.TRAINED] == balance.issued == STEPS * 4


def test_admission_follows_its_formula() -> None:
    tasks = TasksConfig(groups_per_batch=4, max_staleness=2)
    admission = Admission(tasks=tasks, steps=100)
    assert admission.batch_limit == 0
    admission = admission.advanced(1, 0)
    assert admission.batch_limit == 3
    assert [admission.min_version(batch) for batch in range(3)] == [1, 1, 1]
    admission = admission.advanced(8, 7)
    assert admission.batch_limit == 10
    assert [admission.min_version(batch) for batch in (7, 8, 9)] == [6, 7, 8]
    assert admission.staleness(9, 7) == 2
    assert admission.admits(9)
    assert not admission.admits(10)
    assert replace(admission, version=9, step=0, first_version=9).min_version(1) == 9
    assert admission.advanced(100, 99).batch_limit == 100


def test_no_staleness_means_one_batch_at_a_time() -> None:
    ledger = make_ledger(max_staleness=0, group_size=2)
    publish(ledger, 0)
    leases = ledger.lease("a", 100)
    assert len(leases) == 4
    for lease in leases:
        deliver(ledger, lease, lease.sample.key.sample_index)
    assert close_next(ledger) == 4
    assert not ledger.can_lease
    publish(ledger, 1)
    assert {ledger.min_version(lease) for lease in ledger.lease("a", 100)} == {2}


def test_nothing_is_leased_before_the_first_version() -> None:
    assert make_ledger().lease("a", 10) == []


def test_nothing_is_leased_from_a_trainer_s_start_to_its_first_version() -> None:
    """It may have fewer steps behind it than what is leased would need."""
    ledger = make_ledger(max_staleness=0, group_size=2)
    publish(ledger, 0)
    (lease, *_) = ledger.lease("a", 1)
    ledger.start_training(0, b"")
    ledger.expire(now=15.0)
    assert ledger.lease("a", 10) == []
    publish(ledger, 0)
    again = ledger.lease("a", 10)
    assert again[0].sample is lease.sample
    assert {ledger.min_version(lease) for lease in again} == {2}


def test_an_expired_lease_goes_to_somebody_else_and_the_first_result_counts() -> None:
    ledger = make_ledger()
    publish(ledger, 0)
    (first,) = ledger.lease("a", 1)
    leases = ledger.state.leases
    assert leases.renew("a", [first.lease_id], now=5.0) == []
    assert ledger.expire(now=14.0) == 0
    assert ledger.expire(now=15.0) == 1
    (second,) = ledger.lease("b", 1)
    assert second.sample is first.sample
    assert second.lease_id != first.lease_id
    assert leases.renew("a", [first.lease_id], now=16.0) == [first.lease_id]
    assert deliver(ledger, first)
    assert not deliver(ledger, second)
    assert ledger.expire(now=100.0) == 0


def test_a_result_for_a_sample_that_waits_again_is_taken() -> None:
    ledger = make_ledger()
    publish(ledger, 0)
    (lease,) = ledger.lease("a", 1)
    ledger.expire(now=11.0)
    assert deliver(ledger, lease)
    others = ledger.lease("b", 100)
    assert lease.sample.key not in {other.sample.key for other in others}


def test_failures_are_played_again_and_then_dropped() -> None:
    ledger = make_ledger(max_attempts=3)
    publish(ledger, 0)
    for _ in range(3):
        (lease,) = ledger.lease("a", 1)
        assert lease.sample.key == TaskKey(0, 0)
        ledger.fail(lease.sample.key, lease.lease_id, "failed")
    assert ledger.state.balance().dropped == {"failed": 1}
    assert ledger.lease("a", 1)[0].sample.key == TaskKey(0, 1)


def test_a_late_failure_changes_nothing() -> None:
    ledger = make_ledger()
    publish(ledger, 0)
    (old,) = ledger.lease("a", 1)
    ledger.expire(11.0)
    (new,) = ledger.lease("b", 1)
    ledger.fail(old.sample.key, old.lease_id, "failed")
    assert new.sample.num_failures == 0
    assert new.sample.state is State.LEASED


def test_a_group_that_lost_too_many_samples_is_dropped_and_replaced() -> None:
    ledger = make_ledger(max_attempts=1, max_staleness=0)
    publish(ledger, 0)
    leases = ledger.lease("a", 100)
    assert len(leases) == 6
    deliver(ledger, leases[0])
    ledger.fail(leases[1].sample.key, leases[1].lease_id, "failed")
    assert not ledger.can_lease
    ledger.fail(leases[2].sample.key, leases[2].lease_id, "failed")
    assert ledger.state.balance().dropped == {"failed": 2, "short_group": 1}
    assert {lease.sample.key.ordinal for lease in ledger.lease("a", 100)} == {2}


def test_a_trajectory_that_is_too_old_is_dropped_on_arrival_and_its_group_replaced() -> None:
    ledger = make_ledger(max_staleness=1, group_size=2)
    for step in range(2):
        publish(ledger, step)
        for lease in ledger.lease("a", 4):
            deliver(ledger, lease, lease.sample.key.sample_index, step + 1)
        close_next(ledger)
        ledger.complete(step)
    publish(ledger, 2)
    leases = ledger.lease("a", 100)
    assert len(leases) == 8
    assert not ledger.can_lease
    assert deliver(ledger, leases[0], version=2)  # one step behind: still good
    assert deliver(ledger, leases[1], version=1)
    assert ledger.state.balance().dropped == {"stale": 1, "short_group": 1}
    assert len(ledger.lease("a", 100)) == 2


@pytest.mark.parametrize("max_resample", [1, 2, 4])
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_no_trained_token_is_too_old_in_an_asynchronous_run(
    max_staleness: int, max_resample: int
) -> None:
    """Actors of very different speed, replicas that lag, a trainer that prefetches its batch."""
    rng = random.Random(max_staleness)
    ledger = make_ledger(
        max_staleness=max_staleness, max_resample=max_resample, lease_seconds=1000.0
    )
    publish(ledger, 0)
    running: list[tuple[float, int, Lease]] = []  # end, version it was begun with
    closed: list[list[int]] = []
    for now in range(4000):
        head = ledger.state.admission.version
        for lease in ledger.lease("a", rng.randint(0, 3)):
            begun = rng.randint(ledger.min_version(lease), head)
            assert begun <= head
            running.append((now + rng.choice((1, 2, 5, 40)), begun, lease))
        for item in [item for item in running if item[0] <= now]:
            running.remove(item)
            deliver(ledger, item[2], float(rng.randint(0, 1)), item[1])
        if len(closed) <= ledger.state.num_completed + 1 and (groups := ledger.ready_groups()):
            stored = [sample for group in groups for sample in group.in_state(State.STORED)]
            closed.append([sample.summary.oldest_version for sample in stored])
            close_next(ledger)
        if ledger.state.num_completed < len(closed) and rng.random() < 0.2:
            step = ledger.state.num_completed
            trained_version = ledger.state.admission.version
            assert trained_version == step + 1
            assert all(trained_version - v <= max_staleness for v in closed[step])
            ledger.complete(step)
            publish(ledger, step + 1)
        assert ledger.state.balance().holds
    assert ledger.state.num_completed == STEPS


def test_an_old_trainer_issues_no_version() -> None:
    ledger = make_ledger()
    publish(ledger, 0)
    ledger.start_training(0, b"")
    with pytest.raises(RefusedError, match="OLD_EPOCH"):
        ledger.publish(1, 1)
    assert ledger.state.steps_behind == [0]


def test_groups_keep_the_size_of_their_issue() -> None:
    """A run is taken up with smaller groups: samples of older groups are taken all the same."""
    log = Entries()
    ledger = make_ledger(log, group_size=4)
    publish(ledger, 0)
    leases = ledger.lease("a", 8)
    smaller = Ledger(log, replayed(log, make_tasks(group_size=2)))
    assert all(smaller.knows(lease.sample.key) for lease in leases)
    assert not smaller.knows(TaskKey(0, 4))
    for lease in leases:
        assert deliver(smaller, lease, lease.sample.key.sample_index)
    assert close_next(smaller) == 8


def test_a_run_that_has_ended_ends_again_only_for_its_own_trainer() -> None:
    log = Entries()
    ledger = make_ledger(log, group_size=2)
    publish(ledger, 0)
    for lease in ledger.lease("a", 100):
        deliver(ledger, lease, lease.sample.key.sample_index)
    ledger.end_with(0)
    close_next(ledger)
    assert ledger.exhausted
    again = Ledger(log, replayed(log, ledger.tasks))
    assert again.exhausted  # the intake alone started anew: the step is being trained
    again.complete(0)
    again.start_training(1, again.state.ledger_digests[1])
    assert not again.exhausted  # the run was taken up


def test_what_a_held_batch_lists_keeps_its_segment() -> None:
    """Also where all rewards are equal: the journal of samples reads uniform groups, too."""
    ledger = make_ledger(group_size=2)
    publish(ledger, 0)
    for lease in ledger.lease("a", 100):
        deliver(ledger, lease)
    close_next(ledger)
    needed = min(item.location.segment for item in ledger.state.batches[0].episodes)
    assert ledger.state.oldest_segment() == needed
