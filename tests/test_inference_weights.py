"""Versions from a weight store: what is taken, what is refused, and what survives."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY

from inference.manifest import RefusedError, decode_probe
from inference.scripted import ScriptedEngine
from inference.subscriber import WeightSubscriber
from inference.weights import all_finite
from inference_helpers import WeightStore, pack, write_word_bundle
from understudy.config import InferenceConfig, NetworkConfig
from understudy.errors import PeerUnreachableError
from understudy.rpc import open_channel
from understudy.v1 import weight_pb2

TENSORS = {
    "model.norm.weight": np.arange(64, dtype=np.float32),
    "lm_head.weight": np.arange(4096, dtype=np.float32).reshape(64, 64),
}


class Replica:
    """A subscriber with a scripted engine, and the shadows that were loaded."""

    def __init__(self, store: WeightStore, engine: ScriptedEngine) -> None:
        self.store = store
        self.engine = engine
        self.subscriber: Any = None


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    store = WeightStore(write_word_bundle(tmp_path / "bundle"))
    network = NetworkConfig(learner=await store.start())
    engine = ScriptedEngine(InferenceConfig())
    await engine.start(store.bundle)
    async with open_channel(network.learner, network) as channel:
        found = Replica(store, engine)
        found.subscriber = WeightSubscriber(channel, engine, "replica", network)
        task = asyncio.create_task(found.subscriber.run())
        yield found
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await store.server.stop(0)


def served(replica: Replica) -> dict[str, np.ndarray]:
    shadow = replica.subscriber._served
    return {e.name: data.view("<f4").reshape(e.shape) for e, data in shadow}


def refusals(reason: str) -> float:
    return REGISTRY.get_sample_value("understudy_weights_refused_total", {"reason": reason}) or 0.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.01)


async def test_new_version_is_served_and_reported(replica: Replica) -> None:
    probe = weight_pb2.LogprobProbe(
        token_ids=np.array([2, 3, 4], "<i4").tobytes(),
        logprobs=np.array([-0.5, -0.75], "<f4").tobytes(),
    )
    await replica.store.announce(*pack(TENSORS, 3, probe=probe))
    report = await replica.store.wait_for_report(3)
    assert replica.engine.version == 3
    assert (report.mismatch_mean, report.mismatch_max) == (0.125, 0.25)
    for name, value in served(replica).items():
        np.testing.assert_array_equal(value, TENSORS[name])


async def test_broken_transfer_resumes_where_it_broke(replica: Replica) -> None:
    replica.store.break_at = 8192
    await replica.store.announce(*pack(TENSORS, 1))
    await replica.store.wait_for_report(1)
    assert replica.store.offsets == [0, 8192]
    np.testing.assert_array_equal(served(replica)["lm_head.weight"], TENSORS["lm_head.weight"])


async def test_versions_in_between_are_skipped(replica: Replica) -> None:
    for version in (1, 2, 9):
        await replica.store.announce(*pack(TENSORS, version))
    await replica.store.wait_for_report(9)
    assert len(replica.store.reports) <= 2


async def test_store_that_restarts_is_found_again(replica: Replica) -> None:
    await replica.store.announce(*pack(TENSORS, 1))
    await replica.store.wait_for_report(1)
    address = replica.subscriber._network.learner
    await replica.store.server.stop(0)
    again = WeightStore(replica.store.bundle)
    assert await again.start(address) == address
    await again.announce(*pack(TENSORS, 2))
    await again.wait_for_report(2)
    await again.server.stop(0)


async def test_absent_learner_before_first_weights_is_an_error(tmp_path: Path) -> None:
    network = NetworkConfig(learner=f"unix:{tmp_path}/nobody", connect_timeout_seconds=0.3)
    engine = ScriptedEngine(InferenceConfig())
    async with open_channel(network.learner, network) as channel:
        subscriber = WeightSubscriber(channel, engine, "replica", network)
        with pytest.raises(PeerUnreachableError, match="no weights yet"):
            await subscriber.run()


def lose_a_tensor(manifest: Any, payload: bytes) -> bytes:
    del manifest.slices[3], manifest.slices[1]
    manifest.payload_bytes = sum(part.num_bytes for part in manifest.slices)
    return payload[: manifest.payload_bytes]


def double_a_slice(manifest: Any, payload: bytes) -> bytes:
    manifest.slices.append(manifest.slices[-1])
    manifest.payload_bytes += manifest.slices[-1].num_bytes
    return payload + payload[-manifest.slices[-1].num_bytes :]


def lose_a_slice(manifest: Any, payload: bytes) -> bytes:
    manifest.payload_bytes -= manifest.slices[-1].num_bytes
    del manifest.slices[-1]
    return payload[: manifest.payload_bytes]


def rename_a_tensor(manifest: Any, payload: bytes) -> bytes:
    manifest.slices[0].name = manifest.slices[2].name = "model.other.weight"
    return payload


def leave_the_folder(manifest: Any, payload: bytes) -> bytes:
    manifest.slices[0].name = "../../etc/passwd"
    return payload


def reshape(manifest: Any, payload: bytes) -> bytes:
    for part in manifest.slices:
        if part.name == "lm_head.weight":
            part.shape[:] = [32, 128]
    return payload


def flip_a_bit(manifest: Any, payload: bytes) -> bytes:
    return bytes([payload[0] ^ 1]) + payload[1:]


def cut_short(manifest: Any, payload: bytes) -> bytes:
    return payload[:-4]


def lengthen(manifest: Any, payload: bytes) -> bytes:
    return payload + b"1234"


def claim_less(manifest: Any, payload: bytes) -> bytes:
    manifest.payload_bytes -= 4
    return payload


def base_it(manifest: Any, payload: bytes) -> bytes:
    manifest.base_version = 1
    return payload


def use_other_encoding(manifest: Any, payload: bytes) -> bytes:
    manifest.slices[0].encoding = weight_pb2.TENSOR_ENCODING_UNSPECIFIED
    return payload


def change_run(manifest: Any, payload: bytes) -> bytes:
    manifest.run_id = "another"
    return payload


def lower_the_epoch(manifest: Any, payload: bytes) -> bytes:
    manifest.epoch = 0
    return payload


def break_the_probe(manifest: Any, payload: bytes) -> bytes:
    manifest.probe.token_ids = b"12345678"
    return payload


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lose_a_tensor, "MISSING_TENSOR"),
        (lose_a_slice, "MISSING_TENSOR"),
        (double_a_slice, "DOUBLED_TENSOR"),
        (rename_a_tensor, "UNKNOWN_TENSOR"),
        (leave_the_folder, "UNKNOWN_TENSOR"),
        (reshape, "BAD_SHAPE"),
        (flip_a_bit, "BAD_DIGEST"),
        (cut_short, "BAD_PAYLOAD"),
        (lengthen, "BAD_PAYLOAD"),
        (claim_less, "BAD_MANIFEST"),
        (use_other_encoding, "BAD_MANIFEST"),
        (base_it, "WRONG_BASE"),
        (change_run, "OTHER_RUN"),
        (lower_the_epoch, "OLD_EPOCH"),
        (break_the_probe, "BAD_PROBE"),
    ],
)
async def test_wrong_version_is_refused_and_the_old_one_stays(
    replica: Replica, tamper: Callable[[Any, bytes], bytes], reason: str
) -> None:
    await replica.store.announce(*pack(TENSORS, 1))
    await replica.store.wait_for_report(1)
    before = refusals(reason)
    changed = {name: value + 1 for name, value in TENSORS.items()}
    manifest, payload = pack(changed, 2)
    await replica.store.announce(manifest, tamper(manifest, payload))
    await until(lambda: refusals(reason) > before)
    assert replica.engine.version == 1
    np.testing.assert_array_equal(served(replica)["lm_head.weight"], TENSORS["lm_head.weight"])
    await replica.store.announce(*pack(changed, 3))
    await replica.store.wait_for_report(3)
    np.testing.assert_array_equal(served(replica)["lm_head.weight"], changed["lm_head.weight"])


async def test_value_that_is_not_finite_is_refused(replica: Replica) -> None:
    before = refusals("NON_FINITE")
    bad = dict(TENSORS)
    bad["model.norm.weight"] = np.full(64, np.nan, np.float32)
    await replica.store.announce(*pack(bad, 1))
    await until(lambda: refusals("NON_FINITE") > before)
    assert replica.engine.version == 0


async def test_older_version_is_refused(replica: Replica) -> None:
    before = refusals("OLD_VERSION")
    await replica.store.announce(*pack(TENSORS, 5))
    await replica.store.wait_for_report(5)
    await replica.store.announce(*pack(TENSORS, 4))
    await until(lambda: refusals("OLD_VERSION") > before)
    assert replica.engine.version == 5


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_finite_check_sees_both_dtypes(value: float) -> None:
    data = np.array([1.0, value, 3.0], "<f4")
    assert not all_finite("F32", data.view(np.uint8))
    upper = (data.view("<u4") >> 16).astype("<u2")
    assert not all_finite("BF16", upper.view(np.uint8))
    assert all_finite("BF16", upper[:1].view(np.uint8))


def test_probe_beyond_the_vocabulary_is_refused() -> None:
    probe = weight_pb2.LogprobProbe(
        token_ids=np.array([1, 99], "<i4").tobytes(), logprobs=np.zeros(1, "<f4").tobytes()
    )
    with pytest.raises(RefusedError, match="BAD_PROBE"):
        decode_probe(probe, vocab_size=7, max_model_len=64)
    assert decode_probe(probe, vocab_size=100, max_model_len=64) is not None
