"""The weight store through real streams: whole and verified, or not at all."""

import asyncio
import json
from pathlib import Path

import grpc
import numpy as np
import pytest

from intake_rig import Rig, make_config, make_part, running
from learner.audit import audit_run
from understudy.client import fetch_model_bundle
from understudy.config import NetworkConfig
from understudy.rpc import open_channel
from understudy.v1 import weight_pb2
from understudy.weights.encoding import DENSE, SPARSE_STEPS, digest_of
from weight_store_helpers import (
    LOWER,
    UPPER,
    WEIGHTS,
    Part,
    fetch,
    fetch_links,
    halves,
    moved,
    reason_of,
    reasons_of,
    tensors_of,
)


async def test_two_parts_commit_one_version(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        upper, lower = halves()
        upper[0].probe.CopyFrom(weight_pb2.LogprobProbe(token_ids=b"\0" * 8, logprobs=b"\0" * 4))
        first = asyncio.create_task(rig.publish_part(*upper))
        await asyncio.sleep(0.05)
        assert not first.done()
        assert await rig.publish_part(*lower) == await first == 1
        [(manifest, payload)] = await fetch_links(rig.weights)
        assert (manifest.version, manifest.base_version, manifest.epoch) == (1, 0, 1)
        assert manifest.payload_bytes == len(payload)
        assert len(manifest.probe.token_ids) == 8
        assert await fetch(rig.weights) == tensors_of(WEIGHTS)
        assert rig.intake.state.admission.version == 1


@pytest.mark.parametrize("num_parts", [1, 2])
async def test_a_delta_leads_to_the_values_that_were_published(
    tmp_path: Path, num_parts: int
) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        rows = [slice(None)] if num_parts == 1 else [UPPER, LOWER]
        values = WEIGHTS
        for step in range(3):
            base, values = values, moved(values, step)
            version = await asyncio.gather(
                *(
                    rig.publish_part(
                        *make_part(
                            values,
                            step,
                            part=index,
                            num_parts=num_parts,
                            rows=part,
                            base=base if step else None,
                            base_version=step,
                        )
                    )
                    for index, part in enumerate(rows)
                )
            )
            assert version == [step + 1] * num_parts
        assert await fetch(rig.weights) == tensors_of(values)
        [(manifest, payload)] = await fetch_links(rig.weights, base=2)
        assert (manifest.base_version, manifest.version) == (2, 3)
        assert len(payload) < sum(tensor.nbytes for tensor in values.values())


async def test_parts_may_differ_in_their_base(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        await rig.publish_part(*make_part(WEIGHTS))
        new = moved(WEIGHTS)
        upper = make_part(new, 1, num_parts=2, rows=UPPER, base=WEIGHTS, base_version=1)
        lower = make_part(new, 1, part=1, num_parts=2, rows=LOWER)
        assert await reasons_of(rig.publish_part(*upper), rig.publish_part(*lower)) == ["2", "2"]
        assert await fetch(rig.weights) == tensors_of(new)
        [(manifest, _)] = await fetch_links(rig.weights, base=1)
        assert manifest.base_version == 1
        assert DENSE in {piece.encoding for piece in manifest.slices}
        assert SPARSE_STEPS in {piece.encoding for piece in manifest.slices}


async def test_what_did_not_change_is_listed_without_bytes(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        await rig.publish_part(*make_part(WEIGHTS))
        same = make_part(WEIGHTS, 1, base=WEIGHTS, base_version=1)
        assert await rig.publish_part(*same) == 2
        [(manifest, payload)] = await fetch_links(rig.weights, base=1)
        assert (len(manifest.slices), payload) == (len(WEIGHTS), b"")


async def test_the_same_content_again_is_answered_with_the_newest(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        assert [await rig.publish(step) for step in (0, 1, 1)] == [1, 2, 2]
        # What the answer of a delta was lost for comes again with its old base, or as values.
        new = {"w": np.arange(4, dtype=np.float32)}
        delta = make_part(new, 2, base={"w": np.ones(4)}, base_version=2)
        assert [await rig.publish_part(*delta) for _ in range(2)] == [3, 3]
        assert await rig.publish_part(*make_part(new, 2)) == 3
        path = rig.intake.config.run.path / "metrics.jsonl"
        versions = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(line["kind"], line["version"], line["step"]) for line in versions] == [
            ("version", 1, 0),
            ("version", 2, 1),
            ("version", 3, 2),
        ]


def wrong_digest(part: Part) -> Part:
    part[0].slices[0].digest = b"0" * 32
    return part


def flipped_payload(part: Part) -> Part:
    return part[0], b"\xff" + part[1][1:]


def not_a_number(part: Part) -> Part:
    return make_part(
        {name: np.where(t == t.max(), np.nan, t) for name, t in WEIGHTS.items()}, num_parts=2
    )


def missing_tensor(part: Part) -> Part:
    tensors = {"model.norm.weight": WEIGHTS["model.norm.weight"]}
    return make_part(tensors, num_parts=2, rows=UPPER)


def doubled_slice(part: Part) -> Part:
    return make_part(WEIGHTS, num_parts=2, rows=slice(0, 3))


def doubled_in_one_part(part: Part) -> Part:
    part[0].slices.extend([part[0].slices[0]] * 30)
    return part


def gap(part: Part) -> Part:
    return make_part(WEIGHTS, num_parts=2, rows=slice(0, 1))


def other_dtype(part: Part) -> Part:
    for piece in part[0].slices:
        piece.dtype, piece.num_bytes = "BF16", piece.num_elements * 2
    return part


def other_shape(part: Part) -> Part:
    part[0].slices[0].shape[0] += 1
    return part


def unknown_tensor(part: Part) -> Part:
    return make_part({**WEIGHTS, "extra": np.ones(2)}, num_parts=2, rows=UPPER)


def path_as_name(part: Part) -> Part:
    part[0].slices[0].name = "../../x"
    return part


def too_short(part: Part) -> Part:
    return part[0], part[1][:-4]


def too_long(part: Part) -> Part:
    return part[0], part[1] + b"1234"


def part_beyond(part: Part) -> Part:
    part[0].part_index = 2
    return part


def based_on_another(part: Part) -> Part:
    part[0].base_version = 7
    return part


def delta_without_base(part: Part) -> Part:
    part[0].slices[0].encoding = SPARSE_STEPS
    return part


def other_run(part: Part) -> Part:
    part[0].run_id = "other"
    return part


def bad_probe(part: Part) -> Part:
    part[0].probe.CopyFrom(weight_pb2.LogprobProbe(token_ids=b"\0" * 8, logprobs=b"\0" * 8))
    return part


BEFORE_JOINING = (other_run, part_beyond, based_on_another, bad_probe)
TOGETHER = (missing_tensor, gap, doubled_slice)
"""Faults that show only when all parts are there: every part's call is told of them."""


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (wrong_digest, "BAD_DIGEST"),
        (flipped_payload, "BAD_DIGEST"),
        (not_a_number, "NON_FINITE"),
        (missing_tensor, "MISSING_TENSOR"),
        (gap, "MISSING_TENSOR"),
        (doubled_slice, "DOUBLED_TENSOR"),
        (doubled_in_one_part, "DOUBLED_TENSOR"),
        (other_dtype, "BAD_SHAPE"),
        (other_shape, "BAD_SHAPE"),
        (unknown_tensor, "UNKNOWN_TENSOR"),
        (path_as_name, "UNKNOWN_TENSOR"),
        (too_short, "BAD_PAYLOAD"),
        (too_long, "BAD_PAYLOAD"),
        (delta_without_base, "BAD_MANIFEST"),
        (other_run, "BAD_MANIFEST"),
        (part_beyond, "BAD_MANIFEST"),
        (bad_probe, "BAD_MANIFEST"),
        (based_on_another, "WRONG_BASE"),
    ],
)
async def test_a_wrong_part_is_refused_and_the_next_publication_succeeds(
    tmp_path: Path, spoil: object, reason: str
) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        await asyncio.gather(*(rig.publish_part(*part) for part in halves(step=9)))
        upper, lower = halves()
        joined = spoil not in BEFORE_JOINING
        good = asyncio.create_task(rig.publish_part(*lower, timeout=10 if joined else 0.5))
        await asyncio.sleep(0.05)
        assert await reason_of(rig.publish_part(*spoil(upper))) == reason
        (other,) = await reasons_of(good)
        expected = "PUBLICATION_DISCARDED" if joined else "DEADLINE_EXCEEDED"
        assert other == (reason if spoil in TOGETHER else expected)
        assert await reasons_of(*(rig.publish_part(*part) for part in halves())) == ["2", "2"]


def cut_plane(header: weight_pb2.PartHeader, payload: bytes) -> Part:
    piece = header.slices[0]
    planes = [int(size) for size in piece.plane_bytes]
    planes[0] -= 1
    piece.plane_bytes[:], piece.num_bytes = planes, piece.num_bytes - 1
    return header, payload[1:]


def more_changes(header: weight_pb2.PartHeader, payload: bytes) -> Part:
    header.slices[0].num_changed += 1
    return header, payload


def of_another_base(header: weight_pb2.PartHeader, payload: bytes) -> Part:
    other = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    return make_part(moved(other), 1, base=other, base_version=1)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut_plane, "BAD_PAYLOAD"),
        (more_changes, "BAD_PAYLOAD"),
        (of_another_base, "BAD_DIGEST"),
    ],
)
async def test_a_delta_that_does_not_apply_leaves_the_newest_version_as_it_was(
    tmp_path: Path, spoil: object, reason: str
) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        await rig.publish_part(*make_part(WEIGHTS))
        part = make_part(moved(WEIGHTS), 1, base=WEIGHTS, base_version=1)
        assert await reason_of(rig.publish_part(*spoil(*part))) == reason
        assert await fetch(rig.weights) == tensors_of(WEIGHTS)
        part = make_part(moved(WEIGHTS), 1, base=WEIGHTS, base_version=1)
        assert await rig.publish_part(*part) == 2


