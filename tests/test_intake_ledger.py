"""The ledger alone: balance under any order of events, and admission by staleness."""

import random

import pytest

from learner.intake.admission import Admission
from learner.intake.batches import assemble
from learner.intake.leases import Lease
from learner.intake.ledger import Ledger
from learner.intake.store import Event, MemoryStore
from learner.intake.tasks import State, Summary, TaskKey
from understudy.config import TasksConfig

STEPS = 6


class RecordingStore(MemoryStore):
    """Keeps events too."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def append(self, event: Event) -> None:
        self.events.append(event)


def make_ledger(store: MemoryStore | None = None, **tasks: object) -> Ledger:
    shape = {"group_size": 3, "groups_per_batch": 2, "lease_seconds": 10.0, **tasks}
    return Ledger(TasksConfig.model_validate(shape), STEPS, store or MemoryStore())


def summary(reward: float = 0.0, version: int = 1) -> Summary:
    return Summary(
        task_id="t",
        level=1,
        reward=reward,
        oldest_version=version,
        num_tokens=10,
        num_sampled_tokens=5,
        num_turns=1,
        truncated=False,
    )


def close_next(ledger: Ledger) -> int:
    """Close the next batch if it is ready; returns how many trajectories it trains."""
    groups = ledger.ready_groups()
    if not groups:
        return 0
    batch = assemble(ledger.num_closed, groups, ledger.admission)
    assert all(item.staleness <= ledger.tasks.max_staleness for item in batch.items)
    ledger.assign(groups, batch.uniform)
    return len(batch.items)


class Walk:
    """Random events on one ledger."""

    def __init__(self, seed: int, max_staleness: int) -> None:
        self.random = random.Random(seed)
        self.store = RecordingStore()
        self.ledger = make_ledger(self.store, max_staleness=max_staleness, max_attempts=2)
        self.leases: list[Lease] = []
        self.now = 0.0
        self.publish()

    def publish(self) -> None:
        admission = self.ledger.admission
        step = min(admission.step + 1, self.ledger.num_completed) if admission.version else 0
        self.ledger.advance(admission.version + 1, step)

    def lease(self) -> None:
        self.leases += self.ledger.lease("a", self.random.randint(1, 4), self.now)

    def deliver(self) -> None:
        if self.leases:
            lease = self.random.choice(self.leases)  # not removed: it may come twice
            head = self.ledger.admission.version
            version = self.random.randint(max(head - 2, 1), head)
            reward = float(self.random.randint(0, 1))
            key = lease.sample.key
            self.ledger.deliver(key, summary(reward, version), b"x" * key.sample_index)

    def fail(self) -> None:
        if self.leases:
            lease = self.random.choice(self.leases)
            self.ledger.fail(lease.sample.key, lease.lease_id, "failed")

    def pass_time(self) -> None:
        self.now += self.random.uniform(0, 8)
        self.ledger.expire(self.now)

    def close(self) -> None:
        close_next(self.ledger)

    def complete(self) -> None:
        if self.ledger.num_completed < self.ledger.num_closed:
            self.ledger.complete(self.ledger.num_completed)

    def step(self) -> None:
        moves = (self.lease, self.deliver, self.deliver, self.deliver, self.close)
        rare = (self.fail, self.pass_time, self.complete, self.publish)
        self.random.choice(moves if self.random.random() < 0.8 else rare)()


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_balance_holds_at_every_moment(seed: int, max_staleness: int) -> None:
    walk = Walk(seed, max_staleness)
    for _ in range(1500):
        walk.step()
        assert walk.ledger.balance().holds
    assert walk.ledger.balance().issued > 20


@pytest.mark.parametrize("seed", range(4))
def test_events_tell_the_same_story_as_the_states(seed: int) -> None:
    walk = Walk(seed, 1)
    for _ in range(1500):
        walk.step()
    last = {event.key: event.state for event in walk.store.events}
    balance = walk.ledger.balance()
    assert balance.issued == len(last)
    for state in State:
        assert balance.states[state] == sum(value is state for value in last.values())


def test_a_run_ends_with_every_key_trained_or_dropped() -> None:
    ledger = make_ledger(group_size=2)
    for step in range(STEPS):
        ledger.advance(step + 1, step)
        for lease in ledger.lease("a", 100, 0.0):
            key = lease.sample.key
            assert ledger.deliver(key, summary(key.sample_index, lease.min_version), b"x")
        assert close_next(ledger) == 4
        ledger.complete(step)
    balance = ledger.balance()
    assert ledger.exhausted
    assert not ledger.can_lease
    assert balance.states[State.TRAINED] == balance.issued == STEPS * 4
    assert ledger.store.num_bytes == 0


def test_admission_follows_its_formula() -> None:
    tasks = TasksConfig(groups_per_batch=4, max_staleness=2)
    admission = Admission(tasks=tasks, steps=100)
    assert admission.group_limit == 0
    admission = admission.advanced(1, 0)
    assert admission.group_limit == 12
    assert [admission.min_version(batch) for batch in range(3)] == [1, 1, 1]
    admission = admission.advanced(8, 7)
    assert admission.group_limit == 40
    assert [admission.min_version(batch) for batch in (7, 8, 9)] == [6, 7, 8]
    assert admission.staleness(9, 8) == 2
    assert admission.advanced(100, 99).group_limit == 400


def test_no_staleness_means_one_batch_at_a_time() -> None:
    ledger = make_ledger(max_staleness=0, group_size=2)
    ledger.advance(1, 0)
    leases = ledger.lease("a", 100, 0.0)
    assert len(leases) == 4
    for lease in leases:
        ledger.deliver(lease.sample.key, summary(lease.sample.key.sample_index), b"x")
    assert close_next(ledger) == 4
    assert not ledger.can_lease
    ledger.advance(2, 1)
    assert {lease.min_version for lease in ledger.lease("a", 100, 0.0)} == {2}


def test_nothing_is_leased_before_the_first_version() -> None:
    assert make_ledger().lease("a", 10, 0.0) == []


def test_an_expired_lease_goes_to_somebody_else_and_the_first_result_counts() -> None:
    ledger = make_ledger()
    ledger.advance(1, 0)
    (first,) = ledger.lease("a", 1, now=0.0)
    assert ledger.leases.renew("a", [first.lease_id], now=5.0) == []
    assert ledger.expire(now=14.0) == 0
    assert ledger.expire(now=15.0) == 1
    (second,) = ledger.lease("b", 1, now=16.0)
    assert second.sample is first.sample
    assert second.lease_id != first.lease_id
    assert ledger.leases.renew("a", [first.lease_id], now=16.0) == [first.lease_id]
    key = first.sample.key
    assert ledger.deliver(key, summary(), b"late")
    assert not ledger.deliver(key, summary(), b"again")
    assert ledger.expire(now=100.0) == 0


def test_a_result_for_a_sample_that_waits_again_is_taken() -> None:
    ledger = make_ledger()
    ledger.advance(1, 0)
    (lease,) = ledger.lease("a", 1, now=0.0)
    ledger.expire(now=11.0)
    assert ledger.deliver(lease.sample.key, summary(), b"late")
    others = ledger.lease("b", 100, now=12.0)
    assert lease.sample.key not in {other.sample.key for other in others}


def test_failures_are_played_again_and_then_dropped() -> None:
    ledger = make_ledger(max_attempts=3)
    ledger.advance(1, 0)
    for _ in range(3):
        (lease,) = ledger.lease("a", 1, 0.0)
        assert lease.sample.key == TaskKey(0, 0)
        ledger.fail(lease.sample.key, lease.lease_id, "failed")
    assert ledger.balance().dropped == {"failed": 1}
    assert ledger.lease("a", 1, 0.0)[0].sample.key == TaskKey(0, 1)


def test_a_late_failure_changes_nothing() -> None:
    ledger = make_ledger()
    ledger.advance(1, 0)
    (old,) = ledger.lease("a", 1, 0.0)
    ledger.expire(11.0)
    (new,) = ledger.lease("b", 1, 12.0)
    ledger.fail(old.sample.key, old.lease_id, "failed")
    assert new.sample.num_failures == 0
    assert new.sample.state is State.LEASED


def test_a_group_that_lost_too_many_samples_is_dropped_and_replaced() -> None:
    ledger = make_ledger(max_attempts=1, max_staleness=0)
    ledger.advance(1, 0)
    leases = ledger.lease("a", 100, 0.0)
    assert len(leases) == 6
    ledger.deliver(leases[0].sample.key, summary(), b"x")
    ledger.fail(leases[1].sample.key, leases[1].lease_id, "failed")
    assert not ledger.can_lease
    ledger.fail(leases[2].sample.key, leases[2].lease_id, "failed")
    assert ledger.balance().dropped == {"failed": 2, "short_group": 1}
    assert ledger.store.num_bytes == 0
    assert {lease.sample.key.ordinal for lease in ledger.lease("a", 100, 0.0)} == {2}


def test_stale_groups_are_dropped_and_replaced() -> None:
    ledger = make_ledger(max_staleness=1, group_size=2)
    ledger.advance(1, 0)
    leases = ledger.lease("a", 100, 0.0)
    for lease in leases:
        ledger.deliver(lease.sample.key, summary(lease.sample.key.sample_index), b"x")
    close_next(ledger)
    ledger.advance(2, 1)
    assert not ledger.balance().dropped  # two groups of version 1 are 1 behind: still good
    ledger.advance(3, 1)  # a restarted trainer published again
    assert ledger.balance().dropped == {"stale": 4}
    assert len(ledger.lease("a", 100, 0.0)) == 8


def test_a_trajectory_that_comes_too_late_is_dropped_on_arrival() -> None:
    ledger = make_ledger(max_staleness=0, group_size=2)
    ledger.advance(1, 0)
    (lease, *_) = ledger.lease("a", 4, 0.0)
    ledger.advance(2, 0)
    assert ledger.deliver(lease.sample.key, summary(version=1), b"x")
    assert ledger.balance().dropped["stale"] == 1


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_no_trained_token_is_too_old_in_an_asynchronous_run(max_staleness: int) -> None:
    """Actors of very different speed, replicas that lag, a trainer that prefetches its batch."""
    rng = random.Random(max_staleness)
    ledger = make_ledger(max_staleness=max_staleness, lease_seconds=1000.0)
    ledger.advance(1, 0)
    running: list[tuple[float, int, Lease]] = []  # end, version it was begun with
    closed: list[list[int]] = []
    for now in range(4000):
        head = ledger.admission.version
        for lease in ledger.lease("a", rng.randint(0, 3), now):
            begun = rng.randint(lease.min_version, head)
            assert begun <= head
            running.append((now + rng.choice((1, 2, 5, 40)), begun, lease))
        for item in [item for item in running if item[0] <= now]:
            running.remove(item)
            reward = float(rng.randint(0, 1))
            ledger.deliver(item[2].sample.key, summary(reward, item[1]), b"x")
        if len(closed) <= ledger.num_completed + 1 and (groups := ledger.ready_groups()):
            stored = [sample for group in groups for sample in group.in_state(State.STORED)]
            closed.append([sample.summary.oldest_version for sample in stored])
            close_next(ledger)
        if ledger.num_completed < len(closed) and rng.random() < 0.2:
            step = ledger.num_completed
            trained_version = ledger.admission.version
            assert trained_version == step + 1
            assert all(trained_version - v <= max_staleness for v in closed[step])
            ledger.complete(step)
            ledger.advance(step + 2, step + 1)
        assert ledger.balance().holds
    assert ledger.num_completed == STEPS
