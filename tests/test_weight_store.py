"""The weight store through real streams: whole and verified, or not at all."""

import asyncio
import hashlib
import json
from pathlib import Path

import grpc
import numpy as np
import pytest

from intake_rig import Rig, make_config, make_part, running
from learner.audit import audit_run
from understudy.client import fetch_model_bundle
from understudy.config import NetworkConfig
from understudy.rpc import error_reason, open_channel
from understudy.v1 import weight_pb2

RNG = np.random.default_rng(0)
WEIGHTS = {
    "model.embed.weight": RNG.normal(size=(6, 4)).astype(np.float32),
    "model.norm.weight": RNG.normal(size=(4,)).astype(np.float32),
}
UPPER, LOWER = slice(0, 2), slice(2, None)
Part = tuple[weight_pb2.PartHeader, bytes]


def halves(step: int = 0, epoch: int = 1) -> tuple[Part, Part]:
    upper = make_part(WEIGHTS, step, part=0, num_parts=2, epoch=epoch, rows=UPPER)
    lower = make_part(WEIGHTS, step, part=1, num_parts=2, epoch=epoch, rows=LOWER)
    return upper, lower


async def reason_of(call: object) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error_reason(error.value)


async def reasons_of(*calls: object) -> list[str]:
    results = await asyncio.gather(*calls, return_exceptions=True)
    return [error_reason(r) if isinstance(r, grpc.RpcError) else str(r) for r in results]


async def fetch(
    rig: Rig, target: int = 0, offset: int = 0
) -> tuple[weight_pb2.WeightManifest, bytes]:
    request = weight_pb2.FetchWeightsRequest(target_version=target, offset=offset)
    responses = [r async for r in rig.weights.FetchWeights(request, timeout=5)]
    assert all(len(response.chunk) <= 2**20 for response in responses)
    return responses[0].manifest, b"".join(response.chunk for response in responses[1:])


def tensors_of(manifest: weight_pb2.WeightManifest, payload: bytes) -> dict[str, np.ndarray]:
    tensors, offset = {}, 0
    for piece in manifest.slices:
        data = payload[offset : offset + piece.num_bytes]
        assert hashlib.sha256(data).digest() == piece.digest
        tensor = tensors.setdefault(piece.name, np.full(np.prod(piece.shape), np.nan, "<f4"))
        tensor[piece.start : piece.start + piece.num_elements] = np.frombuffer(data, "<f4")
        offset += piece.num_bytes
    assert offset == len(payload)
    return tensors


