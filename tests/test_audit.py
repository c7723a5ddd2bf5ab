"""The audit: passes what the intake really writes, and finds every rule broken by hand."""

import asyncio
import dataclasses
import hashlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from audit_story import (
    CONFLICT,
    DUPLICATE,
    FAILED,
    MIXED,
    UNIFORM,
    answer,
    assign,
    checkpoint,
    complete,
    drop,
    give_back,
    healthy,
    intake,
    issue,
    lease,
    store,
    trainer,
    version,
    write,
)
from conftest import ROOT
from intake_rig import make_config, make_record, running, trajectory
from learner.audit import AuditReport, Rule, audit_run
from learner.audit.cli import run_audit
from learner.intake.tasks import State
from learner.log.frames import Frame, encode_head, scan
from learner.log.retention import trim_segment
from learner.log.segments import segment_path
from log_helpers import LIMITS, cut, flip, open_log
from understudy.errors import ConfigError
from understudy.v1.log_pb2 import LogEntry


def found(report: AuditReport) -> set[Rule]:
    return {violation.rule for violation in report.violations}


async def test_a_healthy_log_passes(tmp_path: Path) -> None:
    report = audit_run(await write(tmp_path, list(healthy().values())))
    assert report.violations == ()
    assert report.passed
    assert (report.issued, report.dropped) == (
        10,
        {"uniform_group": 2, "stale": 1, "short_group": 1},
    )
    states = {"waiting": 1, "leased": 1, "stored": 0, "assigned": 0, "trained": 4, "dropped": 4}
    assert report.states == states
    assert (report.duplicates, report.conflicts, report.gaps, report.trained_twice) == (1, 1, 0, 0)
    assert (report.records, report.verified_payloads, report.trimmed_payloads) == (10, 6, 0)
    assert (report.steps_assigned, report.steps_completed, report.versions) == (2, 2, 4)
    assert (report.intake_epoch, report.trainer_epoch) == (2, 2)


async def test_a_trainer_that_starts_again_takes_steps_back(tmp_path: Path) -> None:
    story = healthy()
    names = list(story)
    report = audit_run(await write(tmp_path, [story[n] for n in names[: names.index("version4")]]))
    assert report.passed
    assert (report.states["assigned"], report.states["trained"]) == (2, 2)
    assert (report.steps_assigned, report.steps_completed) == (2, 1)


async def test_the_ledger_digest_chains_the_batches(tmp_path: Path) -> None:
    story = healthy()
    report = audit_run(await write(tmp_path, list(story.values())))
    digest = b""
    for name in ("assign0", "assign1"):
        written = story[name].batch_assigned.SerializeToString(deterministic=True)
        digest = hashlib.sha256(digest + written).digest()
    assert report.ledger_digest == digest.hex()


# One change to the healthy log each: what is put behind an entry, or in its place.


@dataclass(frozen=True)
class Change:
    rule: Rule
    after: str
    entries: tuple[LogEntry, ...] = ()
    instead: bool = False

    def apply(self) -> Iterator[LogEntry]:
        for name, entry in healthy().items():
            if name != self.after or not self.instead:
                yield entry
            if name == self.after:
                yield from self.entries


def behind(rule: Rule, after: str, *entries: LogEntry) -> Change:
    return Change(rule, after, entries)


def instead(rule: Rule, of: str, *entries: LogEntry) -> Change:
    return Change(rule, of, entries, instead=True)


def trimmed(entry: LogEntry) -> LogEntry:
    entry.trimmed_bytes = 100
    return entry


def other_digest(entry: LogEntry) -> LogEntry:
    entry.trajectory_stored.payload_digest = bytes(32)
    return entry


def other_version(entry: LogEntry) -> LogEntry:
    entry.trajectory_stored.summary.oldest_version = 9
    return entry


def short_rewards(entry: LogEntry) -> LogEntry:
    entry.batch_assigned.groups[0].rewards = bytes(4)
    return entry


def one_sample(entry: LogEntry) -> LogEntry:
    group = entry.batch_assigned.groups[0]
    group.sample_indices[:], group.rewards, group.uniform = [0], bytes(4), True
    return entry