async def test_a_header_that_was_changed_on_the_way_is_refused(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        header, _ = make_part(WEIGHTS)
        header.step += 1  # no digest of values covers it
        call = rig.weights.PublishWeights(timeout=5)
        await call.write(weight_pb2.PublishWeightsRequest(header=header))
        assert await reason_of(call) == "BAD_MANIFEST"


async def test_bfloat16_infinity_is_found(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        for bits, reason in [(0x7F7F, None), (0x7F80, "NON_FINITE"), (0xFFC1, "NON_FINITE")]:
            header, _ = make_part({"w": np.ones(3, np.float32)}, step=bits)
            payload = np.array([0x3F80, bits, 0], "<u2").tobytes()
            header.slices[0].dtype, header.slices[0].num_bytes = "BF16", 6
            header.slices[0].digest = digest_of(np.frombuffer(payload, np.uint8))
            call = rig.publish_part(header, payload)
            if reason:
                assert await reason_of(call) == reason
            else:
                assert await call == 1


async def test_parts_of_another_publication_conflict(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        upper, lower = halves()
        waiting = asyncio.create_task(rig.publish_part(*upper))
        await asyncio.sleep(0.05)
        assert await reason_of(rig.publish_part(*upper)) == "PART_CONFLICT"
        assert await reason_of(rig.publish_part(*halves(step=1)[1])) == "PART_CONFLICT"
        assert await rig.publish_part(*lower) == await waiting


async def test_a_newer_trainer_takes_over_and_fences_the_older(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        waiting = asyncio.create_task(rig.publish_part(*halves(epoch=1)[0]))
        await asyncio.sleep(0.05)
        assert await rig.train() == 2
        upper, lower = (rig.publish_part(*part) for part in halves(epoch=2))
        first = asyncio.create_task(upper)
        assert await reason_of(waiting) == "PUBLICATION_DISCARDED"
        assert await reason_of(rig.publish_part(*halves(epoch=1)[0])) == "OLD_EPOCH"
        assert [await lower, await first] == [1, 1]
        assert await reason_of(rig.publish_part(*halves(epoch=1)[0])) == "OLD_EPOCH"


async def test_an_epoch_that_was_followed_by_another_gets_no_number(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        await rig.train()
        assert await reason_of(rig.publish_part(*make_part(WEIGHTS, epoch=1))) == "OLD_EPOCH"
        assert rig.intake.state.steps_behind == []


async def test_a_restored_trainer_publishes_old_content_as_a_new_version(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        await rig.publish_part(*make_part(WEIGHTS))
        old = await fetch(rig.weights)
        new = moved(WEIGHTS)
        await rig.publish_part(*make_part(new, 1, base=WEIGHTS, base_version=1))
        assert await fetch(rig.weights) != old
        await rig.train()
        again = [rig.publish_part(*part) for part in halves(step=0, epoch=2)]
        assert await reasons_of(*again) == ["3", "3"]
        assert await fetch(rig.weights) == old
    async with running(make_config(tmp_path), version=False) as rig:
        part = make_part(WEIGHTS, epoch=rig.epoch)
        assert await rig.publish_part(*part) == 4  # never used before


async def test_a_part_that_never_comes_discards_the_publication(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        upper, lower = halves()
        patient = asyncio.create_task(rig.publish_part(*upper, timeout=0.3))
        assert await reason_of(patient) == "DEADLINE_EXCEEDED"
        await asyncio.sleep(0.05)
        late = asyncio.create_task(rig.publish_part(*lower))
        await asyncio.sleep(0.05)
        assert rig.server.weights.store.newest_version == 0
        assert await rig.publish_part(*upper) == await late == 1


async def test_the_deadline_of_one_part_aborts_the_others(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        parts = [make_part(WEIGHTS, part=index, num_parts=3) for index in range(2)]
        calls = (rig.publish_part(*parts[0], timeout=0.3), rig.publish_part(*parts[1]))
        assert await reasons_of(*calls) == ["DEADLINE_EXCEEDED", "PUBLICATION_DISCARDED"]


async def test_a_call_that_is_cancelled_in_its_payload_discards_the_publication(
    tmp_path: Path,
) -> None:
    big = {"w": np.ones((1024, 1024), np.float32)}
    async with running(make_config(tmp_path), version=False) as rig:
        header, payload = make_part(big, num_parts=2, rows=slice(0, 512))
        call = rig.weights.PublishWeights(timeout=10)
        await call.write(weight_pb2.PublishWeightsRequest(header=header))
        await call.write(weight_pb2.PublishWeightsRequest(chunk=payload[: 2**20]))
        lower = make_part(big, part=1, num_parts=2, rows=slice(512, None))
        waiting = asyncio.create_task(rig.publish_part(*lower))
        await asyncio.sleep(0.05)
        call.cancel()
        assert await reasons_of(waiting) == ["PUBLICATION_DISCARDED"]
        calls = (rig.publish_part(header, payload), rig.publish_part(*lower))
        assert await reasons_of(*calls) == ["1", "1"]


async def test_a_part_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        for num_elements in (2**44, 2**61):
            piece = weight_pb2.TensorSlice(
                name="w",
                dtype="F32",
                shape=[num_elements],
                num_elements=num_elements,
                encoding=DENSE,
                num_bytes=4 * num_elements,
                digest=bytes(32),
            )
            header = weight_pb2.PartHeader(run_id="run", epoch=1, num_parts=1, slices=[piece])
            assert await reason_of(rig.publish_part(header, b"")) == "BAD_MANIFEST"


async def test_a_fetch_resumes_at_any_byte_of_any_link(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    big = {"w": rng.normal(size=(600, 1024)).astype(np.float32)}
    async with running(make_config(tmp_path), version=False) as rig:
        parts = [
            make_part(big, part=index, num_parts=2, rows=rows)
            for index, rows in enumerate((slice(0, 400), slice(400, None)))
        ]
        await asyncio.gather(*(rig.publish_part(*part) for part in parts))
        await rig.publish_part(*make_part(moved(big), 1, base=big, base_version=1))
        full, delta = await fetch_links(rig.weights)
        assert len(full[1]) == big["w"].nbytes
        for offset in (1, 2**20 - 1, 400 * 4096, 400 * 4096 + 5, len(full[1])):
            again = await fetch_links(rig.weights, resume=1, offset=offset)
            assert again == [(full[0], full[1][offset:]), delta]
        again = await fetch_links(rig.weights, base=1, resume=2, offset=3)
        assert again == [(delta[0], delta[1][3:])]
        beyond = fetch_links(rig.weights, resume=1, offset=len(full[1]) + 1)
        assert await reason_of(beyond) == "BAD_REQUEST"
        assert await reason_of(fetch_links(rig.weights, offset=1)) == "BAD_REQUEST"
        assert await reason_of(fetch_links(rig.weights, target=3)) == "UNKNOWN_VERSION"
        assert await fetch_links(rig.weights, base=2) == []


async def test_a_full_copy_is_readable_while_it_is_fetched(tmp_path: Path) -> None:
    big = {"w": np.random.default_rng(0).normal(size=(4096, 1024)).astype(np.float32)}
    async with running(make_config(tmp_path), version=False) as rig:
        assert await reason_of(fetch_links(rig.weights)) == "UNKNOWN_VERSION"
        await rig.publish_part(*make_part(big))
        slow = rig.weights.FetchWeights(weight_pb2.FetchWeightsRequest(), timeout=10)
        await slow.read()
        await rig.publish_part(*make_part(big, step=1))
        folder = rig.intake.config.run.path / "weights"
        assert [path.name for path in folder.glob("full-*")] == ["full-00000002.weights"]
        received = bytearray()
        while (response := await slow.read()) is not grpc.aio.EOF:
            received += response.chunk
        assert received == big["w"].tobytes()
        assert await reason_of(fetch_links(rig.weights, target=1)) == "UNKNOWN_VERSION"


async def test_a_watch_gives_the_newest(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        await rig.publish(0)
        await rig.publish(1)
        request = weight_pb2.WatchVersionsRequest(replica_id="r")
        watch = rig.weights.WatchVersions(request)
        first = await watch.read()
        assert (first.version, first.step, first.run_id) == (2, 1, "run")
        assert first.bundle_digest == rig.server.weights.bundle.digest
        await rig.publish(2)
        assert (await watch.read()).version == 3
        await rig.server.weights.store.close()
        assert await reason_of(watch.read()) == "DRAINING"


async def test_a_slow_watcher_misses_what_lies_between(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        watch = rig.server.weights.store.watch()
        assert (await anext(watch)).version == 1
        for step in range(1, 4):
            await rig.publish(step)
        assert (await anext(watch)).version == 4
        await watch.aclose()


async def test_the_bundle_has_plain_files_without_weights(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        channel = open_channel(f"127.0.0.1:{rig.server._server.port}", NetworkConfig())
        folder = tmp_path / "fetched"
        folder.mkdir()
        digest = await fetch_model_bundle(channel, folder)
        await channel.close()
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["chat_template.jinja", "config.json", "tokenizer.json"]
        assert digest == rig.server.weights.bundle.digest
        assert (folder / "config.json").read_text() == "{} config.json"


async def slow_issue(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Have the log's flush wait for an event."""
    flush, may_flush = rig.intake.log.flush, asyncio.Event()

    async def slow_flush() -> None:
        await may_flush.wait()
        await flush()

    monkeypatch.setattr(rig.intake.log, "flush", slow_flush)
    return may_flush


async def test_a_call_that_is_cancelled_while_its_version_is_issued_does_not_stop_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        may_flush = await slow_issue(rig, monkeypatch)
        part = make_part(WEIGHTS, epoch=rig.epoch)
        assert await reason_of(rig.publish_part(*part, timeout=0.3)) == "DEADLINE_EXCEEDED"
        again = asyncio.create_task(rig.publish_part(*part))
        await asyncio.sleep(0.05)
        assert not again.done()  # it waits for what is under way
        may_flush.set()
        assert await again == 1
        assert rig.intake.state.steps_behind == [0]
        assert await fetch(rig.weights) == tensors_of(WEIGHTS)
    assert audit_run(rig.intake.config.run.path).passed


async def test_a_version_is_in_the_log_before_anybody_can_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        may_flush = await slow_issue(rig, monkeypatch)
        publishing = asyncio.create_task(rig.publish_part(*make_part(WEIGHTS)))
        await asyncio.sleep(0.1)
        assert await reason_of(fetch_links(rig.weights)) == "UNKNOWN_VERSION"
        assert list((rig.intake.config.run.path / "weights").glob("*.weights")) == []
        may_flush.set()
        assert await publishing == 1
