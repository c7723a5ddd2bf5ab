"""Versions from a weight store: what is taken, what is refused, and what survives."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY

from inference.engine import WeightLoadError
from inference.probe import decode_probe
from inference.scripted import ScriptedEngine
from inference.subscriber import WeightSubscriber
from inference.weights import Shadow
from inference_helpers import (
    Response,
    Tamper,
    WeightStore,
    nudge,
    pack,
    upstream_of,
    write_word_bundle,
)
from understudy.config import InferenceConfig
from understudy.errors import PeerUnreachableError
from understudy.v1 import weight_pb2
from understudy.weights.encoding import SPARSE_STEPS, digest_of
from understudy.weights.errors import WeightsRefusedError

TENSORS = {
    "model.norm.weight": np.arange(64, dtype=np.float32),
    "lm_head.weight": np.arange(4096, dtype=np.float32).reshape(64, 64),
}
SECOND, THIRD = nudge(TENSORS, 2), nudge(nudge(TENSORS, 2), 3)
FIRST_LINK = pack(TENSORS, 1)
SECOND_LINK = pack(SECOND, 2, base=(1, TENSORS))
THIRD_LINK = pack(THIRD, 3, base=(2, SECOND))


class Replica:
    """A subscriber with a scripted engine."""

    def __init__(
        self, store: WeightStore, engine: ScriptedEngine, subscriber: WeightSubscriber, address: str
    ) -> None:
        self.store = store
        self.engine = engine
        self.subscriber = subscriber
        self.address = address

    @property
    def served(self) -> dict[str, np.ndarray]:
        shadow = self.subscriber._served
        assert shadow is not None
        return {e.name: data.view("<f4").reshape(e.shape) for e, data in shadow}

    @property
    def shadows(self) -> list[Shadow]:
        return self.subscriber._fetcher._shadows._shadows

    @property
    def bases(self) -> list[int]:
        """Base that each fetch asked for."""
        return [request.base_version for request in self.store.requests]


@contextlib.asynccontextmanager
async def following(store: WeightStore, address: str) -> AsyncIterator[Replica]:
    engine = ScriptedEngine(InferenceConfig())
    await engine.start(store.bundle)
    async with upstream_of(address) as upstream:
        subscriber = WeightSubscriber(upstream, engine, "replica")
        task = asyncio.create_task(subscriber.run())
        yield Replica(store, engine, subscriber, address)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    store = WeightStore(write_word_bundle(tmp_path / "bundle"))
    async with following(store, await store.start()) as found:
        yield found
    await store.server.stop(0)


def refusals(reason: str) -> float:
    return REGISTRY.get_sample_value("understudy_weights_refused_total", {"reason": reason}) or 0.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.01)


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        np.testing.assert_array_equal(value.view("<u4"), expected[name].view("<u4"))


async def test_new_version_is_served_and_reported(replica: Replica) -> None:
    probe = weight_pb2.LogprobProbe(
        token_ids=np.array([2, 3, 4], "<i4").tobytes(),
        logprobs=np.array([-0.5, -0.75], "<f4").tobytes(),
    )
    await replica.store.announce(pack(TENSORS, 3, probe=probe))
    report = await replica.store.wait_for_report(3)
    assert replica.engine.version == 3
    assert (report.mismatch_mean, report.mismatch_max) == (0.125, 0.25)
    assert_equal(replica.served, TENSORS)


async def test_deltas_lead_from_version_to_version_bit_by_bit(replica: Replica) -> None:
    await replica.store.announce(FIRST_LINK)
    before = TENSORS
    for version in range(2, 8):
        await replica.store.wait_for_report(version - 1)
        assert_equal(replica.served, before)
        after = nudge(before, version)
        await replica.store.announce(pack(after, version, base=(version - 1, before)))
        before = after
    await replica.store.wait_for_report(7)
    assert_equal(replica.served, before)
    assert replica.bases == [0, 1, 2, 3, 4, 5, 6]
    assert len(replica.shadows) == 2


async def test_a_delta_without_changes_is_a_version(replica: Replica) -> None:
    await replica.store.announce(FIRST_LINK)
    await replica.store.wait_for_report(1)
    await replica.store.announce(pack(TENSORS, 2, base=(1, TENSORS)))
    await replica.store.wait_for_report(2)
    assert_equal(replica.served, TENSORS)


async def test_a_chain_of_deltas_comes_in_one_transfer(replica: Replica) -> None:
    await replica.store.announce(FIRST_LINK)
    await replica.store.wait_for_report(1)
    await replica.store.announce(SECOND_LINK, THIRD_LINK)
    await replica.store.wait_for_report(3)
    assert_equal(replica.served, THIRD)
    assert replica.bases == [0, 1]


async def test_late_replica_gets_the_full_copy_and_what_came_after_it(replica: Replica) -> None:
    await replica.store.announce(FIRST_LINK, SECOND_LINK)
    await replica.store.wait_for_report(2)
    async with following(replica.store, replica.address) as late:
        await replica.store.announce(THIRD_LINK)
        await until(lambda: late.engine.version == replica.engine.version == 3)
        assert_equal(late.served, THIRD)


async def test_broken_transfer_resumes_where_it_broke(replica: Replica) -> None:
    replica.store.break_at = (0, 8192)
    await replica.store.announce(FIRST_LINK)
    await replica.store.wait_for_report(1)
    assert [request.offset for request in replica.store.requests] == [0, 8192]
    assert_equal(replica.served, TENSORS)


@pytest.mark.parametrize(
    ("link", "offset"), [(0, 0), (0, 4096), (0, SECOND_LINK.num_bytes), (1, 0), (1, 4096)]
)
async def test_transfer_that_breaks_in_a_link_resumes_there(
    replica: Replica, link: int, offset: int
) -> None:
    await replica.store.announce(FIRST_LINK)
    await replica.store.wait_for_report(1)
    replica.store.break_at = (link, offset)
    await replica.store.announce(SECOND_LINK, THIRD_LINK)
    await replica.store.wait_for_report(3)
    assert_equal(replica.served, THIRD)
    again = replica.store.requests[2]
    assert (again.base_version, again.resume_version) == (link + 1, link + 2)
    assert again.offset == offset


async def test_versions_in_between_are_skipped(replica: Replica) -> None:
    for version in (1, 2, 9):
        await replica.store.announce(pack(TENSORS, version))
    await replica.store.wait_for_report(9)
    assert len(replica.store.reports) <= 2


async def test_store_that_restarts_is_found_again(replica: Replica) -> None:
    await replica.store.announce(FIRST_LINK)
    await replica.store.wait_for_report(1)
    await replica.store.server.stop(0)
    again = WeightStore(replica.store.bundle)
    assert await again.start(replica.address) == replica.address
    await again.announce(pack(SECOND, 2))
    await again.wait_for_report(2)
    await again.server.stop(0)


async def test_absent_store_before_first_weights_is_an_error(tmp_path: Path) -> None:
    engine = ScriptedEngine(InferenceConfig())
    async with upstream_of(f"unix:{tmp_path}/nobody", patience_seconds=0.3) as upstream:
        subscriber = WeightSubscriber(upstream, engine, "replica")
        with pytest.raises(PeerUnreachableError, match="no weights yet"):
            await subscriber.run()


async def test_what_the_engine_refuses_is_tried_again_without_a_transfer(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    await replica.store.announce(FIRST_LINK)
    await replica.store.wait_for_report(1)
    loaded: list[tuple[Shadow, int]] = []

    async def load(shadow: Shadow, version: int) -> float:
        loaded.append((shadow, version))
        if len(loaded) == 1:
            raise WeightLoadError("no")
        replica.engine._version = version
        return 0.0

    before = refusals("ENGINE")
    monkeypatch.setattr(replica.engine, "load_weights", load)
    await replica.store.announce(SECOND_LINK)
    await replica.store.wait_for_report(2)
    assert refusals("ENGINE") == before + 1
    assert loaded[0] == loaded[1]
    assert replica.bases == [0, 1]


def edit(change: Callable[[weight_pb2.WeightManifest], None]) -> Tamper:
    """Changes each manifest."""

    def tamper(responses: list[Response]) -> list[Response]:
        for response in responses:
            if response.HasField("manifest"):
                change(response.manifest)
        return responses

    return tamper


def each(**fields: object) -> Tamper:
    """Changes fields of the first slice."""

    def change(manifest: weight_pb2.WeightManifest) -> None:
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(manifest.slices[0], name)[:] = value
            else:
                setattr(manifest.slices[0], name, value)

    return edit(change)


def lose_a_tensor(responses: list[Response]) -> list[Response]:
    manifest = responses[0].manifest
    kept = [piece for piece in manifest.slices if piece.name != "model.norm.weight"]
    del manifest.slices[:]
    manifest.slices.extend(kept)
    manifest.payload_bytes = sum(piece.num_bytes for piece in kept)
    return responses


def lose_a_slice(manifest: weight_pb2.WeightManifest) -> None:
    manifest.payload_bytes -= manifest.slices[-1].num_bytes
    del manifest.slices[-1]


def double_a_slice(manifest: weight_pb2.WeightManifest) -> None:
    manifest.slices.append(manifest.slices[-1])
    manifest.payload_bytes += manifest.slices[-1].num_bytes


def rename_a_tensor(manifest: weight_pb2.WeightManifest) -> None:
    for piece in manifest.slices:
        if piece.name == "model.norm.weight":
            piece.name = "model.other.weight"


def reshape(manifest: weight_pb2.WeightManifest) -> None:
    for piece in manifest.slices:
        if piece.name == "lm_head.weight":
            piece.shape[:] = [32, 128]


def claim_less(manifest: weight_pb2.WeightManifest) -> None:
    manifest.payload_bytes -= 4


def claim_a_larger_plane(manifest: weight_pb2.WeightManifest) -> None:
    piece = manifest.slices[0]
    piece.num_bytes += 2**40
    manifest.payload_bytes += 2**40
    if piece.plane_bytes:
        piece.plane_bytes[0] += 2**40


def flip_a_bit(responses: list[Response]) -> list[Response]:
    chunk = bytearray(responses[-1].chunk)
    chunk[len(chunk) // 2] ^= 1
    responses[-1].chunk = bytes(chunk)
    return responses


def flip_a_digest(manifest: weight_pb2.WeightManifest) -> None:
    digest = manifest.slices[-1].digest
    manifest.slices[-1].digest = bytes([digest[0] ^ 1]) + digest[1:]


def cut_short(responses: list[Response]) -> list[Response]:
    return [*responses[:-1], Response(chunk=responses[-1].chunk[:-4])]


def end_early(responses: list[Response]) -> list[Response]:
    return responses[:1]


def lengthen(responses: list[Response]) -> list[Response]:
    return [*responses, Response(chunk=b"1234")]


def swap_chunks(responses: list[Response]) -> list[Response]:
    manifest, first, second, *rest = responses
    return [manifest, second, first, *rest]


def send_a_chunk_twice(responses: list[Response]) -> list[Response]:
    manifest, first, _, *rest = responses
    return [manifest, first, first, *rest]


def begin_with_a_chunk(responses: list[Response]) -> list[Response]:
    return responses[1:]


def break_the_probe(manifest: weight_pb2.WeightManifest) -> None:
    manifest.probe.token_ids = b"12345678"


TAMPERINGS: list[tuple[Tamper, str]] = [
    (lose_a_tensor, "MISSING_TENSOR"),
    (edit(lose_a_slice), "MISSING_TENSOR"),
    (edit(double_a_slice), "DOUBLED_TENSOR"),
    (edit(rename_a_tensor), "UNKNOWN_TENSOR"),
    (each(name="../../etc/passwd"), "UNKNOWN_TENSOR"),
    (edit(reshape), "BAD_SHAPE"),
    (each(dtype="F16"), "BAD_MANIFEST"),
    (each(encoding=9), "BAD_MANIFEST"),
    (each(num_elements=2**60), "BAD_MANIFEST"),
    (each(digest=b""), "BAD_MANIFEST"),
    (edit(claim_less), "BAD_MANIFEST"),
    (edit(claim_a_larger_plane), "BAD_MANIFEST"),
    (begin_with_a_chunk, "BAD_MANIFEST"),
    (edit(flip_a_digest), "BAD_DIGEST"),
    (cut_short, "BAD_PAYLOAD"),
    (end_early, "BAD_PAYLOAD"),
    (lengthen, "BAD_PAYLOAD"),
    (edit(lambda manifest: setattr(manifest, "base_version", 7)), "WRONG_BASE"),
    (edit(lambda manifest: setattr(manifest, "run_id", "another")), "OTHER_RUN"),
    (edit(lambda manifest: setattr(manifest, "epoch", 0)), "OLD_EPOCH"),
    (edit(lambda manifest: setattr(manifest, "version", 1)), "OLD_VERSION"),
    (edit(break_the_probe), "BAD_PROBE"),
]
FULL_TAMPERINGS: list[tuple[Tamper, str]] = [
    *((tamper, reason) for tamper, reason in TAMPERINGS),
    (each(encoding=SPARSE_STEPS), "BAD_MANIFEST"),
    (flip_a_bit, "BAD_DIGEST"),
    (swap_chunks, "BAD_DIGEST"),
    (send_a_chunk_twice, "BAD_DIGEST"),
]
DELTA_TAMPERINGS: list[tuple[Tamper, str]] = [
    *TAMPERINGS,
    (each(plane_bytes=[1, 2]), "BAD_MANIFEST"),
    (each(num_changed=2**40), "BAD_MANIFEST"),
    (each(num_changed=3), "BAD_PAYLOAD"),
    (flip_a_bit, "BAD_DIGEST"),
    (swap_chunks, "BAD_PAYLOAD"),
    (send_a_chunk_twice, "BAD_PAYLOAD"),
]


@pytest.mark.parametrize(("tamper", "reason"), FULL_TAMPERINGS)
async def test_wrong_full_copy_is_refused_and_the_old_version_stays(
    replica: Replica, tamper: Tamper, reason: str
) -> None:
    await replica.store.announce(FIRST_LINK)
    await replica.store.wait_for_report(1)
    before = refusals(reason)
    replica.store.tamper = tamper
    await replica.store.announce(pack(SECOND, 2))
    await until(lambda: refusals(reason) > before)
    assert replica.engine.version == 1
    assert_equal(replica.served, TENSORS)
    await replica.store.wait_for_report(2)
    assert_equal(replica.served, SECOND)


@pytest.mark.parametrize(("tamper", "reason"), DELTA_TAMPERINGS)
async def test_wrong_delta_is_refused_and_a_full_copy_heals_it(
    replica: Replica, tamper: Tamper, reason: str
) -> None:
    await replica.store.announce(FIRST_LINK)
    await replica.store.wait_for_report(1)
    before = refusals(reason)
    replica.store.tamper = tamper
    await replica.store.announce(SECOND_LINK)
    await until(lambda: refusals(reason) > before)
    assert replica.engine.version == 1
    assert_equal(replica.served, TENSORS)
    await replica.store.wait_for_report(2)
    assert_equal(replica.served, SECOND)
    await replica.store.announce(THIRD_LINK)
    await replica.store.wait_for_report(3)
    assert_equal(replica.served, THIRD)
    if reason != "BAD_PROBE":
        assert replica.bases == [0, 1, 0, 2]


async def test_links_in_the_wrong_order_are_refused(replica: Replica) -> None:
    await replica.store.announce(FIRST_LINK)
    await replica.store.wait_for_report(1)
    before = refusals("WRONG_BASE")

    def swap_links(responses: list[Response]) -> list[Response]:
        second = next(
            index for index, one in enumerate(responses) if one.manifest.base_version == 2
        )
        return [*responses[second:], *responses[:second]]

    replica.store.tamper = swap_links
    await replica.store.announce(SECOND_LINK, THIRD_LINK)
    await replica.store.wait_for_report(3)
    assert refusals("WRONG_BASE") == before + 1
    assert_equal(replica.served, THIRD)


async def test_delta_on_other_values_than_it_was_made_from_is_refused(replica: Replica) -> None:
    await replica.store.announce(FIRST_LINK)
    await replica.store.wait_for_report(1)
    before = refusals("BAD_DIGEST")
    await replica.store.announce(pack(THIRD, 2, base=(1, SECOND)))
    await until(lambda: refusals("BAD_DIGEST") > before)
    assert replica.engine.version == 1
    await replica.store.announce(pack(THIRD, 3))
    await replica.store.wait_for_report(3)
    assert_equal(replica.served, THIRD)


@pytest.mark.parametrize("based", [False, True])
async def test_value_that_is_not_finite_is_refused(replica: Replica, based: bool) -> None:
    before = refusals("NON_FINITE")
    bad = {**TENSORS, "model.norm.weight": np.full(64, np.nan, np.float32)}
    if based:
        await replica.store.announce(FIRST_LINK)
        await replica.store.wait_for_report(1)
    await replica.store.announce(pack(bad, 2, base=(1, TENSORS) if based else None))
    await until(lambda: refusals("NON_FINITE") > before)
    assert replica.engine.version == int(based)


async def test_older_version_is_refused(replica: Replica) -> None:
    before = refusals("OLD_VERSION")
    await replica.store.announce(pack(TENSORS, 5))
    await replica.store.wait_for_report(5)
    await replica.store.announce(pack(TENSORS, 4))
    await until(lambda: refusals("OLD_VERSION") > before)
    assert replica.engine.version == 5


async def test_other_run_at_the_address_is_refused(replica: Replica) -> None:
    await replica.store.announce(FIRST_LINK)
    await replica.store.wait_for_report(1)
    before = refusals("OTHER_RUN")
    await replica.store.announce(pack(SECOND, 1, run_id="another"))
    await until(lambda: refusals("OTHER_RUN") > before)
    assert_equal(replica.served, TENSORS)


async def test_version_that_no_memory_holds_is_refused(replica: Replica) -> None:
    before = refusals("BAD_MANIFEST")

    def grow(manifest: weight_pb2.WeightManifest) -> None:
        piece = weight_pb2.TensorSlice(
            name="w", dtype="F32", shape=[2**61 - 1], num_elements=2**61 - 1,
            num_bytes=2**63 - 4, encoding=weight_pb2.TENSOR_ENCODING_DENSE,
            digest=digest_of(np.empty(0, np.uint8)),
        )  # fmt: skip
        del manifest.slices[:]
        manifest.slices.append(piece)
        manifest.payload_bytes = piece.num_bytes

    replica.store.tamper = edit(grow)
    await replica.store.announce(FIRST_LINK)
    await replica.store.wait_for_report(1)
    assert refusals("BAD_MANIFEST") == before + 1


def test_probe_beyond_the_vocabulary_is_refused() -> None:
    probe = weight_pb2.LogprobProbe(
        token_ids=np.array([1, 99], "<i4").tobytes(), logprobs=np.zeros(1, "<f4").tobytes()
    )
    with pytest.raises(WeightsRefusedError, match="BAD_PROBE"):
        decode_probe(probe, vocab_size=7, max_model_len=64)
    assert decode_probe(probe, vocab_size=100, max_model_len=64) is not None
