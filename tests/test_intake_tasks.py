"""Leases and trajectories through real streams."""

import asyncio
import time
from pathlib import Path

import grpc
import pytest

from intake_rig import Rig, make_config, make_record, running, trajectory
from understudy.client import ControlClient
from understudy.config import NetworkConfig
from understudy.rpc import error_reason
from understudy.v1 import common_pb2, task_pb2, trajectory_pb2

FAILED = trajectory_pb2.OUTCOME_ENVIRONMENT_FAILED


async def reason_of(call: object) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error_reason(error.value)


async def test_tasks_are_issued_in_order_and_wrap(tmp_path: Path) -> None:
    config = make_config(tmp_path, first_ordinal=10, num_tasks=3, max_turns=5, max_staleness=1)
    async with running(config) as rig:
        leases = await rig.lease()
        assert [lease.task_key.ordinal for lease in leases] == [0, 0, 1, 1, 2, 2, 3, 3]
        ordinals = [lease.task.task_ordinal for lease in leases]
        assert ordinals == [10, 10, 11, 11, 12, 12, 10, 10]
        assert [lease.task_key.sample_index for lease in leases] == [0, 1] * 4
        assert len({lease.lease_id for lease in leases}) == 8
        first = leases[0]
        assert (first.task.suite, first.task.split, first.max_turns) == ("practice", "train", 5)
        assert first.min_version == 1
        assert first.expires_after.ToSeconds() == 30
        assert not first.sampling.HasField("seed")
        started = time.monotonic()
        assert await rig.lease(timeout=0.5) == []
        assert time.monotonic() - started < 0.5


