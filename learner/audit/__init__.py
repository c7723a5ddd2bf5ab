"""The audit: a second opinion on a run's log, offline and read-only.

    segments -> entries: every byte, every payload -> one account each -> report
                                                       samples    task keys and their states
                                                       batches    which samples a step learns from
                                                       trainers   steps, versions, checkpoints
                                                       evaluations   held-out tasks
                                                       origins    records on the wire
                                                       payloads   digests, what was trimmed
                                                       seals      how segments begin and end

It shares nothing with the intake's own fold of the log but the way through the bytes. Each account
knows the rules of its events; one that is broken is reported with its place, and the account goes
on as well as it can. docs/audit.md has the rules.
"""

from learner.audit.audit import audit_run
from learner.audit.report import AuditReport
from learner.audit.violations import Place, Rule, Violation

__all__ = ["AuditReport", "Place", "Rule", "Violation", "audit_run"]
