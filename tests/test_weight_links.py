"""A link set keeps what is worth keeping and finds the chain with the fewest bytes."""

from itertools import pairwise

import pytest

from understudy.v1 import weight_pb2
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.links import (
    CHUNK_BYTES,
    Link,
    LinkSet,
    MemoryPayload,
    fetch_responses,
)

FULL_BYTES = 1000


def link(base: int, version: int, num_bytes: int) -> Link:
    """A link whose bytes say where it leads."""
    manifest = weight_pb2.WeightManifest(
        version=version, base_version=base, payload_bytes=num_bytes
    )
    return Link(manifest=manifest, payload=MemoryPayload(bytes([version]) * num_bytes))


def full(version: int, num_bytes: int = FULL_BYTES) -> Link:
    """A full copy."""
    return link(0, version, num_bytes)


def delta(version: int, num_bytes: int = 100) -> Link:
    """What leads to a version from the one before."""
    return link(version - 1, version, num_bytes)


def link_set(*links: Link, max_deltas: int = 32) -> LinkSet:
    """A link set that took these links in turn."""
    made = LinkSet(max_deltas)
    for each in links:
        made.add(each)
    return made


def spans(links: "tuple[Link, ...] | list[Link]") -> list[tuple[int, int]]:
    """Where links start and lead to."""
    return [(each.base_version, each.version) for each in links]


def refusal(made: LinkSet, base: int, target: int = 0) -> str:
    """Why there is no plan."""
    with pytest.raises(WeightsRefusedError) as refused:
        made.plan(base, target)
    return refused.value.reason


# What is held


def test_an_empty_link_set_has_nothing() -> None:
    made = link_set()
    assert (made.newest, made.newest_version, made.full, made.deltas) == (None, 0, None, ())
    assert refusal(made, 0) == refusal(made, 3) == refusal(made, 0, 3) == "UNKNOWN_VERSION"


def test_the_newest_is_what_was_added_last() -> None:
    made = link_set(full(1))
    for version in (2, 3):
        made.add(delta(version))
        assert made.newest_version == version
    made.add(full(3))
    assert made.newest_version == 3
    made.add(full(4))
    assert made.newest is made.full
    assert made.newest_version == 4


def test_too_many_deltas_go_oldest_first() -> None:
    made = link_set(full(1), *[delta(v, 1) for v in range(2, 6)], full(5), max_deltas=4)
    assert [each.version for each in made.add(delta(6, 1))] == [2]
    assert spans(list(made.deltas)) == [(2, 3), (3, 4), (4, 5), (5, 6)]


def test_deltas_with_more_bytes_than_a_full_copy_go() -> None:
    made = link_set(full(1), *[delta(v, 400) for v in range(2, 5)])
    assert len(made.deltas) == 3, "a chain to the newest version stays, whatever its size"
    assert made.chain_bytes == 1200
    assert made.chain_length == 3
    assert spans(made.add(full(4))) == [(0, 1), (1, 2)]
    assert (made.chain_bytes, made.chain_length) == (0, 0)


def test_deltas_from_the_full_copy_on_are_never_let_go() -> None:
    made = link_set(full(1), *[delta(v, 900) for v in range(2, 20)], max_deltas=2)
    assert len(made.deltas) == 18
    assert made.chain_length == 18
    assert spans(made.plan(18)) == [(18, 19)]


def test_numbers_need_not_follow_each_other() -> None:
    made = link_set(full(3), link(3, 7, 10), link(7, 8, 10))
    assert spans(made.plan(3)) == [(3, 7), (7, 8)]
    assert spans(made.plan(5)) == [(0, 3), (3, 7), (7, 8)]


def test_a_delta_from_anything_but_the_newest_is_a_mistake() -> None:
    made = link_set(full(1), delta(2))
    with pytest.raises(AssertionError):
        made.add(link(1, 3, 10))


def test_deltas_before_a_full_copy_that_none_leads_to_are_let_go() -> None:
    made = link_set(full(1), delta(2), delta(3), full(7))
    assert made.newest_version == 7
    assert spans(made.add(delta(8))) == [(1, 2), (2, 3)]
    assert spans(made.plan(7)) == [(7, 8)]
    assert spans(made.plan(3)) == [(0, 7), (7, 8)]
    assert spans(made.plan(0)) == [(0, 7), (7, 8)]


# Plans


def test_nobody_is_sent_what_he_holds() -> None:
    made = link_set(full(1), delta(2))
    assert made.plan(2) == made.plan(2, 2) == made.plan(1, 1) == ()


def test_a_replica_one_behind_gets_one_delta() -> None:
    made = link_set(full(1), *[delta(v) for v in range(2, 8)])
    assert spans(made.plan(6)) == [(6, 7)]


def test_a_laggard_gets_deltas_as_long_as_they_are_fewer_bytes() -> None:
    made = link_set(full(1), *[delta(v) for v in range(2, 8)], full(7))
    assert spans(made.plan(4)) == [(4, 5), (5, 6), (6, 7)]
    small = link_set(full(1), *[delta(v, 30) for v in range(2, 8)], full(7, 100), max_deltas=9)
    assert spans(small.plan(6)) == [(6, 7)]
    assert spans(small.plan(4)) == [(4, 5), (5, 6), (6, 7)]
    assert spans(small.plan(3)) == [(0, 7)]


