"""Tasks that recur: which come again, decided by the log alone."""

from collections import Counter
from pathlib import Path

import pytest

from intake_rig import make_config, running
from learner.intake.curriculum import LEAST_CHANCE
from learner.intake.ledger import Ledger
from learner.intake.state import RunState
from test_intake_ledger import Clock, Entries, deliver, make_tasks, publish, replayed
from understudy.config import Config
from understudy.v1 import log_pb2

NUM_TASKS, STEPS = 10, 400
HALF, MASTERED = {3, 4}, {0, 1, 2}
"""Tasks of which half of the episodes succeed, and of which all do; of the others none does."""


def run(log: Entries, steps: int, **tasks: object) -> Ledger:
    """Play so many batches of two groups of two, in order."""
    shape = make_tasks(
        **{
            **{"group_size": 2, "num_tasks": NUM_TASKS, "first_ordinal": 100, "max_staleness": 0},
            **tasks,
        }
    )
    ledger = Ledger(log, RunState(shape, steps, Clock()))
    ledger.start_training(0, b"")
    publish(ledger, 0)
    for step in range(steps):
        for lease in ledger.lease("a", 100):
            key = lease.sample.key
            task = ledger.task(key).ordinal - 100
            reward = float(task in MASTERED or (task in HALF and key.sample_index == 0))
            deliver(ledger, lease, reward, step + 1)
        ledger.assign(ledger.ready_groups())
        ledger.complete(step)
        publish(ledger, step + 1)
    return ledger


def tasks_of(log: Entries) -> list[int]:
    events = map(log_pb2.LogEntry.FromString, log.all)
    return [e.group_issued.task_ordinal - 100 for e in events if e.HasField("group_issued")]


def test_tasks_come_in_order_unless_told_otherwise() -> None:
    log = Entries()
    ledger = run(log, 20)
    assert tasks_of(log) == [index % NUM_TASKS for index in range(40)]
    assert ledger.state.curriculum.rates == {}


def test_tasks_near_one_half_come_in_every_round_and_others_now_and_then() -> None:
    log = Entries()
    ledger = run(log, STEPS, task_order="success_rate")
    issued = tasks_of(log)
    assert issued[:NUM_TASKS] == list(range(NUM_TASKS))  # each is played once first
    assert ledger.state.curriculum.rates[103] == 0.5
    counts = Counter(issued[NUM_TASKS:])
    rounds = counts[3]
    assert abs(counts[4] - rounds) <= 1
    for task in set(range(NUM_TASKS)) - HALF:
        assert 0.3 * LEAST_CHANCE < counts[task] / rounds < 2.5 * LEAST_CHANCE


def test_the_log_alone_decides() -> None:
    first, second = Entries(), Entries()
    ledger = run(first, 60, task_order="success_rate")
    run(second, 60, task_order="success_rate")
    assert tasks_of(first) == tasks_of(second)
    again = replayed(first, ledger.tasks)
    assert vars(again.curriculum) == vars(ledger.state.curriculum)
    ordinals = range(120, 140)
    assert list(map(again.curriculum.choose, ordinals)) == list(
        map(ledger.state.curriculum.choose, ordinals)
    )


def test_there_is_always_a_task_though_none_is_worth_it() -> None:
    ledger = run(Entries(), 30, task_order="success_rate", first_ordinal=105, num_tasks=2)
    assert ledger.state.num_closed == 30


async def test_what_is_leased_keeps_its_task_where_others_are_configured(tmp_path: Path) -> None:
    async with running(make_config(tmp_path, lease_seconds=0.3)) as rig:
        before = await rig.lease(2)
    async with running(make_config(tmp_path, lease_seconds=0.3, first_ordinal=50)) as rig:
        await rig.play(before)
        assert rig.intake.balance().figures()["stored"] == 2
        later = await rig.lease(1)
        assert later[0].task.task_ordinal == 51


@pytest.mark.parametrize("fields", [{"task_order": "success_rate"}, {"max_resample": 2}])
def test_a_deterministic_run_decides_nothing_by_the_clock(fields: dict[str, object]) -> None:
    values = {
        "model": {"path": "m", "dtype": "float32"},
        "run": {"deterministic": True},
        "inference": {"threads": 1},
        "learner": {"tasks": {"max_staleness": 1, **fields}},
    }
    with pytest.raises(ValueError, match="set max_staleness = 0"):
        Config.model_validate(values)
    values["learner"]["tasks"]["max_staleness"] = 0  # type: ignore[index]
    Config.model_validate(values)
