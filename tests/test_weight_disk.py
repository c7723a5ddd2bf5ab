"""The store's files: what a start finds is what was committed, or less; never something else."""

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from intake_rig import Rig, make_config, make_part, running
from learner.intake.server import IntakeServer
from learner.weights import disk as disk_module
from understudy import files
from understudy.config import Config
from understudy.config.learner import WeightsConfig
from understudy.errors import ConfigError
from weight_store_helpers import WEIGHTS, fetch, fetch_links, moved, reason_of, tensors_of

VALUES = [WEIGHTS]
for seed in range(8):
    VALUES.append(moved(VALUES[-1], seed))


async def publish(rig: Rig, first: int, last: int) -> None:
    """Versions in a row: the first one of all dense, the others as deltas."""
    for step in range(first, last):
        based = {"base": VALUES[step - 1], "base_version": step} if step else {}
        version = await rig.publish_part(*make_part(VALUES[step], step, epoch=1, **based))
        assert version == step + 1


def folder_of(config: Config) -> Path:
    return config.run.path / "weights"


def names(config: Config) -> list[str]:
    return sorted(path.name for path in folder_of(config).iterdir() if path.name != "lock")


def keeping(config: Config, keep_deltas: int) -> Config:
    weights = WeightsConfig(keep_deltas=keep_deltas)
    learner = config.learner.model_copy(update={"weights": weights})
    return config.model_copy(update={"learner": learner})


async def reopened(config: Config) -> dict[str, bytes]:
    """What an intake that starts anew serves, without a trainer's help."""
    server = await IntakeServer.open(config)
    try:
        store = server.weights.store
        head = store._holdings.head
        return {} if head is None else {n: head.buffer.tensor_bytes(n).tobytes() for n in WEIGHTS}
    finally:
        await server.stop(grace=0.1)