def test_one_without_weights_gets_the_full_copy_and_what_came_since() -> None:
    made = link_set(full(1), *[delta(v) for v in range(2, 5)])
    assert spans(made.plan(0)) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_a_version_that_is_not_held_any_more_gets_a_full_copy() -> None:
    made = link_set(full(1), *[delta(v) for v in range(2, 8)], full(7), max_deltas=2)
    assert spans(made.plan(2)) == [(0, 7)]
    assert spans(made.plan(99)) == [(0, 7)]


def test_an_older_target_is_reached_while_its_links_are_held() -> None:
    made = link_set(full(2), delta(3), delta(4))
    assert spans(made.plan(2, 3)) == [(2, 3)]
    assert spans(made.plan(0, 3)) == [(0, 2), (2, 3)]
    assert spans(made.plan(4, 3)) == [(0, 2), (2, 3)]
    assert spans(made.plan(4, 2)) == [(0, 2)]


@pytest.mark.parametrize(("base", "target"), [(0, 1), (2, 1), (4, 1), (0, 5), (2, 5), (0, 2**63)])
def test_a_target_that_nothing_leads_to_is_unknown(base: int, target: int) -> None:
    assert refusal(link_set(full(2), delta(3), delta(4)), base, target) == "UNKNOWN_VERSION"


# Resuming


def test_a_broken_transfer_goes_on_with_its_link_and_then_the_rest() -> None:
    made = link_set(full(1), *[delta(v) for v in range(2, 6)])
    assert spans(made.resume(2, 3, 0, 50)) == [(2, 3), (3, 4), (4, 5)]
    assert spans(made.resume(2, 3, 4, 100)) == [(2, 3), (3, 4)]
    assert spans(made.resume(2, 3, 3, 0)) == [(2, 3)]
    assert spans(made.resume(0, 1, 3, 999)) == [(0, 1), (1, 2), (2, 3)]


def test_a_resumed_chain_starts_over_nowhere() -> None:
    made = link_set(full(1), delta(2, 90), delta(3, 900), delta(4, 900), full(4, 1000))
    made.add(delta(5, 10))
    held = spans(list(made.deltas))
    for base, version in held:
        chain = spans(made.resume(base, version, 0, 0))
        assert chain[0] == (base, version)
        assert all(a[1] == b[0] for a, b in pairwise(chain)), chain


@pytest.mark.parametrize(("base", "version"), [(0, 1), (0, 5), (1, 2), (2, 4), (5, 6), (3, 3)])
def test_a_link_that_is_not_held_is_not_resumed(base: int, version: int) -> None:
    made = link_set(full(2), delta(3), delta(4))
    with pytest.raises(WeightsRefusedError) as refused:
        made.resume(base, version, 0, 0)
    assert refused.value.reason == "UNKNOWN_VERSION"


def test_a_link_whose_rest_is_gone_is_not_resumed() -> None:
    made = link_set(full(1), delta(2), full(9))
    with pytest.raises(WeightsRefusedError) as refused:
        made.resume(1, 2, 0, 10)
    assert refused.value.reason == "UNKNOWN_VERSION"


def test_nothing_is_resumed_behind_the_end() -> None:
    made = link_set(full(1), delta(2))
    assert spans(made.resume(1, 2, 0, 100)) == [(1, 2)]
    with pytest.raises(WeightsRefusedError) as refused:
        made.resume(1, 2, 0, 101)
    assert refused.value.reason == "BAD_REQUEST"


# What is sent


async def sent(made: LinkSet, **request: int) -> tuple[list[str], bytes]:
    """The messages' kinds, and all chunks in one."""
    counted: list[int] = []
    kinds, chunks = [], bytearray()
    fetch = weight_pb2.FetchWeightsRequest(**request)
    async for response in fetch_responses(made, fetch, lambda _, number: counted.append(number)):
        kinds.append(response.WhichOneof("response"))
        assert len(response.chunk) <= CHUNK_BYTES
        chunks += response.chunk
    assert sum(counted) == len(chunks)
    return kinds, bytes(chunks)


async def test_every_link_is_sent_with_its_manifest() -> None:
    made = link_set(full(1, 10), delta(2, 3), delta(3, 4))
    kinds, data = await sent(made)
    assert kinds == ["manifest", "chunk"] * 3
    assert data == b"\1" * 10 + b"\2" * 3 + b"\3" * 4


async def test_a_link_without_bytes_is_a_manifest_alone() -> None:
    assert await sent(link_set(full(1), delta(2, 0)), base_version=1) == (["manifest"], b"")


async def test_large_payloads_are_cut() -> None:
    kinds, data = await sent(link_set(full(1, 2 * CHUNK_BYTES + 1)))
    assert kinds == ["manifest", *["chunk"] * 3]
    assert len(data) == 2 * CHUNK_BYTES + 1


async def test_an_offset_counts_in_the_link_to_resume_alone() -> None:
    made = link_set(full(1, 10), delta(2, 3), delta(3, 4))
    _, data = await sent(made, base_version=1, resume_version=2, offset=2)
    assert data == b"\2" + b"\3" * 4


async def test_an_offset_without_a_link_is_refused() -> None:
    with pytest.raises(WeightsRefusedError) as refused:
        await sent(link_set(full(1)), offset=1)
    assert refused.value.reason == "BAD_REQUEST"


async def test_a_link_that_is_let_go_while_it_is_sent_is_sent_to_its_end() -> None:
    made = link_set(full(1, 3 * CHUNK_BYTES))
    request = weight_pb2.FetchWeightsRequest()
    chunks = bytearray()
    async for response in fetch_responses(made, request, lambda _, number: None):
        chunks += response.chunk
        if made.newest_version == 1:
            made.add(full(2))
    assert bytes(chunks) == b"\1" * (3 * CHUNK_BYTES)
