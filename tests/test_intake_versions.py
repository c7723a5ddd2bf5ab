"""VersionService: numbers for a store that may be elsewhere, and what replicas report."""

import json
import time
from pathlib import Path

import pytest

from intake_rig import make_config, running
from learner.intake.versions import FORGET_SECONDS, Replicas
from understudy.config import Config, NetworkConfig
from understudy.v1 import weight_pb2
from weight_store_helpers import reason_of


def elsewhere(folder: Path) -> Config:
    """An intake without the weights."""
    network = NetworkConfig(weights="127.0.0.1:1")
    return make_config(folder).model_copy(update={"network": network})


def request(epoch: int, **fields: object) -> weight_pb2.IssueVersionRequest:
    return weight_pb2.IssueVersionRequest(**{"run_id": "run", "epoch": epoch, **fields})


async def test_numbers_rise_and_are_journaled(tmp_path: Path) -> None:
    config = elsewhere(tmp_path)
    async with running(config, version=False) as rig:
        for step in range(2):
            call = rig.versions.IssueVersion(
                request(rig.epoch, step=step, payload_bytes=7, publish_seconds=0.5), timeout=5
            )
            assert (await call).version == step + 1
        path = config.run.path / "metrics.jsonl"
        line = json.loads(path.read_text().splitlines()[-1])
        del line["time"]
        assert line == {
            "kind": "version",
            "version": 2,
            "step": 1,
            "epoch": 1,
            "payload_bytes": 7,
            "publish_seconds": 0.5,
        }
    async with running(config, version=False) as rig:
        assert (await rig.versions.IssueVersion(request(2), timeout=5)).version == 3


async def test_only_the_newest_trainer_of_the_run_gets_a_number(tmp_path: Path) -> None:
    async with running(elsewhere(tmp_path), version=False) as rig:
        await rig.train()
        issue = rig.versions.IssueVersion
        assert await reason_of(issue(request(1), timeout=5)) == "OLD_EPOCH"
        assert await reason_of(issue(request(2, run_id="other"), timeout=5)) == "RUN_MISMATCH"
        assert rig.intake.state.steps_behind == []


async def test_weights_are_lost_once_the_store_says_so(tmp_path: Path) -> None:
    async with running(elsewhere(tmp_path), version=False) as rig:
        assert await reason_of(rig.batch(0, timeout=0.3)) == "DEADLINE_EXCEEDED"  # not known yet
        for newest, reason in [(0, "WEIGHTS_LOST"), (3, "DEADLINE_EXCEEDED")]:
            attach = weight_pb2.AttachStoreRequest(run_id="run", newest_version=newest)
            await rig.versions.AttachStore(attach, timeout=5)
            assert await reason_of(rig.batch(0, timeout=0.3)) == reason
        attach.run_id = "other"
        assert await reason_of(rig.versions.AttachStore(attach, timeout=5)) == "RUN_MISMATCH"


async def test_replica_reports_are_journaled(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        report = weight_pb2.ReportReplicaRequest(
            replica_id="r0", version=1, mismatch_mean=0.01, pause_seconds=0.2
        )
        await rig.versions.ReportReplica(report, timeout=5)
        path = rig.intake.config.run.path / "metrics.jsonl"
        line = json.loads(path.read_text().splitlines()[-1])
        assert (line["kind"], line["replica_id"], line["version"]) == ("replica", "r0", 1)
        assert line["mismatch_mean"] == 0.01
        assert rig.server.figures()["lowest_replica_version"] == 1
        report.replica_id = "r" * 65
        assert await reason_of(rig.versions.ReportReplica(report, timeout=5)) == "BAD_REQUEST"


async def test_who_serves_the_newest_is_known_after_a_restart(tmp_path: Path) -> None:
    config = elsewhere(tmp_path)
    async with running(config, version=False) as rig:
        await rig.versions.IssueVersion(request(rig.epoch), timeout=5)
    async with running(config, version=False) as rig:
        replicas = rig.server.versions.replicas
        report = weight_pb2.ReportReplicaRequest(replica_id="r0", version=1)
        await rig.versions.ReportReplica(report, timeout=5)
        later = time.monotonic() + 10 * FORGET_SECONDS
        replicas._clock = lambda: later
        await rig.versions.IssueVersion(request(rig.epoch, step=1), timeout=5)
        assert replicas.versions == [1]  # only now it is behind


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


def test_a_replica_of_the_newest_version_is_remembered_however_long(clock: list[float]) -> None:
    replicas = Replicas(lambda: clock[0])
    replicas.issued(1)
    replicas.reported("a", 1)
    clock[0] = 10_000.0
    assert replicas.versions == [1]
    replicas.issued(2)  # only now it is behind
    clock[0] += FORGET_SECONDS - 1
    assert replicas.versions == [1]
    clock[0] += 2
    assert replicas.versions == []


def test_a_replica_that_reports_is_remembered_although_it_is_behind(clock: list[float]) -> None:
    replicas = Replicas(lambda: clock[0])
    replicas.reported("dies", 1)
    for version in range(1, 20):
        clock[0] += FORGET_SECONDS / 2
        replicas.issued(version + 1)
        replicas.reported("lives", version)
    assert replicas.versions == [19]