async def test_a_start_finds_the_newest_version_bit_for_bit(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        await publish(rig, 0, 4)
        before = await fetch(rig.weights)
        watch = rig.server.weights.store.watch()
        announced = await anext(watch)
        await watch.aclose()
    assert names(config) == [
        *(f"delta-0000000{version}.weights" for version in (2, 3, 4)),
        "full-00000001.weights",
    ]
    assert await reopened(config) == before == tensors_of(VALUES[3])
    async with running(config, version=False) as rig:
        assert await fetch(rig.weights) == before
        watch = rig.server.weights.store.watch()
        assert await anext(watch) == announced
        await watch.aclose()
        based = make_part(VALUES[4], 4, epoch=2, base=VALUES[3], base_version=4)
        assert await rig.publish_part(*based) == 5
        assert await fetch(rig.weights) == tensors_of(VALUES[4])


async def test_an_intake_that_starts_anew_has_not_lost_its_weights(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        assert await reason_of(rig.batch(0)) == "WEIGHTS_LOST"
        await publish(rig, 0, 2)
    async with running(config, version=False) as rig:
        assert await reason_of(rig.batch(0, timeout=0.3)) == "DEADLINE_EXCEEDED"


async def test_a_long_chain_is_replaced_by_a_full_copy(tmp_path: Path) -> None:
    config = keeping(make_config(tmp_path), 3)
    async with running(config, version=False) as rig:
        await publish(rig, 0, 4)
        assert "full-00000001.weights" in names(config)
        await publish(rig, 4, 5)
        await settled(rig)
        assert [name for name in names(config) if "full" in name] == ["full-00000005.weights"]
        # Deltas that lead up to it are still worth having; more than three are not.
        assert len(names(config)) == 4
        [(manifest, _)] = await fetch_links(rig.weights, base=4)
        assert manifest.base_version == 4
        assert await fetch(rig.weights) == tensors_of(VALUES[4])
        await publish(rig, 5, 7)
    assert await reopened(config) == tensors_of(VALUES[6])


async def test_a_chain_of_many_bytes_is_replaced_by_a_full_copy(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        await publish(rig, 0, 1)
        other = {name: -tensor * 1.7 for name, tensor in WEIGHTS.items()}
        dense = make_part(other, 1)
        dense[0].base_version = 1
        assert await rig.publish_part(*dense) == 2
        await settled(rig)
        assert "full-00000002.weights" in names(config)
        [(manifest, _)] = await fetch_links(rig.weights)
        assert manifest.base_version == 0
    assert await reopened(config) == tensors_of(other)


async def settled(rig: Rig) -> None:
    """Nothing is being committed or compacted any more."""
    while tasks := rig.server.weights.store._tasks:
        await asyncio.wait(tasks)


async def test_a_replica_far_behind_gets_a_full_copy_and_one_step_behind_a_delta(
    tmp_path: Path,
) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        await publish(rig, 0, 4)
        for base, links in [(0, 4), (1, 3), (3, 1), (4, 0)]:
            assert len(await fetch_links(rig.weights, base=base)) == links
        other = {name: -tensor for name, tensor in WEIGHTS.items()}
        assert await rig.publish_part(*make_part(other, 4)) == 5
        [(manifest, _)] = await fetch_links(rig.weights, base=3)
        assert manifest.base_version == 0


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "offset", "newest"),
    [
        ("delta-00000004", -1, 3),
        ("delta-00000004", 40, 3),
        ("delta-00000003", -1, 2),
        ("full-00000001", -1, 0),
        ("full-00000001", 3, 0),
    ],
)
async def test_a_damaged_file_is_set_aside_and_what_comes_before_it_serves(
    tmp_path: Path, name: str, offset: int, newest: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        await publish(rig, 0, 4)
    flip(folder_of(config) / f"{name}.weights", offset)
    assert await reopened(config) == (tensors_of(VALUES[newest - 1]) if newest else {})
    assert f"{name}.weights is set aside" in caplog.text
    assert f"{name}.weights.damaged" in names(config)
    async with running(config, version=False) as rig:
        if newest == 0:
            assert await reason_of(rig.batch(0)) == "WEIGHTS_LOST"
        # The number that the damaged one had is not used again.
        assert await rig.publish_part(*make_part(VALUES[5], 5, epoch=2)) == 5
    assert await reopened(config) == tensors_of(VALUES[5])


async def test_a_file_that_was_cut_short_is_damaged(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        await publish(rig, 0, 2)
    path = folder_of(config) / "delta-00000002.weights"
    data = path.read_bytes()
    for num_bytes in (len(data) - 1, len(data) // 2, 10, 0):
        path.write_bytes(data[:num_bytes])
        assert await reopened(config) == tensors_of(VALUES[0])


async def test_what_was_not_finished_is_removed(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        await publish(rig, 0, 1)
    (folder_of(config) / "delta-00000002.weights.new").write_bytes(b"half of a delta")
    assert await reopened(config) == tensors_of(VALUES[0])
    assert names(config) == ["full-00000001.weights"]


async def test_a_version_that_the_log_does_not_know_is_not_served(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        await publish(rig, 0, 3)
    other = make_config(tmp_path).model_copy(
        update={"run": config.run.model_copy(update={"directory": tmp_path / "other"})}
    )
    async with running(other, version=False) as rig:
        await rig.publish_part(*make_part(VALUES[5], 0))
        assert rig.intake.state.steps_behind == [0]
    for path in folder_of(config).glob("delta-*"):
        path.rename(folder_of(other) / path.name)
    assert await reopened(other) == tensors_of(VALUES[5])
    assert sum(name.endswith(".damaged") for name in names(other)) == 2


async def test_weights_of_another_run_are_set_aside(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        await publish(rig, 0, 1)
    other = config.model_copy(update={"run": config.run.model_copy(update={"name": "other"})})
    config.run.path.rename(config.run.path.with_name("kept"))
    folder_of(other).parent.mkdir(parents=True)
    (config.run.path.with_name("kept") / "weights").rename(folder_of(other))
    assert await reopened(other) == {}


async def test_one_process_at_a_time_has_the_weights(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False):
        with pytest.raises(ConfigError, match="another weight store"):
            await asyncio.to_thread(disk_module.WeightDisk.open, folder_of(config), "run")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
async def test_a_disk_that_fails_leaves_the_newest_version_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        await publish(rig, 0, 1)

        def fail(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as failing:
            failing.setattr(files.os, "fsync", fail)
            part = make_part(VALUES[1], 1, base=VALUES[0], base_version=1)
            assert await reason_of(rig.publish_part(*part)) == "STORE_FAILED"
        assert await fetch(rig.weights) == tensors_of(VALUES[0])
        assert names(config) == ["full-00000001.weights"]
        # Number 2 was issued and stays unused.
        assert await rig.publish_part(*part) == 3
        assert await fetch(rig.weights) == tensors_of(VALUES[1])
    assert await reopened(config) == tensors_of(VALUES[1])


async def test_a_compaction_without_space_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = keeping(make_config(tmp_path), 1)
    async with running(config, version=False) as rig:
        await publish(rig, 0, 2)
        write = disk_module.write_link

        def no_room(folder: Path, manifest: Any, payload: Any) -> Any:
            if not manifest.base_version:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(folder, manifest, payload)

        with monkeypatch.context() as full_disk:
            full_disk.setattr(disk_module, "write_link", no_room)
            await publish(rig, 2, 4)
            await settled(rig)
        assert "full-00000001.weights" in names(config)
        await publish(rig, 4, 5)
        await settled(rig)
        assert "full-00000005.weights" in names(config)
    assert await reopened(config) == tensors_of(VALUES[4])


async def test_a_file_that_becomes_shorter_under_a_fetch_is_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        await publish(rig, 0, 1)
        os.truncate(folder_of(config) / "full-00000001.weights", 600)
        assert await reason_of(fetch_links(rig.weights)) == "STORE_FAILED"