BROKEN = {
    "group issued twice": behind(Rule.ISSUE, "issue1", issue(1)),
    "group left out": instead(Rule.ISSUE, "issue4", issue(5)),
    "leased while leased": behind(Rule.LEASE, "lease00", lease(0, 0, 2)),
    "leased once stored": behind(Rule.LEASE, "store00", lease(0, 0, 3)),
    "lease of nothing": behind(Rule.LEASE, "lease00", lease(9, 0, 2)),
    "sample index beyond the group": behind(Rule.LEASE, "lease00", lease(0, 2, 2)),
    "lease id reused": instead(Rule.LEASE, "lease21", lease(2, 1, 3)),
    "returned while waiting": behind(Rule.LEASE, "issue0", give_back(0, 0)),
    "returned once stored": behind(Rule.LEASE, "store00", give_back(0, 0)),
    "stored twice": behind(Rule.STORE, "failed10", store(0, 0, 0.0, sequence=4)),
    "stored once dropped": behind(
        Rule.STORE, "drop31", store(3, 1, 0.0, sequence=3, incarnation=2**32 + 1)
    ),
    "never issued but stored": instead(Rule.STORE, "store10", store(8, 0, 1.0, sequence=4)),
    "dropped twice": behind(Rule.DROP, "drop30", drop(3, 0)),
    "dropped once assigned": behind(Rule.DROP, "assign0", drop(0, 0)),
    "dropped once trained": behind(Rule.DROP, "complete0", drop(0, 0)),
    "dropped without a reason": instead(Rule.DROP, "drop30", drop(3, 0, "")),
    "doubled batch": behind(Rule.TWICE, "assign0", assign(0, 1, g0=MIXED, g1=UNIFORM)),
    "doubled step": behind(Rule.BATCH, "assign0", assign(0, 1)),
    "group in two batches": instead(Rule.TWICE, "assign1", assign(1, 2, g0=MIXED, g2=MIXED)),
    "uniform group in two batches": instead(
        Rule.TWICE, "assign1", assign(1, 2, g1=UNIFORM, g2=MIXED)
    ),
    "batch left out": instead(Rule.BATCH, "assign1", assign(2, 2, g2=MIXED)),
    "batch of a waiting sample": instead(Rule.BATCH, "store11"),
    "batch without a stored sample": instead(
        Rule.BATCH, "assign1", one_sample(assign(1, 2, g2=MIXED))
    ),
    "batch of a group never issued": instead(
        Rule.BATCH, "assign1", assign(1, 2, g2=MIXED, g7=MIXED)
    ),
    "wrongly uniform": instead(Rule.BATCH, "assign1", assign(1, 2, g2=([0.0, 1.0], True))),
    "wrongly not uniform": instead(
        Rule.BATCH, "assign0", assign(0, 1, g0=MIXED, g1=([1.0, 1.0], False))
    ),
    "other rewards": instead(Rule.BATCH, "assign1", assign(1, 2, g2=([0.0, 2.0], False))),
    "rewards cut off": instead(Rule.BATCH, "assign1", short_rewards(assign(1, 2, g2=MIXED))),
    "completed twice": behind(Rule.TWICE, "complete0", complete(0)),
    "completed out of order": instead(Rule.STEP, "complete0"),
    "completed but not assigned": behind(Rule.STEP, "complete0", complete(1)),
    "completed by an old epoch": instead(Rule.STEP, "complete1again", complete(1, epoch=1)),
    "trainer epoch reused": instead(Rule.TRAINER, "trainer2", trainer(1, 1)),
    "trainer beyond the last step": behind(Rule.TRAINER, "complete0", trainer(2, 2)),
    "trainer below the oldest checkpoint": behind(Rule.TRAINER, "checkpoint2", trainer(3, 0)),
    "version reused": instead(Rule.VERSION, "version3", version(2, 2)),
    "version left out": instead(Rule.VERSION, "version3", version(4, 2)),
    "version zero": instead(Rule.VERSION, "version1", version(0, 0)),
    "version of a trainer that never was": instead(Rule.VERSION, "version2", version(2, 1, 7)),
    "version of a step that never was": instead(Rule.VERSION, "version2", version(2, 5)),
    "head version of the future": instead(Rule.VERSION, "assign1", assign(1, 3, g2=MIXED)),
    "sampled by the future": instead(
        Rule.VERSION, "store00", other_version(store(0, 0, 0.0, sequence=0))
    ),
    "checkpoint ahead of the steps": behind(Rule.CHECKPOINT, "complete0", checkpoint(2, 0)),
    "checkpoint kept beyond itself": behind(Rule.CHECKPOINT, "complete0", checkpoint(1, 2)),
    "checkpoint of an old epoch": instead(Rule.CHECKPOINT, "checkpoint2", checkpoint(2, 1, 1)),
    "intake epoch reused": instead(Rule.INTAKE, "intake2", intake(1)),
    "no intake": instead(Rule.INTAKE, "intake1"),
    "incarnation outlives its intake": behind(
        Rule.INTAKE, "intake2", answer(0, 0, DUPLICATE, sequence=5)
    ),
    "incarnation of two actors": behind(
        Rule.INTAKE, "store11", answer(0, 0, DUPLICATE, sequence=1, incarnation=2)
    ),
    "sequence left out": instead(Rule.GAP, "duplicate01"),
    "first sequence left out": instead(
        Rule.GAP, "store20", store(2, 0, 0.0, sequence=1, incarnation=2**32 + 1)
    ),
    "answered twice": behind(Rule.ANSWER, "failed10", answer(1, 0, FAILED, sequence=3)),
    "duplicate of nothing": instead(Rule.ANSWER, "failed10", answer(1, 0, DUPLICATE, sequence=3)),
    "conflict with nothing": behind(Rule.ANSWER, "conflict", answer(0, 1, CONFLICT, sequence=9)),
    "no answer": instead(Rule.ANSWER, "failed10", answer(1, 0, 0, sequence=3)),
    "another payload": instead(
        Rule.DIGEST, "store21", other_digest(store(2, 1, 1.0, sequence=1, incarnation=2**32 + 1))
    ),
    "trimmed too early": instead(
        Rule.TRIM, "store21", trimmed(store(2, 1, 1.0, sequence=1, incarnation=2**32 + 1))
    ),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_rule_is_found(name: str, tmp_path: Path) -> None:
    change = BROKEN[name]
    report = audit_run(await write(tmp_path, list(change.apply())))
    assert not report.passed
    assert change.rule in found(report)
    assert all(violation.place is not None for violation in report.violations)


def test_every_rule_of_the_entries_is_broken_once() -> None:
    by_files = {Rule.DAMAGE, Rule.SEGMENT}
    assert {change.rule for change in BROKEN.values()} == set(Rule) - by_files


def test_the_documentation_has_every_rule() -> None:
    rows = re.findall(r"^\| ([a-z]+) \|", (ROOT / "docs" / "audit.md").read_text(), re.MULTILINE)
    assert rows[1 : 1 + len(Rule)] == [str(rule) for rule in Rule]


async def test_task_keys_that_are_trained_twice_are_counted(tmp_path: Path) -> None:
    for name in ("doubled batch", "completed twice"):
        entries = list(BROKEN[name].apply())
        report = audit_run(await write(tmp_path / name, entries))
        assert report.trained_twice == {"doubled batch": 4, "completed twice": 2}[name]


async def test_a_gap_is_counted(tmp_path: Path) -> None:
    report = audit_run(await write(tmp_path, list(BROKEN["sequence left out"].apply())))
    assert report.gaps == 1


async def test_payloads_may_be_trimmed_once_a_checkpoint_has_them(tmp_path: Path) -> None:
    story = healthy()
    for name in ("store00", "store10"):
        trimmed(story[name])
    report = audit_run(await write(tmp_path, list(story.values())))
    assert report.passed
    assert (report.trimmed_payloads, report.verified_payloads) == (2, 4)


# Damage to the files.


def zero(path: Path) -> None:
    """A sector that reads as zeros."""
    data = bytearray(path.read_bytes())
    data[600:1112] = bytes(512)
    path.write_bytes(data)


def unseal(path: Path) -> None:
    """The last entry of a sealed segment is gone."""
    data = path.read_bytes()
    cut(path, data.rfind(b"USL1"))


def relabel(path: Path) -> None:
    """A segment under a later number than its own."""
    path.rename(path.with_name(f"{int(path.stem) + 7:012d}.seg"))


DAMAGE: dict[str, tuple[int, Rule, Callable[[Path], None]]] = {
    "flipped byte of a payload": (2, Rule.DAMAGE, lambda path: flip(path, 700)),
    "flipped byte of a first entry": (2, Rule.DAMAGE, lambda path: flip(path, 20)),
    "flipped byte of a seal": (2, Rule.DAMAGE, lambda path: flip(path, -3)),
    "zeros": (2, Rule.DAMAGE, zero),
    "shortened segment": (2, Rule.DAMAGE, lambda path: cut(path, 300)),
    "missing segment": (2, Rule.DAMAGE, Path.unlink),
    "missing first segment": (1, Rule.DAMAGE, Path.unlink),
    "no seal": (2, Rule.SEGMENT, unseal),
    "renumbered segment": (3, Rule.SEGMENT, relabel),
    "empty segment": (2, Rule.DAMAGE, lambda path: cut(path, 0)),
}


@pytest.mark.parametrize("name", DAMAGE)
async def test_damage_is_found(name: str, tmp_path: Path) -> None:
    segment, rule, spoil = DAMAGE[name]
    run = await write(tmp_path, list(healthy().values()), segment_bytes=2500)
    assert len(list((run / "log").glob("*.seg"))) > 3
    assert audit_run(run).passed
    path = segment_path(run / "log", segment)
    if name == "flipped byte of a seal":
        flip(path, path.stat().st_size - 3)
    else:
        spoil(path)
    report = audit_run(run)
    assert not report.passed
    assert rule in found(report)


async def test_any_flipped_byte_of_a_sealed_segment_is_found(tmp_path: Path) -> None:
    run = await write(tmp_path, list(healthy().values()), segment_bytes=2500)
    path = segment_path(run / "log", 2)
    for offset in random.Random(0).sample(range(path.stat().st_size), 60):
        flip(path, offset)
        report = audit_run(run)
        assert not report.passed, offset
        assert report.quarantined_bytes, offset
        flip(path, offset)
    assert audit_run(run).passed


@pytest.mark.parametrize("tail", [b"USL1", b"\0" * 512, b"USL1" + bytes([200, 0, 0, 0] * 30)])
async def test_a_torn_tail_is_no_fault(tail: bytes, tmp_path: Path) -> None:
    run = await write(tmp_path, list(healthy().values()))
    path = segment_path(run / "log", 1)
    with path.open("ab") as file:
        file.write(tail)
    report = audit_run(run)
    assert report.passed
    assert report.torn_bytes == len(tail)


async def test_any_beginning_of_a_log_passes(tmp_path: Path) -> None:
    run = await write(tmp_path, list(healthy().values()))
    path = segment_path(run / "log", 1)
    for size in random.Random(1).sample(range(1, path.stat().st_size), 60)[::-1]:
        whole = path.read_bytes()
        cut(path, size)
        assert audit_run(run).passed, size
        path.write_bytes(whole)


async def test_a_segment_of_another_run_is_found(tmp_path: Path) -> None:
    run = await write(tmp_path / "a", list(healthy().values()), segment_bytes=2500)
    path = segment_path(run / "log", 2)
    data = path.read_bytes()
    opened = next(iter_entries(data))
    opened.segment_opened.run_id = "evil"
    path.write_bytes(encode_head(opened, b"") + data[data.index(b"USL1", 1) :])
    assert Rule.SEGMENT in found(audit_run(run))


def iter_entries(data: bytes) -> Iterator[LogEntry]:
    for frame in scan(data, lambda entry, num_bad_bytes: True):
        if isinstance(frame, Frame):
            yield frame.entry


async def test_an_event_that_is_not_known_is_found(tmp_path: Path) -> None:
    report = audit_run(await write(tmp_path, [*healthy().values(), LogEntry()]))
    assert found(report) == {Rule.DAMAGE}


async def test_a_violation_names_its_place(tmp_path: Path) -> None:
    run = await write(tmp_path, list(BROKEN["doubled step"].apply()))
    (violation,) = audit_run(run).violations
    assert violation.place
    with segment_path(run / "log", 1).open("rb") as file:
        file.seek(violation.place.offset)
        assert file.read(4) == b"USL1"
    assert str(violation) == (
        f"entry 17, segment 1, offset {violation.place.offset}: [batch] step 0, where 1 was next"
    )


# Checkpoints.


def save_manifest(run: Path, step: int, digest: str | None, damaged: bool = False) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    state = {} if digest is None else {"ledger_digest": digest}
    body = {"step": step, "state": state}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    seal = hashlib.sha256(text.encode() + b" " * damaged).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"manifest": body, "sha256": seal}))