async def test_nothing_is_leased_without_weights(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        waiting = asyncio.create_task(rig.lease(timeout=10))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await rig.publish()
        assert len(await waiting) == 8


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"run_id": "other"}, "RUN_MISMATCH"),
        ({"max_leases": 0}, "BAD_REQUEST"),
        ({"max_leases": 1025}, "BAD_REQUEST"),
        ({"actor_id": ""}, "BAD_REQUEST"),
    ],
)
async def test_wrong_lease_requests_are_refused(
    tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    async with running(make_config(tmp_path)) as rig:
        request = task_pb2.LeaseTasksRequest(**{"actor_id": "a", "max_leases": 1, **fields})
        assert await reason_of(rig.tasks.LeaseTasks(request, timeout=2)) == reason


async def test_a_pause_stops_leases_until_resumed(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        address = f"127.0.0.1:{rig.server._server.port}"
        async with ControlClient(address, NetworkConfig()) as control:
            await control.pause()
            assert await reason_of(rig.lease()) == "PAUSED"
            await control.resume()
            assert len(await rig.lease()) == 8
            figures = (await control.status()).figures
        assert figures["leased"] == 8
        assert figures["version"] == 1


async def test_an_expired_lease_is_leased_again_and_its_late_result_counts_once(
    tmp_path: Path,
) -> None:
    async with running(make_config(tmp_path, lease_seconds=0.3)) as rig:
        (first,) = await rig.lease(1)
        everything = await rig.lease(100, actor_id="b")
        again = await rig.lease(100, actor_id="c", timeout=5)
        assert first.task_key in [lease.task_key for lease in again]
        assert not {lease.lease_id for lease in again} & {lease.lease_id for lease in everything}
        request = task_pb2.RenewLeasesRequest(actor_id="a", lease_ids=[first.lease_id])
        response = await rig.tasks.RenewLeases(request, timeout=2)
        assert list(response.gone_lease_ids) == [first.lease_id]
        second = next(lease for lease in again if lease.task_key == first.task_key)
        await rig.push(make_record(first, trajectory(first)))
        await rig.push(make_record(second, trajectory(second)))
        assert rig.intake.balance().figures()["stored"] == 1


async def test_a_renewed_lease_does_not_expire(tmp_path: Path) -> None:
    async with running(make_config(tmp_path, lease_seconds=0.9)) as rig:
        (lease,) = await rig.lease(1)
        for _ in range(5):
            await asyncio.sleep(0.25)
            request = task_pb2.RenewLeasesRequest(actor_id="a", lease_ids=[lease.lease_id])
            assert not (await rig.tasks.RenewLeases(request, timeout=2)).gone_lease_ids
        assert rig.intake.balance().figures()["leased"] == 1


async def test_records_are_acked_and_a_resend_continues(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        leases = await rig.lease()
        records = [make_record(lease, trajectory(lease)) for lease in leases]
        async with rig.pusher() as pusher:
            for record in records[:5]:
                await pusher.send(record)
            assert await pusher.acked() == []
            incarnation = pusher.welcome.incarnation
        async with rig.pusher(incarnation=incarnation, first_unacked_sequence=2) as pusher:
            assert pusher.welcome.incarnation == incarnation
            assert pusher.welcome.next_sequence == 5
            await pusher.send(records[4], sequence=4)  # a duplicate of the transport
            await pusher.send(records[5])
            await pusher.send(records[0])  # a duplicate by task key
            assert await pusher.acked() == []
        assert rig.intake.balance().figures()["stored"] == 6


async def test_a_burst_is_acked_together(tmp_path: Path) -> None:
    config = make_config(tmp_path, group_size=8, groups_per_batch=16)
    async with running(config) as rig:
        leases = await rig.lease(128)
        async with rig.pusher() as pusher:
            for lease in leases:
                await pusher.send(make_record(lease, trajectory(lease)))
            num_acks = 0
            while (await pusher.read()).ack.next_sequence < 128:
                num_acks += 1
        assert num_acks < 40


async def test_a_forgotten_incarnation_starts_anew(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config) as rig, rig.pusher() as pusher:
        old = pusher.welcome
    async with running(config) as rig:
        async with rig.pusher(incarnation=old.incarnation, first_unacked_sequence=9) as pusher:
            assert pusher.welcome.epoch == old.epoch + 1
            assert pusher.welcome.incarnation > old.incarnation
            assert pusher.welcome.next_sequence == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"run_id": "other"}, "RUN_MISMATCH"),
        ({"actor_id": ""}, "BAD_HELLO"),
        ({"actor_id": "x" * 65}, "BAD_HELLO"),
        ({"incarnation": 2**40}, "BAD_HELLO"),
    ],
)
async def test_wrong_hellos_are_refused(
    tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        assert await reason_of(rig.pusher(**fields).__aenter__()) == reason


async def test_a_record_before_the_hello_is_refused(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        call = rig.trajectories.PushTrajectories()
        record = trajectory_pb2.TrajectoryRecord()
        packed = trajectory_pb2.TrajectoryRecords(records=[record])
        await call.write(trajectory_pb2.PushTrajectoriesRequest(records=packed))
        assert await reason_of(call.read()) == "BAD_HELLO"


async def test_a_newer_incarnation_fences_the_older(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        (lease,) = await rig.lease(1)
        async with rig.pusher() as old, rig.pusher() as new:
            assert new.welcome.incarnation == old.welcome.incarnation + 1
            await old.send(make_record(lease, trajectory(lease)))
            assert await reason_of(old.read()) == "OLD_INCARNATION"
            hello = rig.pusher(incarnation=old.welcome.incarnation)
            assert await reason_of(hello.__aenter__()) == "OLD_INCARNATION"


@pytest.mark.parametrize(
    ("field", "reason"),
    [("epoch", "OLD_EPOCH"), ("incarnation", "OLD_INCARNATION"), ("sequence", "OUT_OF_ORDER")],
)
async def test_wrong_envelopes_end_the_stream(tmp_path: Path, field: str, reason: str) -> None:
    async with running(make_config(tmp_path)) as rig:
        good, bad = await rig.lease(2)
        async with rig.pusher() as pusher:
            await pusher.send(make_record(good, trajectory(good)))
            await pusher.send(make_record(bad, trajectory(bad)), **{field: 77})
            assert (await pusher.read()).ack.next_sequence == 1
            assert await reason_of(pusher.read()) == reason
        assert rig.intake.balance().figures()["stored"] == 1


SMALL_DISK = {"quota_bytes": 12_000, "segment_bytes": 4096, "retention": "checkpoint"}


async def test_credits_end_with_the_quota_and_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, log=SMALL_DISK, groups_per_batch=1)
    async with running(config) as rig:
        leases = await rig.lease()
        for lease in leases[:2]:
            await rig.play([lease], num_tokens=4000)
        assert rig.intake.log.throttled == "quota"
        async with rig.pusher(actor_id="late") as late:
            assert late.welcome.credits == trajectory_pb2.Credits()
            await rig.batch(0)
            await rig.complete(0)
            await rig.publish(1)
            # What would come of a lease could not be stored.
            assert await rig.intake.lease("idle", 1, timeout=0.5) == []
            assert "learner.log.quota_bytes = 12000: nothing is leased" in caplog.text
            waiting = asyncio.create_task(rig.intake.lease("idle", 1, timeout=20))
            await rig.checkpoint(1, oldest_kept_step=1)
            assert (await late.read()).ack.credits.records > 0
            assert len(await waiting) == 1
            assert caplog.text.count("nothing is leased") == 1
            assert "below its quota again" in caplog.text


async def test_more_than_the_credits_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, log=SMALL_DISK, groups_per_batch=1)
    async with running(config) as rig:
        leases = await rig.lease()
        for lease in leases[:2]:
            await rig.play([lease], num_tokens=4000)
        async with rig.pusher(actor_id="late") as late:
            await late.send(make_record(leases[2], trajectory(leases[2])))
            await late.read()
            assert await reason_of(late.read()) == "CREDITS_EXCEEDED"


def spoil(record: trajectory_pb2.TrajectoryRecord, how: str) -> None:
    """Break one thing of a record."""
    if how == "digest":
        record.payload_digest = b"0" * 32
    elif how == "outcome":
        record.outcome = trajectory_pb2.OUTCOME_TRUNCATED
    elif how == "ordinal":
        record.task_key.ordinal = 999
    elif how == "index":
        record.task_key.sample_index = 2
    elif how == "encoding":
        record.encoding = common_pb2.ENCODING_UNSPECIFIED
    elif how == "task":
        record.task_key.ordinal += 1
    elif how == "size":
        record.payload += b"x" * 20_000


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("digest", "BAD_DIGEST"),
        ("outcome", "BAD_PAYLOAD"),
        ("encoding", "BAD_PAYLOAD"),
        ("task", "BAD_PAYLOAD"),
        ("ordinal", "UNKNOWN_TASK_KEY"),
        ("index", "UNKNOWN_TASK_KEY"),
        ("size", "TOO_LARGE"),
    ],
)
async def test_bad_records_are_rejected_by_name(tmp_path: Path, how: str, reason: str) -> None:
    async with running(make_config(tmp_path, log={"buffer_bytes": 16_000}, max_attempts=1)) as rig:
        bad, _, good, *_ = await rig.lease()
        record = make_record(bad, trajectory(bad))
        spoil(record, how)
        async with rig.pusher() as pusher:
            await pusher.send(record)
            await pusher.send(make_record(good, trajectory(good)))
            nacks = await pusher.acked()
        assert [(nack.sequence, nack.reason) for nack in nacks] == [(0, reason)]
        balance = rig.intake.balance()
        assert balance.holds
        if how in ("ordinal", "index", "task"):  # not the sample that it was leased for
            assert not balance.dropped
        else:
            assert balance.dropped == {reason.lower(): 1, "short_group": 1}


