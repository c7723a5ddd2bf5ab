"""The audit itself: one pass over the log, all accounts side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from learner.audit.batches import Batches
from learner.audit.checkpoints import check_manifests, read_manifests
from learner.audit.entries import Entries, Item
from learner.audit.evaluations import Evaluations
from learner.audit.origins import Origins
from learner.audit.payloads import Payloads
from learner.audit.report import AuditReport
from learner.audit.samples import Samples
from learner.audit.seals import Seals
from learner.audit.trainers import Trainers
from learner.audit.violations import Place, Rule, Violations
from learner.log.walk import Findings


def audit_run(run: Path) -> AuditReport:
    """Audit a run's folder. Never writes; an intake may be writing meanwhile.

    Raises:
        ConfigError: the folder has no log.
        UnderstudyError: a file cannot be read.
    """
    return Audit(run).run()


class Audit:
    """All accounts of one log.

    Args:
        run: the run's folder.

    Raises:
        ConfigError: it has no log.
    """

    def __init__(self, run: Path) -> None:
        self.entries = Entries(run)
        self.violations = Violations()
        self.samples = Samples(self.violations)
        self.batches = Batches(self.samples, self.violations)
        self.trainers = Trainers(self.batches, self.violations)
        self.evaluations = Evaluations(self.samples, self.trainers, self.violations)
        self.origins = Origins(self.samples, self.violations)
        self.payloads = Payloads(self.samples, self.violations)
        self.seals = Seals(self.violations)
        self.last_index = -1
        """The last entry's."""
        self._run = run
        self._handlers: dict[str, tuple[Callable[[Any], None], ...]] = {
            "intake_started": (self.origins.on_intake_started,),
            "trainer_started": (self.trainers.on_trainer_started,),
            "version_published": (self.trainers.on_version_published,),
            "group_issued": (self.samples.on_group_issued,),
            "evaluation_issued": (self.evaluations.on_evaluation_issued,),
            "sample_leased": (self.samples.on_sample_leased,),
            "sample_returned": (self.samples.on_sample_returned,),
            "trajectory_stored": (
                self.trainers.on_trajectory_stored,
                self.evaluations.on_trajectory_stored,
                self.origins.on_trajectory_stored,
                self.samples.on_trajectory_stored,
            ),
            "record_answered": (self.origins.on_record_answered,),
            "sample_dropped": (self.samples.on_sample_dropped,),
            "batch_assigned": (self.trainers.on_batch_assigned, self.batches.on_batch_assigned),
            "step_completed": (self.trainers.on_step_completed,),
            "checkpoint_saved": (self.trainers.on_checkpoint_saved,),
        }

    def run(self) -> AuditReport:
        """Go through the log, once."""
        manifests = read_manifests(self._run)
        for item in self.entries:
            self._take(item)
        findings = self.entries.findings
        self.payloads.finish(self.trainers.oldest_kept_step)
        num_checkpoints = check_manifests(manifests, self.batches.digests, self.violations)
        self._add_damage(findings)
        return self._report(findings, num_checkpoints)

    def _take(self, item: Item) -> None:
        entry = item.entry
        self.violations.place = item.place
        self.last_index = entry.index
        self.seals.take(item)
        event = entry.WhichOneof("event") or ""
        if event in self._handlers:
            self.origins.require_intake(event)
        elif event not in ("segment_opened", "segment_sealed"):
            self.violations.add(Rule.DAMAGE, "an entry of no event that is known")
        if event == "trajectory_stored":
            self.payloads.on_trajectory_stored(
                entry.trajectory_stored, item.payload, entry.trimmed_bytes
            )
        for handler in self._handlers.get(event, ()):
            handler(getattr(entry, event))

    def _add_damage(self, findings: Findings) -> None:
        for bad in findings.bad_ranges:
            self.violations.place = Place(-1, bad.segment, bad.offset)
            self.violations.add(Rule.DAMAGE, f"{bad.num_bytes} bytes are no entry")
        self.violations.place = None
        if findings.num_missing:
            what = f"{findings.num_missing} entries are missing: acked records may be among them"
            self.violations.add(Rule.DAMAGE, what)

    def _report(self, findings: Findings, num_checkpoints: int) -> AuditReport:
        batches, trainers, origins = self.batches, self.trainers, self.origins
        return AuditReport(
            run_id=self.seals.run_id,
            issued=len(self.samples.states),
            states=self.samples.count(),
            dropped=self.samples.count_dropped(),
            trained_twice=batches.num_twice + trainers.num_twice,
            records=origins.num_answered,
            duplicates=origins.num_duplicates,
            conflicts=origins.num_conflicts,
            conflicting=tuple(origins.conflicts),
            gaps=origins.num_missing,
            verified_payloads=self.payloads.num_verified,
            trimmed_payloads=self.payloads.num_trimmed,
            entries=findings.num_entries,
            segments=self.seals.num_segments,
            log_bytes=findings.num_bytes,
            torn_bytes=findings.torn_bytes,
            quarantined_ranges=len(findings.bad_ranges),
            quarantined_bytes=sum(bad.num_bytes for bad in findings.bad_ranges),
            missing_entries=findings.num_missing,
            steps_assigned=batches.next_step,
            steps_completed=trainers.num_completed,
            groups=batches.num_groups,
            uniform_groups=batches.num_uniform,
            versions=trainers.num_versions,
            evaluations=len(self.evaluations.issued),
            intake_epoch=origins.intake_epoch,
            trainer_epoch=trainers.epoch,
            checkpoints=num_checkpoints,
            ledger_digest=batches.digests[batches.next_step].hex(),
            num_violations=self.violations.number,
            violations=tuple(self.violations.listed),
        )