async def test_checkpoints_have_to_agree_with_the_log(tmp_path: Path) -> None:
    run = await write(tmp_path, list(healthy().values()))
    digest = audit_run(run).ledger_digest
    save_manifest(run, 0, "")
    save_manifest(run, 1, None)  # of a version that did not say
    save_manifest(run, 2, digest)
    (run / "checkpoints" / "step-00000003.tmp").mkdir()
    report = audit_run(run)
    assert report.passed
    assert report.checkpoints == 2


@pytest.mark.parametrize(
    ("step", "digest", "damaged"), [(1, "00", False), (3, "00", False), (0, "", True)]
)
async def test_a_checkpoint_of_other_batches_is_found(
    step: int, digest: str, damaged: bool, tmp_path: Path
) -> None:
    run = await write(tmp_path, list(healthy().values()))
    save_manifest(run, step, digest, damaged)
    report = audit_run(run)
    assert found(report) == {Rule.CHECKPOINT}
    assert f"step-{step:08d}" in str(report)


async def test_the_trainers_manifests_are_read(tmp_path: Path) -> None:
    manifest = pytest.importorskip("learner.trainer.checkpoints.manifest")
    run = await write(tmp_path, list(healthy().values()))
    folder = run / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    state = manifest.TrainerState(
        num_updates=2, last_version=4, trainer_epoch=2, run="test", ledger_digest="00"
    )
    setup = manifest.Setup(
        architecture="a", dtype="float32", betas=(0.9, 0.95), parameters={}, weight_decay=0.0
    )
    whole = manifest.Manifest(step=2, world_size=1, state=state, setup=setup, files={})
    manifest.write_manifest(folder, whole)
    (violation,) = audit_run(run).violations
    assert "other batches" in violation.what


