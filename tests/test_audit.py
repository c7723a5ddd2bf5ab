"""The audit: passes what the intake really writes, and finds every rule broken by hand."""

import asyncio
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audit_rules import BROKEN, found, trimmed
from audit_story import MIXED, UNIFORM, assign, healthy, write
from conftest import ROOT
from intake_rig import make_config, make_record, running, trajectory
from learner.audit import AuditReport, Rule, audit_run
from learner.audit.cli import run_audit
from learner.intake.tasks import State
from learner.log.retention import trim_segment
from log_helpers import LIMITS, open_log
from understudy.errors import ConfigError


async def test_a_healthy_log_passes(tmp_path: Path) -> None:
    report = audit_run(await write(tmp_path, list(healthy().values())))
    assert report.violations == ()
    assert report.passed
    assert (report.issued, report.dropped) == (
        12,
        {"uniform_group": 2, "abandoned": 1, "stale": 1, "short_group": 1},
    )
    assert report.states == {
        **{"waiting": 1, "leased": 1, "stored": 0, "assigned": 0},
        **{"trained": 4, "evaluated": 1, "dropped": 5},
    }
    assert (report.groups, report.uniform_groups, report.evaluations) == (3, 1, 1)
    assert (report.duplicates, report.conflicts, report.gaps, report.trained_twice) == (1, 1, 0, 0)
    assert (report.records, report.verified_payloads, report.trimmed_payloads) == (11, 7, 0)
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


async def test_uniform_groups_may_be_trained_and_lengths_may_cost(tmp_path: Path) -> None:
    story = healthy()
    story["assign0"] = assign(0, 1, keeps_uniform=True, g0=MIXED, g1=UNIFORM)
    costly = assign(1, 2, g2=([-0.25, 0.5], False))
    costly.batch_assigned.groups[0].penalties = np.array([0.25, 0.5], "<f4").tobytes()
    story["assign1"] = costly
    report = audit_run(await write(tmp_path, list(story.values())))
    assert report.violations == ()
    assert (report.states["trained"], report.uniform_groups) == (6, 1)
    assert "uniform_group" not in report.dropped


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
    for name in ("store00", "store10", "storeE0"):
        trimmed(story[name])
    report = audit_run(await write(tmp_path, list(story.values())))
    assert report.passed
    assert (report.trimmed_payloads, report.verified_payloads) == (3, 4)


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
        num_updates=2,
        num_failures=0,
        last_version=4,
        trainer_epoch=2,
        run="test",
        ledger_digest="00",
    )
    setup = manifest.Setup(
        architecture="a",
        dtype="float32",
        betas=(0.9, 0.95),
        weight_decay=0.0,
        parameters={},
        lora="",
        base="",
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
    assert "issued 12 = waiting 1 + leased 1 + stored 0 + assigned 0 + trained 4" in said
    assert "conflicts: 1\n    record 0 of 'a', incarnation 1 for task key (0, 1)" in said
    assert run_audit([str(bad), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    assert report["states"]["evaluated"] == 1
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