async def test_a_version_that_was_never_published_is_rejected(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        lease, *_ = await rig.lease()
        for versions in [(0,), (1, 2)]:
            (nack,) = await rig.push(make_record(lease, trajectory(lease, versions=versions)))
            assert nack.reason == "UNKNOWN_VERSION"
        assert rig.intake.balance().holds


async def test_a_rejected_sample_is_played_again(tmp_path: Path) -> None:
    async with running(make_config(tmp_path, max_attempts=2)) as rig:
        lease, *_ = await rig.lease()
        record = make_record(lease, trajectory(lease))
        spoil(record, "digest")
        await rig.push(record)
        (again,) = await rig.lease()
        assert again.task_key == lease.task_key
        assert again.lease_id != lease.lease_id


async def test_failed_episodes_are_played_again_and_then_dropped(tmp_path: Path) -> None:
    async with running(make_config(tmp_path, max_attempts=2, group_size=3)) as rig:
        lease, *_ = await rig.lease()
        await rig.play([lease], outcome=FAILED)
        (again,) = await rig.lease()
        assert again.task_key == lease.task_key
        await rig.play([again], outcome=FAILED)
        assert rig.intake.balance().dropped == {"failed": 1}
        assert await rig.lease(timeout=0.3) == []


async def test_a_truncated_episode_is_data(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        lease, *_ = await rig.lease()
        await rig.play([lease], outcome=trajectory_pb2.OUTCOME_TRUNCATED)
        assert rig.intake.balance().figures()["stored"] == 1


async def test_a_stop_acks_and_refuses(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config) as rig:
        await rig.lease()
        waiting = asyncio.create_task(rig.lease(timeout=10))
        async with rig.pusher() as pusher:
            stopping = asyncio.create_task(rig.server.stop(grace=1))
            assert await reason_of(pusher.read()) == "DRAINING"
            assert await reason_of(waiting) == "DRAINING"
            await stopping


async def play_round(rig: Rig, step: int) -> None:
    leases = await rig.lease()
    await rig.play(leases, versions=(step + 1,))
    await rig.batch(step)
    await rig.complete(step)
    await rig.publish(step + 1)


async def test_a_finished_run_says_that_it_is_exhausted(tmp_path: Path) -> None:
    config = make_config(tmp_path, steps=2, max_staleness=0)
    async with running(config) as rig:
        await play_round(rig, 0)
        await play_round(rig, 1)
        request = task_pb2.LeaseTasksRequest(actor_id="a", max_leases=1)
        response = await rig.tasks.LeaseTasks(request, timeout=5)
        assert response.exhausted
        assert not response.leases