# The command.


async def test_the_command_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = await write(tmp_path / "good", list(healthy().values()))
    bad = await write(tmp_path / "bad", list(BROKEN["stored twice"].apply()))
    assert run_audit([str(good)]) == 0
    said = capsys.readouterr().out
    assert "run test: PASSED" in said
    assert "issued 10 = waiting 1 + leased 1 + stored 0 + assigned 0 + trained 4" in said
    assert "conflicts: 1\n    record 0 of 'a', incarnation 1 for task key (0, 1)" in said
    assert run_audit([str(bad), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    assert report["states"]["evaluated"] == 0
    assert report["violations"][0]["rule"] == "store"
    assert {"entry", "segment", "offset"} <= set(report["violations"][0])
    assert {field.name for field in dataclasses.fields(AuditReport)} <= set(report)


def test_a_folder_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no segments; name the folder of a run"):
        run_audit([str(tmp_path)])


def test_the_audit_imports_no_torch_and_writes_nothing(tmp_path: Path) -> None:
    run = asyncio.run(write(tmp_path, list(healthy().values())))
    save_manifest(run, 0, "")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code = (
        "import sys; from learner.audit.cli import run_audit\n"
        "code = run_audit(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'learner.intake.state', 'learner.intake'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


# What the intake really writes.


async def test_what_the_intake_writes_passes_and_balances_alike(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, steps=6, max_staleness=2, log={"segment_bytes": 3000, "retention": "checkpoint"}
    )
    for life in range(3):
        async with running(config) as rig:
            await live(rig, life)
            while_running = audit_run(config.run.path)
            assert while_running.violations == ()
            balance = rig.intake.balance()
            state = rig.intake.state
        report = audit_run(config.run.path)
        assert report.violations == ()
        assert report.issued == balance.issued
        assert report.states == {state.value: balance.states[state] for state in State}
        assert report.dropped == {
            reason: number for reason, number in balance.dropped.items() if number
        }
        assert report.ledger_digest == state.ledger_digests[-1].hex()
        assert report.versions == len(state.steps_behind)
        assert report.intake_epoch == life + 1
    assert report.duplicates > 0
    assert report.trimmed_payloads > 0


async def live(rig: Any, life: int) -> None:
    """One life of intake and trainer: two steps, then the trainer goes back by one."""
    step = rig.intake.state.num_completed
    await finish_step(rig, step)
    await rig.checkpoint(step + 1, oldest_kept_step=step)
    await finish_step(rig, step + 1)
    await rig.train(step + 1)
    await rig.publish(step + 1)
    await rig.batch(step + 1)
    await rig.complete(step + 1)
    if rig.intake._trimming:
        await rig.intake._trimming


async def finish_step(rig: Any, step: int) -> None:
    leases = await rig.lease(4)
    played = [make_record(lease, trajectory(lease, versions=(newest(rig),))) for lease in leases]
    if step % 2:  # one group without any difference
        played[0] = make_record(
            leases[0], trajectory(leases[0], reward=1.0, versions=(newest(rig),))
        )
    await rig.push(*played, played[0])
    await rig.batch(step)
    await rig.publish(step + 1)
    await rig.complete(step)


def newest(rig: Any) -> int:
    return int(rig.intake.state.admission.version)


async def test_what_retention_rewrites_passes(tmp_path: Path) -> None:
    run = await write(tmp_path, list(healthy().values()), segment_bytes=2500)
    log = await open_log(run / "log", replace(LIMITS, segment_bytes=2500))
    assert await trim_segment(log, 1, lambda entry: entry.trajectory_stored.task_key.ordinal < 2)
    await log.close()
    report = audit_run(run)
    assert report.violations == ()
    assert report.trimmed_payloads > 0
