"""Every rule of the audit of entries, broken by one change each to the healthy log."""

from collections.abc import Iterator
from dataclasses import dataclass

from audit_story import (
    CONFLICT,
    DUPLICATE,
    FAILED,
    HELDOUT,
    MIXED,
    UNIFORM,
    answer,
    assign,
    checkpoint,
    complete,
    drop,
    evaluate,
    give_back,
    healthy,
    intake,
    issue,
    lease,
    store,
    trainer,
    version,
)
from learner.audit import AuditReport, Rule
from understudy.v1.log_pb2 import LogEntry


def found(report: AuditReport) -> set[Rule]:
    return {violation.rule for violation in report.violations}


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


def penalties(entry: LogEntry, values: bytes) -> LogEntry:
    entry.batch_assigned.groups[0].penalties = values
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
    "penalties that no reward has": instead(
        Rule.BATCH, "assign1", penalties(assign(1, 2, g2=MIXED), b"\0\0\x80\x3f" * 2)
    ),
    "penalties cut off": instead(
        Rule.BATCH, "assign1", penalties(assign(1, 2, g2=MIXED), bytes(4))
    ),
    "evaluated sample in a batch": behind(Rule.BATCH, "dropE1", assign(1, 2, g4294967296=MIXED)),
    "evaluated twice": behind(
        Rule.STORE,
        "storeE0",
        store(HELDOUT, 0, 1.0, version=2, sequence=1, incarnation=2**32 + 2, actor="b"),
    ),
    "evaluated but never issued": instead(
        Rule.STORE,
        "storeE0",
        store(HELDOUT + 2, 0, 1.0, version=2, sequence=0, incarnation=2**32 + 2, actor="b"),
    ),
    "second sample of a held-out task": behind(Rule.LEASE, "evaluate1", lease(HELDOUT, 1, 3)),
    "evaluation left out": instead(Rule.EVALUATION, "evaluate1", evaluate(2, 2, 1)),
    "evaluation reused": behind(Rule.EVALUATION, "evaluate1", evaluate(1, 2, 1)),
    "evaluation of nothing": behind(Rule.EVALUATION, "evaluate1", evaluate(2, 2, 1, num_tasks=0)),
    "evaluation of an older version": behind(Rule.EVALUATION, "evaluate1", evaluate(2, 1, 0)),
    "evaluation of another step": behind(Rule.EVALUATION, "evaluate1", evaluate(2, 2, 2)),
    "evaluated with an older version": instead(
        Rule.EVALUATION,
        "storeE0",
        store(HELDOUT, 0, 1.0, version=1, sequence=0, incarnation=2**32 + 2, actor="b"),
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
