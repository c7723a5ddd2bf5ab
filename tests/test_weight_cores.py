"""Work on slices, side by side on machines that have the cores, gives what it gives on one."""

import os
import threading
import time

import numpy as np
import pytest
import torch

from learner.trainer.architectures import ShardSlice
from learner.trainer.part import FrozenSlices, Part, make_part
from learner.trainer.snapshot import HostCopy
from understudy.v1 import weight_pb2
from understudy.weights.cores import map_slices
from understudy.weights.errors import WeightsRefusedError
from understudy.weights.layout import HostBuffer
from understudy.weights.transfer import LinkWriter, check_link, check_written, copy_values

CPU = torch.device("cpu")
NUM_TENSORS = 40


@pytest.fixture(params=[2, 12], autouse=True)
def cpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many CPUs this process seems to have: work goes to one thread, or to six."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(request.param)))
    return int(request.param)


def weights(seed: int, noise: float = 0.0) -> HostCopy:
    """Tensors of many sizes, as a rank has them, and perhaps a step further."""
    torch.manual_seed(seed)
    values = [torch.randn(100 * (index + 1)) for index in range(NUM_TENSORS)]
    slices = [
        ShardSlice(name=f"layers.{i}", shape=tuple(v.shape), start=0, values=v + noise * (v > 1))
        for i, v in enumerate(values)
    ]
    copy = HostCopy(slices, "F32", CPU)
    copy.fill(slices)
    return copy


def part_of(new: HostCopy, base: HostCopy | None) -> Part:
    header = weight_pb2.PartHeader(run_id="run", num_parts=1)
    return make_part(header, new, base, 1, FrozenSlices(HostCopy([], "F32", CPU)))


def manifest_of(part: Part) -> weight_pb2.WeightManifest:
    return weight_pb2.WeightManifest(
        run_id="run",
        version=2,
        base_version=part.header.base_version,
        payload_bytes=part.num_bytes,
        slices=part.header.slices,
    )


def receive(part: Part, buffer: HostBuffer, chunk_bytes: int) -> None:
    """Apply and check a part as a replica does."""
    manifest = manifest_of(part)
    writer = LinkWriter(manifest, buffer)
    payload = b"".join(map(bytes, part.payload))
    for start in range(0, len(payload), chunk_bytes):
        writer.write([payload[start : start + chunk_bytes]])
    writer.write([])
    check_written(manifest.slices, buffer)


@pytest.mark.parametrize("chunk_bytes", [1_000, 2**20])
def test_full_copies_and_deltas_arrive_bit_for_bit(chunk_bytes: int) -> None:
    old, new = weights(0), weights(0, noise=1e-3)
    full = part_of(old, None)
    held = HostBuffer(check_link(manifest_of(full), None))
    receive(full, held, chunk_bytes)
    buffer = HostBuffer(held.layout)
    copy_values(held, buffer)
    delta = part_of(new, old)
    assert delta.num_bytes < full.num_bytes / 2
    receive(delta, buffer, chunk_bytes)
    for one, other in zip(old.slices, new.slices, strict=True):
        assert np.array_equal(held.tensor_bytes(one.name), one.values)
        assert np.array_equal(buffer.tensor_bytes(other.name), other.values)


@pytest.mark.parametrize("reason", ["BAD_DIGEST", "NON_FINITE"])
def test_one_bad_slice_among_many_is_refused(reason: str) -> None:
    old, new = weights(0), weights(0, noise=1e-3)
    full = part_of(old, None)
    buffer = HostBuffer(check_link(manifest_of(full), None))
    receive(full, buffer, 2**20)
    if reason == "NON_FINITE":
        new.slices[7].values.view("<f4")[3] = np.inf
    delta = part_of(new, old)
    if reason == "BAD_DIGEST":
        buffer.tensor_bytes("layers.7")[0] ^= 1
    with pytest.raises(WeightsRefusedError) as refused:
        receive(delta, buffer, 2**20)
    assert refused.value.reason == reason
    assert "layers.7" in str(refused.value)


def test_items_are_taken_side_by_side_where_there_are_cores(cpus: int) -> None:
    together = threading.Barrier(cpus // 2)
    threads = map_slices(lambda _: (together.wait(10), threading.get_ident())[1], range(cpus // 2))
    assert len(set(threads)) == cpus // 2
    assert map_slices(lambda item: item * 2, range(100)) == list(range(0, 200, 2))
    assert map_slices(str, ()) == []


def test_nothing_runs_once_an_error_is_raised() -> None:
    running: set[int] = set()

    def work(item: int) -> None:
        running.add(item)
        try:
            time.sleep(0.01)
            if item in (3, 4):
                raise ValueError(item)
        finally:
            running.discard(item)

    with pytest.raises(ValueError, match="3"):
        map_slices(work, range(50))
    assert not running