async def test_two_parts_commit_one_version(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        upper, lower = halves()
        upper[0].probe.CopyFrom(weight_pb2.LogprobProbe(token_ids=b"\0" * 8, logprobs=b"\0" * 4))
        first = asyncio.create_task(rig.publish_part(*upper))
        await asyncio.sleep(0.05)
        assert not first.done()
        assert await rig.publish_part(*lower) == await first == 1
        manifest, payload = await fetch(rig)
        assert (manifest.version, manifest.base_version, manifest.epoch) == (1, 0, 1)
        assert manifest.payload_bytes == len(payload)
        assert len(manifest.probe.token_ids) == 8
        for name, tensor in tensors_of(manifest, payload).items():
            np.testing.assert_array_equal(tensor, WEIGHTS[name].ravel())
        assert rig.intake.state.admission.version == 1


async def test_a_step_published_again_is_a_new_version(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        assert [await rig.publish(step) for step in (0, 1, 1)] == [1, 2, 3]
        lines = (rig.intake.config.run.path / "metrics.jsonl").read_text().splitlines()
        versions = [json.loads(line) for line in lines]
        assert [(line["kind"], line["version"], line["step"]) for line in versions] == [
            ("version", 1, 0),
            ("version", 2, 1),
            ("version", 3, 1),
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


def based(part: Part) -> Part:
    part[0].base_version = 1
    return part


def sparse(part: Part) -> Part:
    part[0].slices[0].encoding = weight_pb2.TENSOR_ENCODING_UNSPECIFIED
    return part


def other_run(part: Part) -> Part:
    part[0].run_id = "other"
    return part


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (wrong_digest, "BAD_DIGEST"),
        (flipped_payload, "BAD_DIGEST"),
        (not_a_number, "NON_FINITE"),
        (missing_tensor, "MISSING_TENSOR"),
        (gap, "MISSING_TENSOR"),
        (doubled_slice, "BAD_MANIFEST"),
        (other_dtype, "BAD_MANIFEST"),
        (other_shape, "BAD_MANIFEST"),
        (unknown_tensor, "BAD_MANIFEST"),
        (path_as_name, "BAD_MANIFEST"),
        (too_short, "BAD_MANIFEST"),
        (too_long, "BAD_MANIFEST"),
        (sparse, "BAD_MANIFEST"),
        (other_run, "BAD_MANIFEST"),
        (part_beyond, "BAD_MANIFEST"),
        (based, "WRONG_BASE"),
    ],
)
async def test_a_wrong_part_is_refused_and_the_next_publication_succeeds(
    tmp_path: Path, spoil: object, reason: str
) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        await asyncio.gather(*(rig.publish_part(*part) for part in halves()))
        upper, lower = halves()
        joined = spoil not in (sparse, other_run, part_beyond, based)
        good = asyncio.create_task(rig.publish_part(*lower, timeout=10 if joined else 0.5))
        await asyncio.sleep(0.05)
        assert await reason_of(rig.publish_part(*spoil(upper))) == reason
        (other,) = await reasons_of(good)
        assert other == ("PUBLICATION_DISCARDED" if joined else "DEADLINE_EXCEEDED")
        assert await reasons_of(*(rig.publish_part(*part) for part in halves())) == ["2", "2"]


async def test_bfloat16_infinity_is_found(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        for bits, reason in [(0x7F7F, None), (0x7F80, "NON_FINITE"), (0xFFC1, "NON_FINITE")]:
            header, _ = make_part({"w": np.ones(3, np.float32)})
            payload = np.array([0x3F80, bits, 0], "<u2").tobytes()
            header.slices[0].dtype, header.slices[0].num_bytes = "BF16", 6
            header.slices[0].digest = hashlib.sha256(payload).digest()
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


async def test_a_newer_trainer_fences_the_older(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        waiting = asyncio.create_task(rig.publish_part(*halves(epoch=1)[0]))
        await asyncio.sleep(0.05)
        assert await rig.train() == 2
        newer = [rig.publish_part(*part) for part in halves(epoch=2)]
        assert await reasons_of(*newer) == ["1", "1"]
        assert await reason_of(waiting) == "PUBLICATION_DISCARDED"
        assert await reason_of(rig.publish_part(*halves(epoch=1)[0])) == "OLD_EPOCH"


async def test_a_restored_trainer_publishes_its_state_as_a_new_version(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        later = [rig.publish_part(*part) for part in halves(step=1)]
        assert await reasons_of(*later) == ["1", "1"]
        await rig.train()
        again = [rig.publish_part(*part) for part in halves(step=0, epoch=2)]
        assert await reasons_of(*again) == ["2", "2"]
        assert await reason_of(rig.publish_part(*halves(epoch=1)[0])) == "OLD_EPOCH"
    async with running(make_config(tmp_path)) as rig:
        assert rig.intake.state.admission.version == 3  # never used before


async def test_a_part_that_never_comes_discards_the_publication(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        upper, lower = halves()
        patient = asyncio.create_task(rig.publish_part(*upper, timeout=0.3))
        assert await reason_of(patient) == "DEADLINE_EXCEEDED"
        await asyncio.sleep(0.05)
        late = asyncio.create_task(rig.publish_part(*lower))
        await asyncio.sleep(0.05)
        assert rig.server.weights.newest_version == 0
        assert await rig.publish_part(*upper) == await late == 1


async def test_the_deadline_of_one_part_aborts_the_others(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        parts = [make_part(WEIGHTS, part=index, num_parts=3) for index in range(2)]
        calls = (rig.publish_part(*parts[0], timeout=0.3), rig.publish_part(*parts[1]))
        assert await reasons_of(*calls) == ["DEADLINE_EXCEEDED", "PUBLICATION_DISCARDED"]


async def test_a_fetch_resumes_at_any_byte(tmp_path: Path) -> None:
    big = {"w": RNG.normal(size=(600, 1024)).astype(np.float32)}
    async with running(make_config(tmp_path), version=False) as rig:
        parts = [
            make_part(big, part=index, num_parts=2, rows=rows)
            for index, rows in enumerate((slice(0, 400), slice(400, None)))
        ]
        await asyncio.gather(*(rig.publish_part(*part) for part in parts))
        manifest, whole = await fetch(rig)
        assert len(whole) == big["w"].nbytes
        for offset in (1, 2**20 - 1, 400 * 4096, 400 * 4096 + 5, len(whole)):
            again, rest = await fetch(rig, target=1, offset=offset)
            assert again == manifest
            assert rest == whole[offset:]
        assert await reason_of(fetch(rig, offset=len(whole) + 1)) == "BAD_REQUEST"
        assert await reason_of(fetch(rig, target=2)) == "UNKNOWN_VERSION"


async def test_a_version_is_kept_while_it_is_fetched(tmp_path: Path) -> None:
    big = {"w": RNG.normal(size=(4096, 1024)).astype(np.float32)}
    async with running(make_config(tmp_path), version=False) as rig:
        assert await reason_of(fetch(rig)) == "UNKNOWN_VERSION"
        await rig.publish_part(*make_part(big))
        request = weight_pb2.FetchWeightsRequest(target_version=1)
        slow = rig.weights.FetchWeights(request, timeout=10)
        await slow.read()
        await rig.publish_part(*make_part(big, step=1))
        await fetch(rig, target=1, offset=big["w"].nbytes)
        received = 0
        while (response := await slow.read()) is not grpc.aio.EOF:
            received += len(response.chunk)
        assert received == big["w"].nbytes
        await asyncio.sleep(0.05)
        assert await reason_of(fetch(rig, target=1)) == "UNKNOWN_VERSION"


async def test_a_watch_gives_the_newest(tmp_path: Path) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        await rig.publish(0)
        await rig.publish(1)
        request = weight_pb2.WatchVersionsRequest(replica_id="r")
        watch = rig.weights.WatchVersions(request)
        first = await watch.read()
        assert (first.version, first.step, first.run_id) == (2, 1, "run")
        assert first.bundle_digest == rig.server.bundle.digest
        await rig.publish(2)
        assert (await watch.read()).version == 3
        await rig.server.weights.close()
        assert await reason_of(watch.read()) == "DRAINING"


async def test_a_slow_watcher_misses_what_lies_between(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        watch = rig.server.weights.watch()
        assert (await anext(watch)).version == 1
        for step in range(3):
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
        assert digest == rig.server.bundle.digest
        assert (folder / "config.json").read_text() == "{} config.json"


async def test_replica_reports_are_journaled(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        report = weight_pb2.ReportReplicaRequest(
            replica_id="r0", version=1, mismatch_mean=0.01, pause_seconds=0.2
        )
        await rig.weights.ReportReplica(report, timeout=5)
        path = rig.intake.config.run.path / "metrics.jsonl"
        line = json.loads(path.read_text().splitlines()[-1])
        assert (line["kind"], line["replica_id"], line["version"]) == ("replica", "r0", 1)
        assert line["mismatch_mean"] == 0.01
        assert rig.server.figures()["lowest_replica_version"] == 1
        report.replica_id = "r" * 65
        assert await reason_of(rig.weights.ReportReplica(report, timeout=5)) == "BAD_REQUEST"


async def test_a_replica_whose_watch_ended_is_forgotten(tmp_path: Path) -> None:
    async with running(make_config(tmp_path)) as rig:
        for name in ("dies", "lives"):
            watch = rig.weights.WatchVersions(weight_pb2.WatchVersionsRequest(replica_id=name))
            await watch.read()
            report = weight_pb2.ReportReplicaRequest(replica_id=name, version=len(name))
            await rig.weights.ReportReplica(report, timeout=5)
            if name == "dies":
                watch.cancel()
        async with asyncio.timeout(5):
            while rig.server.figures()["replicas"] != 1:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        assert rig.server.figures()["lowest_replica_version"] == len("lives")


async def test_a_publication_that_is_cancelled_while_it_is_issued_uses_up_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(make_config(tmp_path), version=False) as rig:
        flush, may_flush = rig.intake.log.flush, asyncio.Event()

        async def slow_flush() -> None:
            await may_flush.wait()
            await flush()

        monkeypatch.setattr(rig.intake.log, "flush", slow_flush)
        header, payload = make_part({"w": np.ones(4, np.float32)}, epoch=rig.epoch)
        with pytest.raises(grpc.aio.AioRpcError):
            await rig.publish_part(header, payload, timeout=0.3)
        may_flush.set()
        assert await rig.publish(0) == 2
        assert rig.intake.state.steps_behind == [0, 0]
        assert (await fetch(rig))[0].version == 2
    assert audit_run(rig.intake.config.run.path).passed
