"""The simulation of fan-out gives what its closed formula says, and what one works out by hand."""

from dataclasses import replace

import pytest

from benchmarks.fanout import (
    STORE,
    Case,
    Costs,
    SharedLink,
    best_tree,
    parents_of,
    publish_seconds,
    simulate_spread,
    spread_formula,
)

ROUND = Costs(
    ratio=100, encode=1000, copy=1000, apply=1000, place=1000, verify=1000, load=1000, send=1e6,
    receive=1e6,
    latency=0.5,
)  # fmt: skip
FREE = replace(ROUND, copy=1e9, apply=1e9, place=1e9, verify=1e9, latency=0.0)
CASE = Case(
    num_bytes=1e9, ranks=2, gbit_per_s=8.0, replicas=8, payload="full", fan_out=0
)  # 1 GB at 1 GB/s


@pytest.mark.parametrize("payload", ["delta", "full"])
@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 8, 9, 64, 65, 1000])
@pytest.mark.parametrize("fan_out", [0, 1, 2, 3, 8, 64])
@pytest.mark.parametrize("gbit", [0.01, 8.0, 100.0])
@pytest.mark.parametrize("costs", [Costs(), ROUND, FREE], ids=["measured", "round", "free"])
def test_the_simulation_agrees_with_the_formula(
    payload: str, replicas: int, fan_out: int, gbit: float, costs: Costs
) -> None:
    case = Case(
        num_bytes=14e9,
        ranks=8,
        gbit_per_s=gbit,
        replicas=replicas,
        payload=payload,
        fan_out=fan_out,
    )
    assert simulate_spread(case, costs) == pytest.approx(spread_formula(case, costs), rel=1e-6)


def test_flat_copies_leave_a_store_one_after_another() -> None:
    assert simulate_spread(CASE, FREE) == pytest.approx(8.0, rel=1e-3)
    # 0.5 s of latency, 8 s on the link, 1 s to verify.
    assert simulate_spread(CASE, ROUND) == pytest.approx(9.5)


def test_a_tree_pays_for_each_level_and_not_for_each_replica() -> None:
    # 2 + 4 + 2 replicas: two levels of two children, then one child each.
    assert simulate_spread(replace(CASE, fan_out=2), FREE) == pytest.approx(5.0, rel=1e-3)


def test_work_while_bytes_come_costs_time_only_where_it_is_slower() -> None:
    fast = replace(CASE, replicas=1)
    slow_cores = replace(ROUND, place=250.0)
    assert simulate_spread(fast, ROUND) == pytest.approx(0.5 + 1 + 1)
    assert simulate_spread(fast, slow_cores) == pytest.approx(0.5 + 4 + 1)
    assert simulate_spread(fast, replace(slow_cores, cores=4)) == pytest.approx(0.5 + 1 + 0.25)


def test_a_delta_takes_a_share_of_the_link_and_the_same_verification() -> None:
    delta = replace(CASE, payload="delta", replicas=1)
    assert simulate_spread(delta, FREE) == pytest.approx(0.01, rel=0.01)
    assert simulate_spread(delta, ROUND) == pytest.approx(0.5 + 2 + 1)


def test_ranks_encode_side_by_side_and_share_the_way_to_the_store() -> None:
    full = publish_seconds(CASE, ROUND)
    assert full == pytest.approx(0.5 + 1 + 1 + 1)
    assert publish_seconds(replace(CASE, ranks=8), ROUND) == pytest.approx(full - 0.375)


def test_a_process_that_sends_slower_than_its_link_is_the_limit() -> None:
    slow = replace(FREE, send=500.0)
    assert simulate_spread(CASE, slow) == pytest.approx(16.0, rel=1e-3)
    one = replace(CASE, replicas=1)
    assert simulate_spread(one, replace(FREE, receive=250.0)) == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize(("replicas", "fan_out"), [(1, 2), (6, 2), (8, 2), (1000, 3), (1000, 64)])
def test_a_tree_is_even(replicas: int, fan_out: int) -> None:
    parents = parents_of(replicas, fan_out)
    assert len(parents) == replicas
    children = [parents.count(node) for node in range(replicas + 1)]
    assert max(children) <= fan_out
    assert all(parent < child for child, parent in enumerate(parents, 1))
    depth = {STORE: 0}
    for child, parent in enumerate(parents, 1):
        depth[child] = depth[parent] + 1
    for level in range(max(depth.values())):
        counts = [children[node] for node in depth if depth[node] == level]
        assert max(counts) - min(counts) <= 1


def test_the_best_tree_is_no_worse_than_any() -> None:
    for number in (2, 8, 64, 1000):
        case = replace(CASE, replicas=number)
        best = spread_formula(best_tree(case, ROUND), ROUND)
        assert all(best <= spread_formula(replace(case, fan_out=k), ROUND) for k in (2, 3, 8, 64))


def test_transfers_share_a_link_evenly() -> None:
    link = SharedLink(rate=10.0, limit=50.0)
    link.start(0.0, 1, 100.0)
    assert link.next_end() == 10.0
    link.start(5.0, 2, 20.0)
    assert link.next_end() == 9.0
    assert link.finish(9.0) == 2
    assert link.next_end() == 12.0
    assert link.finish(12.0) == 1
    assert link.next_end() is None


def test_a_transfer_is_no_faster_than_its_reader() -> None:
    link = SharedLink(rate=10.0, limit=4.0)
    link.start(0.0, 1, 40.0)
    assert link.next_end() == 10.0
    for child in (2, 3):
        link.start(5.0, child, 40.0)
    assert link.next_end() == pytest.approx(11.0)
